"""Shards of a quantised Linear under tensor parallelism: which scale belongs to which input."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dist_lab.comm.ops import all_gather, all_reduce
from dist_lab.errors import UserError
from dist_lab.quantize.formula import Grid, Quantized, Scheme, grid_of, round_to_nearest
from dist_lab.quantize.linear import ActivationGrid, QuantizedLinear
from dist_lab.quantize.packing import as_stored
from dist_lab.quantize.slices import column_slice, row_slice, sort_inputs

F, D, GROUP = 96, 128, 16


def whole(act_order, bias=True, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(F, D, dtype=torch.float64, generator=generator)
    weight *= torch.rand(F, 1, generator=generator) + 0.01
    matrix = as_stored(round_to_nearest(weight, Scheme(4, GROUP)))
    if act_order:
        order = torch.randperm(D, generator=generator)
        grid = replace(matrix.grid, groups=matrix.grid.groups[order])
        matrix = Quantized(matrix.codes[:, order], grid)
    values = torch.randn(F, dtype=torch.float64, generator=generator) if bias else None
    return QuantizedLinear.from_quantized(matrix, values, **options)


def rows(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, D, dtype=torch.float64, generator=generator)


def own(axis, size):
    return slice(axis.index * size // axis.size, (axis.index + 1) * size // axis.size)


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_row_parallel_shards_have_their_own_scales_with_act_order(mesh):
    """The naive shard takes the scales of its own numbers of inputs, j // group."""
    axis = mesh["tp"]
    for act_order in (False, True):
        linear, x = whole(act_order), rows()
        expected, part = linear(x), own(axis, D)
        shard = row_slice(linear, part.start, part.stop)
        y = all_reduce(shard(x[:, part]), axis)
        assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()

        matrix = linear.quantized()
        first = part.start // GROUP
        groups = (torch.arange(D // axis.size) // GROUP + first).int()
        naive = Quantized(matrix.codes[:, part], replace(matrix.grid, groups=groups))
        bias = linear.bias if part.start == 0 else 0
        y = all_reduce(x[:, part] @ naive.values().t() + bias, axis)
        error = float((y - expected).abs().max() / expected.abs().max())
        assert error > 0.1 if act_order else error <= 1e-12


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_inputs_sorted_before_they_are_split_leave_each_rank_its_share_of_scales(mesh):
    axis = mesh["tp"]
    linear, x = whole(act_order=True), rows()
    expected, part = linear(x), own(axis, D)
    matrix, order = sort_inputs(linear.quantized())
    shard = row_slice(QuantizedLinear.from_quantized(matrix, linear.bias), part.start, part.stop)
    y = all_reduce(shard(x[:, order][:, part]), axis)
    assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert shard.scales.size(0) == D // GROUP // axis.size
    assert torch.equal(shard.g_idx, (torch.arange(D // axis.size) // GROUP).int())
    unsorted = row_slice(linear, part.start, part.stop)
    assert unsorted.scales.size(0) == D // GROUP  # every group has inputs on every rank


@pytest.mark.ranks(2, mesh={"tp": 2})
def test_column_parallel_shards_are_parts_of_the_output(mesh):
    axis = mesh["tp"]
    linear, x = whole(act_order=True), rows()
    part = own(axis, F)
    shard = column_slice(linear, part.start, part.stop)
    y = all_gather(shard(x), axis, dim=1)
    assert (y - linear(x)).abs().max() <= 1e-12 * linear(x).abs().max()
    assert torch.equal(shard.weight, linear.weight[part])


def test_shards_may_begin_and_end_anywhere():
    linear, x = whole(act_order=True), rows()
    for cuts in ((0, 40, 128), (0, 5, 6, 128)):
        shards = [row_slice(linear, a, b) for a, b in pairwise(cuts)]
        y = sum(s(x[:, a:b]) for s, (a, b) in zip(shards, pairwise(cuts), strict=True))
        assert (y - linear(x)).abs().max() <= 1e-12 * linear(x).abs().max()
    shards = [column_slice(linear, a, b) for a, b in ((0, 7), (7, 96))]
    assert torch.equal(torch.cat([shard.weight for shard in shards]), linear.weight)


def test_rounded_inputs_stay_rounded_in_a_shard_if_their_range_is_fixed():
    x = rows(20)
    grid = grid_of(x, Scheme(8, None))
    static = ActivationGrid(grid.scheme, grid.scale, grid.zero)
    linear = whole(act_order=False, inputs=static)
    y = row_slice(linear, 0, 64)(x[:, :64]) + row_slice(linear, 64, 128)(x[:, 64:])
    assert (y - linear(x)).abs().max() <= 1e-12 * linear(x).abs().max()
    dynamic = whole(act_order=False, inputs=ActivationGrid(Scheme(8)))
    assert torch.equal(column_slice(dynamic, 0, 96)(x), dynamic(x))
    with pytest.raises(UserError, match=r"rounded in the range of each row .* a part of each"):
        row_slice(dynamic, 0, 64)


def test_a_shard_outside_of_the_layer_is_refused():
    for start, stop in ((0, 129), (-1, 4), (5, 5)):
        with pytest.raises(UserError, match=f"no inputs from {start} to {stop}: the layer has 128"):
            row_slice(whole(False), start, stop)
    with pytest.raises(UserError, match="no outputs from 90 to 97: the layer has 96"):
        column_slice(whole(False), 90, 97)


def test_a_grid_with_one_scale_for_each_row_is_cut():
    matrix = as_stored(round_to_nearest(torch.randn(32, 64).double(), Scheme(3)))
    linear = QuantizedLinear.from_quantized(matrix)
    assert isinstance(linear.quantized().grid, Grid)
    assert torch.equal(row_slice(linear, 32, 64).weight, linear.weight[:, 32:])
