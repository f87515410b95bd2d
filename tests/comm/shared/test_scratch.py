"""Sums and gathers of activations are equal through shared memory and through messages."""

import pytest
import torch

import dist_lab
from dist_lab.comm import ops
from dist_lab.comm.into import window_of
from dist_lab.comm.shared.scratch import Scratch


def values(rank, shape, dtype):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-9, 9, shape, generator=generator).to(dtype)  # their sums are exact


def values_of_all(mesh, shape, dtype):
    return [values(rank, shape, dtype) for rank in range(mesh.size)]


SHAPES = [((3, 12, 5), 1), ((3, 12, 5), -2), ((12, 4), 0), ((2, 3, 12), -1), ((12,), 0)]


@pytest.mark.slow_unless(lambda size, dtype: size == 3 and dtype != torch.float64)
@pytest.mark.parametrize("collectives", ["auto", "backend", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4], ids=lambda n: f"{n}of4")
@pytest.mark.ranks(4)
def test_each_collective_equals_the_same_operation_of_torch_on_all_inputs(
    size, dtype, collectives, mesh
):
    other = dist_lab.init_mesh(collectives=collectives, dp=4)
    axis = other.sub("dp", range(size)) if size < 4 else other["dp"]
    if axis is None:
        return
    scratch = Scratch(axis)
    for shape, dim in SHAPES:
        inputs = values_of_all(axis, shape, dtype)
        x = inputs[axis.index].clone()
        total = torch.stack(inputs).sum(0)
        assert torch.equal(scratch.all_reduce(x).wait(), total)
        shard = scratch.reduce_scatter(x, dim).wait()
        assert torch.equal(shard, total.chunk(size, dim)[axis.index])
        assert torch.equal(scratch.all_gather(shard, dim).wait(), total)
        assert torch.equal(x, inputs[axis.index]), "the input was changed"
        assert torch.equal(scratch.all_reduce(x.t() if x.dim() == 2 else x).wait(), total.t()
                           if x.dim() == 2 else total)  # fmt: skip


@pytest.mark.ranks(4)
def test_results_are_kept_when_buffers_are_reused_and_grow(mesh):
    scratch, results = Scratch(mesh["dp"]), []
    for length in (4, 8, 4, 400, 8, 400, 4):
        inputs = values_of_all(mesh, (length,), torch.float64)
        results.append((scratch.all_reduce(inputs[mesh.rank]).wait(), torch.stack(inputs).sum(0)))
    assert all(torch.equal(got, wanted) for got, wanted in results)
    assert len(list(scratch.extra_memory())) == 2


@pytest.mark.ranks(4)
def test_two_collectives_may_be_in_flight_in_shared_memory(mesh):
    scratch, axis = Scratch(mesh["dp"]), mesh["dp"]
    inputs = values_of_all(mesh, (6, 8), torch.float32)
    first = scratch.all_reduce(inputs[mesh.rank])
    second = scratch.all_gather(inputs[mesh.rank], 0)
    assert len(list(scratch.extra_memory())) == 2
    assert all(window_of(b, axis) for b in scratch.extra_memory()), "the buffers are not shared"
    assert torch.equal(first.wait(), torch.stack(inputs).sum(0))
    assert torch.equal(second.wait(), torch.cat(inputs))


@pytest.mark.ranks(3)
def test_sent_bytes_follow_the_formula_and_all_ranks_get_the_same_bits(mesh):
    scratch, axis = Scratch(mesh["dp"]), mesh["dp"]
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(mesh.rank))
    with mesh.comm.ledger.recording() as calls:
        y = scratch.all_reduce(x).wait()
        shard = scratch.reduce_scatter(x, 1).wait()
        scratch.all_gather(shard, 1).wait()
    calls = [call for call in calls if call.algorithm == "shared"]
    assert [call.op for call in calls] == ["all_reduce", "reduce_scatter", "all_gather"]
    assert [call.sent for call in calls] == [2 * 2 * 80, 2 * 80, 2 * 80]  # S = 240, N = 3
    assert all(call.sent == call.due and call.payload == 240 for call in calls)
    rows = ops.all_gather(y[None], axis)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_on_one_rank_each_is_the_identity():
    scratch, x = Scratch(dist_lab.init_mesh()["dp"]), torch.ones(3, 4)
    assert scratch.all_reduce(x).wait() is x
    assert scratch.reduce_scatter(x, 0).wait() is x
    assert scratch.all_gather(x, 0).wait() is x
