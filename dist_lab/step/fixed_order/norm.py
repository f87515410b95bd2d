"""The gradient norm, from an exact sum of squares: no order of additions can change its bits.

    g = m 2^(e - 150), where m is an integer of 24 bits, and e the exponent in g's 32 bits
    |dW|^2 = sum over e of (sum of m^2) 2^(2 e - 300)

m^2 has 48 bits, so a sum of integers of 64 bits is exact for 2^15 elements. We add its upper and
its lower half by themselves: then for 2^39. Integers add up in any order, over elements, parameters
and ranks, also in a ring. There is one pair of sums for each of the 256 exponents, 4 KB that travel
once for each axis that shards parameters. At the end Python's integers, which have any length, make
one number of them, which is rounded once.

This is a superaccumulator. Kulisch 2002, "Advanced arithmetic for the digital computer"; Neal 2015,
"Fast exact summation using small and large superaccumulators" (arXiv:1505.05571). For numbers that
have no exact square, Demmel and Nguyen 2013 ("Fast reproducible floating-point summation", ARITH)
keep only the leading bits of each: the same for any order, and not exact.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dist_lab.comm.shared.memory import as_array
from dist_lab.layout.gather import Layouts
from dist_lab.layout.layout import FlatShard
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.step.clip import Gradients, sum_over_model
from dist_lab.torch_private import of_plain_tensors

EXPONENTS = 256
BLOCK = 1 << 16  # elements at once: few enough to stay in the cache
HALF = 24  # bits


def exact_norm(gradients: Gradients, layouts: Layouts, mesh: Mesh) -> Tensor:
    """The same as `global_norm`, for float32, and rounded once: equal bits in every layout.

    The ranks share the work: of a gradient that data-parallel ranks have in common, each measures
    its own elements.
    """
    parts, layouts_of_parts = dict(gradients), dict(layouts)
    for name, layout in layouts.items():
        part = gradients.get(name)
        numel = 0 if part is None else part.numel()
        for axis in (mesh[axis] for axis in DATA_AXES if axis not in dict(layout.splits)):
            share = FlatShard(0, max(1, -(-numel // axis.size)))
            layouts_of_parts[name] = layouts_of_parts[name].split(axis.name, share)
            start, stop = share.range(numel, axis.index)
            part, numel = None if part is None else _flat(part)[start:stop], stop - start
        parts[name] = part
    zeros = torch.zeros(2, EXPONENTS, dtype=torch.int64, device=mesh.device)
    sums = sum_over_model(squares_by_exponent, zeros, parts, layouts_of_parts, mesh)
    return torch.tensor(root(sums), dtype=torch.float64, device=mesh.device)


def _flat(gradient: Tensor) -> Tensor:
    """The elements of a gradient, also of a guarded one."""
    return of_plain_tensors(lambda: gradient.detach().reshape(-1).contiguous())


def squares_by_exponent(gradient: Tensor) -> Tensor:
    """(2, 256): for each exponent the sums of the upper and of the lower halves of m^2.

    The last exponent is that of infinity and NaN; there the two numbers count these.
    """
    sums = np.zeros((2, EXPONENTS), dtype=np.int64)
    values = as_array(_flat(gradient))
    bits = values.view(np.uint32)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK]
        exponents = (block >> 23) & 0xFF
        integers = (block & 0x7FFFFF) + ((exponents > 0).astype(np.uint32) << 23)
        squares = integers.astype(np.uint64) ** 2
        halves = squares >> HALF, squares & ((1 << HALF) - 1)
        for row, half in zip(sums, halves, strict=True):
            # In float64, and exact: 2^16 numbers below 2^24.
            row += np.bincount(exponents, half, EXPONENTS).astype(np.int64)
    if sums[0, -1]:
        sums[:, -1] = np.isinf(values).sum(), np.isnan(values).sum()
    return torch.from_numpy(sums).to(gradient.device)


def root(sums: Tensor) -> float:
    """The square root of the sum of squares whose sums by exponent these are."""
    upper, lower = sums.tolist()
    if lower[-1] or upper[-1]:
        return math.nan if lower[-1] else math.inf
    total = sum(
        ((high << HALF) + low) << 2 * max(exponent, 1)  # subnormal numbers have the exponent of 1
        for exponent, (high, low) in enumerate(zip(upper, lower, strict=True))
    )
    return math.sqrt(total / 2**300)  # Python rounds a quotient of two integers correctly
