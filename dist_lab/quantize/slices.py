"""Shards of a quantised Linear, for tensor parallelism.

    column-parallel    W[F_X, D]    outputs are split: every rank has all inputs, and all groups
    row-parallel       W[F, D_X]    inputs are split: y{U_X} = x[:, D_X] . W[F, D_X]^T, then a sum

[Note: groups of a shard] A row-parallel rank has some inputs. Which scale belongs to input j of
them? Not the rank's scale j // group: that is right only if the groups lie one after another, and
begin where the shard begins. With act-order a shard has inputs of all groups, in any order. So
`row_slice` cuts g_idx as it cuts the weight, keeps the groups that occur, and renumbers them.

Then every rank has nearly all scales: G in place of G / ranks. `sort_inputs` sorts the inputs by
group before they are split; then each rank has the scales of its own groups only. The input must be
in the same order, x[:, order]. The outputs of the layer before, too, can be put in this order once.

Letters: F outputs, D inputs, G groups, X the axis.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.quantize.formula import Grid, Quantized
from dist_lab.quantize.linear import QuantizedLinear


def column_slice(linear: QuantizedLinear, start: int, stop: int) -> QuantizedLinear:
    """Outputs from `start` to `stop`, with their part of the bias. All inputs.

    Raises:
        UserError: there are no such outputs.
    """
    _check(start, stop, linear.out_features, "outputs")
    whole, rows = linear.quantized(), slice(start, stop)
    part = Quantized(whole.codes[rows], whole.grid.rows(rows))
    bias = None if linear.bias is None else linear.bias[rows]
    return QuantizedLinear.from_quantized(part, bias, linear.inputs)


def row_slice(linear: QuantizedLinear, start: int, stop: int) -> QuantizedLinear:
    """Inputs from `start` to `stop`: see [Note: groups of a shard]. All outputs.

    The results of the shards must be summed. Only the first shard has the bias, so that it is added
    once.

    Raises:
        UserError: there are no such inputs, or inputs are rounded in the range of a whole row,
            which a shard does not see.
    """
    _check(start, stop, linear.in_features, "inputs")
    if linear.inputs is not None and linear.inputs.scale is None:
        raise UserError(
            "inputs are rounded in the range of each row (dynamic), and a shard has a part of each "
            "row; round them before they are split, or give them a fixed range (static)"
        )
    whole = linear.quantized()
    grid = whole.grid
    used, groups = grid.groups[start:stop].unique(return_inverse=True)
    part = Grid(grid.scheme, grid.scale[:, used], grid.zero[:, used], groups.to(torch.int32))
    bias = linear.bias if start == 0 else None
    codes = whole.codes[:, start:stop]
    return QuantizedLinear.from_quantized(Quantized(codes, part), bias, linear.inputs)


def sort_inputs(quantized: Quantized) -> tuple[Quantized, Tensor]:
    """Sort the inputs by group. Returns the sorted matrix and `order`, (D,).

    `x[:, order] @ sorted.values().T` is `x @ quantized.values().T`, up to rounding.
    """
    grid = quantized.grid
    order = grid.groups.argsort(stable=True)
    return Quantized(quantized.codes[:, order], replace(grid, groups=grid.groups[order])), order


def _check(start: int, stop: int, size: int, what: str) -> None:
    if not 0 <= start < stop <= size:
        raise UserError(f"no {what} from {start} to {stop}: the layer has {size}")
