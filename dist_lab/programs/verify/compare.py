"""What is compared, and how far apart two of it are.

    error = max|a - b| / max(max|b|, 1e-3 x the median over tensors of max|b|)

The floor is for tensors that are nearly zero: relative to nothing, rounding is everything. Truth
values and integers are equal or not.

[Note: rounding only] Where the true gradient is zero, the computed one holds only rounding, which
Adam divides by itself and turns into a full step: two right runs have other weights there. The key
bias of attention is so (softmax does not see it), and with it a third of the `in_proj_bias` of
nn.MultiheadAttention. So the elements of a weight whose gradient has been rounding alone, at this
step or before, are left out, counted and listed. A gradient of exactly zero in both runs (a row of
an embedding that nobody looked up) is no rounding: that weight is judged. Gradients are always.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify.report import Comparison

# The largest error that rounding explains, by the dtype of compute: sums in another order, through
# a few optimizer steps. A bug is larger than any of them by orders of magnitude in float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}
Tensors = Mapping[str, Tensor | None]
State = dict[str, Tensors]  # quantity -> name -> its value after a step, in the order of comparison


def compare(
    step: int, ours: State, theirs: State, rounding: dict[str, Tensor], dtype: torch.dtype
) -> list[Comparison]:
    """Every quantity of one step.

    Args:
        rounding: name -> which elements have had a gradient of rounding alone; kept up to date.
    """
    _note_rounding(rounding, ours["gradient"], theirs["gradient"], dtype)
    found = []
    for quantity, tensors in theirs.items():
        floor = floor_of(tensors)
        for name, tensor in tensors.items():
            out = rounding.get(name) if quantity == "weight" else None
            left, elements = int(out.sum()) if out is not None else 0, tensor_size(tensor)
            judged = not left or left < elements
            distance = error(ours[quantity].get(name), tensor, floor, out if judged else None)
            judged = judged or not math.isfinite(distance)  # rounding makes no NaN
            found.append(Comparison(step, quantity, name, distance, 0, judged, left, elements))
    return found


def error(
    a: Tensor | None, b: Tensor | None, floor: float, left_out: Tensor | None = None
) -> float:
    """How far a is from b, relative to the largest element of b or to the floor."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf  # one has a gradient where the other has none
    a, b = _dense(a), _dense(b)
    if a.shape != b.shape:
        return math.inf
    if b.numel() == 0:
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else math.inf
    distances = (a - b).abs()
    if left_out is not None:
        distances = distances.masked_fill(left_out & distances.isfinite(), 0)
    largest = float(distances.max())
    if not math.isfinite(largest):  # a mask of -inf is -inf in both
        distances = distances.masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
        largest = float(distances.max())
    scale = max(_largest(b), floor)
    return largest / scale if scale else math.inf if largest else 0.0


def floor_of(tensors: Tensors) -> float:
    return 1e-3 * _median(_sizes(tensors))


def only_rounding(gradients: Tensors, dtype: torch.dtype) -> set[str]:
    """Tensors whose gradient is so small beside the others' that it may be rounding alone."""
    sizes = _sizes(gradients)
    below = _rounding(dtype) * _median(sizes)
    return {name for name, size in sizes.items() if 0 < size <= below}


def _note_rounding(
    rounding: dict[str, Tensor], ours: Tensors, theirs: Tensors, dtype: torch.dtype
) -> None:
    """Add the elements that are small beside the rest of their tensor, or beside other tensors."""
    sizes, whole = _sizes(theirs), only_rounding(theirs, dtype)
    for name, largest in sizes.items():
        gradient, other = theirs[name], ours.get(name)
        assert gradient is not None
        size = gradient.abs()
        if name in whole:
            small = torch.ones_like(size, dtype=torch.bool)
        else:
            below = _rounding(dtype) * max(largest, _median(sizes))
            if other is not None and other.shape == size.shape:  # zero by chance in one of both
                size = torch.where(size > 0, size, other.abs())
            small = (size > 0) & (size <= below)
        rounding[name] = small | rounding[name] if name in rounding else small


def _rounding(dtype: torch.dtype) -> float:
    return min(64 * torch.finfo(dtype).eps, 1e-2)


def _sizes(tensors: Tensors) -> dict[str, float]:
    """The largest magnitude in each tensor that has elements, and a magnitude."""
    dense = {name: _dense(t) for name, t in tensors.items() if t is not None and t.numel()}
    return {n: _largest(t) for n, t in dense.items() if t.is_floating_point() or t.is_complex()}


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    sizes = tensor.abs()
    largest = float(sizes.max())
    return largest if math.isfinite(largest) else float(sizes.nan_to_num(0, 0, 0).max())


def _median(sizes: Mapping[str, float]) -> float:
    return statistics.median(sizes.values()) if sizes else 0.0


def _dense(tensor: Tensor) -> Tensor:
    """The same numbers in a make that can be subtracted."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return tensor.view(torch.uint8)
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return tensor.float()
    return tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor


def tensor_size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def worst_over_ranks(found: list[Comparison], mesh: Mesh) -> list[Comparison]:
    """One report for all: of each comparison, the rank that is furthest off."""
    rows = [[[c.error, c.left_out, c.judged] for c in found]]
    mine = torch.tensor(rows, dtype=torch.float64).nan_to_num(nan=math.inf, posinf=math.inf)
    everyone = ops.all_gather(mine, mesh.world)  # (rank, comparison, 3)
    rank = everyone[..., 0].argmax(0)
    return [
        replace(c, error=e, rank=int(r), left_out=int(left), judged=bool(judged))
        for c, r, (e, left, judged) in zip(found, rank, everyone.amax(0).tolist(), strict=True)
    ]
