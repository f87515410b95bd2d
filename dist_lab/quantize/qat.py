"""Quantisation-aware training: forward computes with rounded weights, and backward ignores that.

    forward     y = x W'^T        W' = scale * (clamp(round(W / scale) + zero, low, high) - zero)
    backward    dW = dW'          where round(W / scale) + zero is between low and high, else 0

Rounding has the derivative 0 almost everywhere, so nothing would be learned through it. The
straight-through estimator takes 1 instead, and 0 where a code is clamped: Bengio et al. 2013
(arXiv:1308.3432). The optimizer moves W, of full precision, to where its rounded values give a
small loss. Rounding W after training then changes nothing: the loss is that of W' already. Jacob et
al. 2018 (arXiv:1712.05877), section 3.

Inputs of the Linears can be rounded as well. Then a Linear multiplies the numbers that a kernel of
8-bit integers would. With one scale per row (`Scheme(8)`) a token's codes depend on that token
alone; with one scale per tensor (`Scheme(8, None)`) they depend on all tokens of the micro-batch,
on all ranks.

[Note: why there is no observer] Jacob et al. and PyTorch's own modules keep running ranges of the
activations in buffers. Data-parallel ranks see different rows, so their buffers differ, and DDP
broadcasts rank 0's: the ranges of the other ranks are lost, and a value outside of rank 0's range
is clamped. Here a range is computed in every forward and taken over the ranks; there is no state.

[Note: equal to one process] A number within rounding of the middle between two codes may get
another code on another mesh. In float64 that is unlikely, with one exception. If a weight has one
scale, and a token too, then each output is an integer times the two. The first token attends to
itself only, so it is such a row of numbers that is rounded next, and their middles are hit exactly.
In bfloat16 the weights that are rounded are those in bfloat16. The arithmetic is in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError, shown
from dist_lab.quantize.formula import WHOLE, Grid, Scheme, check_groups, extremes, grid_between
from dist_lab.quantize.lowp.blocks import wide
from dist_lab.transforms.operands import Split
from dist_lab.transforms.recipe import Recipe, RoundedOperands


class QAT(Recipe):
    """Train with quantised weights, and perhaps inputs: `parallelize(..., recipe=QAT(Scheme(4)))`.

    Args:
        weights: the scheme of each weight.
        inputs: that of each input; group -1 for one scale per token, None for one per tensor.
        linears: see Recipe.

    Raises:
        UserError: one is no scheme.
    """

    def __init__(
        self, weights: Scheme, inputs: Scheme | None = None, linears: Sequence[str] | str = ()
    ) -> None:
        for name, scheme in (("weights", weights), ("inputs", inputs)):
            if not isinstance(scheme, Scheme | None) or scheme is weights is None:
                raise UserError(
                    f"{shown(scheme)} is no scheme of codes ({name}=); give Scheme(bits, group), "
                    "such as Scheme(4)"
                )
        rounded = RoundedOperands(
            StraightThrough(weights), None if inputs is None else StraightThrough(inputs)
        )

        def start(linears: Mapping[str, nn.Linear], names: Mapping[str, str]) -> RoundedOperands:
            columns = {name: linear.in_features for name, linear in linears.items()}
            for scheme in filter(None, (weights, inputs)):
                check_groups(columns, scheme)
            return rounded

        super().__init__(rounded.weights, rounded.inputs, None, start, linears)


class StraightThrough:
    """A Rounding to a quantiser's grid, with the straight-through estimator as its derivative."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def over(self, split: Split) -> tuple[str, ...]:
        """A range is taken over ranks that have other elements of the row, or of a group of it."""
        if self.scheme.group is None:
            return (*split.rows, *split.columns)
        shared = self.scheme.group == WHOLE or self._shares_groups(split)
        return split.columns if shared else ()

    def limits_of(self, x: Tensor, split: Split) -> Tensor:
        """x (N, D) -> (2, N, G): minus the smallest value of each group, and the largest.

        If ranks share groups, G are those of the whole row. 0 is in every range, so a group of
        which this rank has no column is 0 here.
        """
        if self._shares_groups(split):
            first, rows = self._first(x, split), x.new_zeros(x.size(0), split.width)
            rows[:, first : first + x.size(1)] = x
            x = rows
        low, high = extremes(wide(x), self.scheme)
        return torch.stack([-low, high])

    def round(self, x: Tensor, limits: Tensor, split: Split) -> Tensor:
        columns = split.width if self._shares_groups(split) else x.size(1)
        grid = grid_between(-limits[0], limits[1], self.scheme, columns)
        if self._shares_groups(split):
            first = self._first(x, split)
            grid = replace(grid, groups=grid.groups[first : first + x.size(1)])
        return _StraightThrough.apply(x, grid)

    def _shares_groups(self, split: Split) -> bool:
        """Whether some group of columns lies on two ranks."""
        group = self.scheme.group
        in_groups = group is not None and group != WHOLE and split.columns
        return bool(in_groups) and split.shard % group != 0  # type: ignore[operator]

    def _first(self, x: Tensor, split: Split) -> int:
        """The first column of x: under tp a rowwise Linear may be given all columns."""
        return 0 if x.size(1) == split.width else split.first


class _StraightThrough(torch.autograd.Function):
    """x -> the nearest numbers of a grid. Backward: dy, and 0 where a code was clamped.

    A leaf is saved itself, and its codes are computed again in backward: under fsdp it has no
    memory in between. Of another tensor the mask is saved, one byte for each number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        widened = wide(x)
        ctx.grid, ctx.is_leaf = grid, x.is_leaf
        ctx.save_for_backward(x if x.is_leaf else grid.contains(widened))
        return grid.rounded(widened).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        inside = ctx.grid.contains(wide(saved)) if ctx.is_leaf else saved
        return dy * inside, None
