"""A quantised matrix as a file has it."""

from dataclasses import replace

import torch

from dist_lab.quantize.formula import Quantized, Scheme, round_to_nearest
from dist_lab.quantize.packing import as_stored


def stored_matrix(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, *, act_order: bool, dead: int = 0
) -> Quantized:
    """A random matrix.

    Args:
        act_order: its columns are shuffled, with their groups.
        dead: so many inputs, from the first on, have only zeros.
    """
    generator = torch.Generator().manual_seed(scheme.bits)
    weight = torch.randn(shape, dtype=dtype, generator=generator)
    weight[:, :dead] = 0
    stored = as_stored(round_to_nearest(weight, scheme))
    if not act_order:
        return stored
    order = torch.randperm(shape[1], generator=generator)
    grid = replace(stored.grid, groups=stored.grid.groups[order])
    return Quantized(stored.codes[:, order], grid)
