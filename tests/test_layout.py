"""Boxes, gathering, global norms and clipping, on layouts that later strategies use."""

from dataclasses import replace

import pytest
import torch

from dist_lab.layout import (
    Flat,
    Laid,
    On,
    Shard,
    clip,
    gather_all,
    gather_full,
    global_norm,
    slice_local,
)
from dist_lab.mesh import init_mesh

SHAPES = [(10, 6), (7, 5), (2, 3), (1, 1), (4,)]  # even, uneven, fewer rows than ranks


def laid(shape, *splits):
    return Laid(torch.Size(shape), torch.float64, splits=splits)


def whole(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3, 4)])
def test_gather_undoes_slice_however_unevenly_it_divides(world, shape, mesh):
    where = laid(shape, (mesh["dp"], Shard(0)))
    local = slice_local(whole(shape), where).clone()
    assert torch.equal(gather_full(local, where), whole(shape))


@pytest.mark.parametrize("shape", [*SHAPES, (), (0, 3)], ids=str)
@pytest.mark.parametrize("offset", [0, 3, 11])
@pytest.mark.ranks(3)
def test_gather_undoes_slice_wherever_the_elements_lie_among_others(offset, shape, mesh):
    # Three ranks have 25 elements each; this tensor begins at `offset`, and may end before.
    where = laid(shape, (mesh["dp"], Flat(offset, 25)))
    local = slice_local(whole(shape), where).clone()
    first, last = 25 * mesh.rank - offset, 25 * (mesh.rank + 1) - offset
    everything = whole(shape).flatten()
    assert torch.equal(local, everything[max(first, 0) : max(last, 0)])
    assert torch.equal(gather_full(local, where), whole(shape))


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_a_range_of_elements_may_be_of_rows_that_were_split_before(mesh):
    where = laid((7, 5), (mesh["tp"], Shard(0)), (mesh["fsdp"], Flat(2, 11)))
    local = slice_local(whole((7, 5)), where).clone()
    assert (
        len(local)
        == {(0, 0): 9, (0, 1): 11, (1, 0): 9, (1, 1): 6}[mesh["tp"].index, mesh["fsdp"].index]
    )
    assert torch.equal(gather_full(local, where), whole((7, 5)))
    with pytest.raises(AssertionError, match="a range of elements is no box"):
        _ = where.box


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_two_axes_split_one_tensor_in_the_order_applied(dims, mesh):
    where = laid((7, 5), (mesh["tp"], Shard(dims[0])), (mesh["fsdp"], Shard(dims[1])))
    local = slice_local(whole((7, 5)), where).clone()
    assert torch.equal(gather_full(local, where), whole((7, 5)))


@pytest.mark.parametrize(("together", "calls"), [(10**6, 5), (0, 12)])
@pytest.mark.ranks(4, mesh={"pp": 2, "fsdp": 2})
def test_many_are_gathered_in_as_few_calls_as_there_are_ways_to_be_split(together, calls, mesh):
    pp, fsdp = mesh["pp"], mesh["fsdp"]
    layouts = {
        "copied": laid((5, 4)),
        "rows": laid((7, 4), (fsdp, Shard(0))),
        "columns": laid((3, 5), (fsdp, Shard(1))),
        "among others": laid((4, 4), (fsdp, Flat(3, 11))),
        "on the first": laid((2, 3), (pp, On(0))),
        "on the last": laid((4,), (pp, On(1))),
        "too": laid((), (pp, On(1))),
        "rows on the last": laid((5, 2), (pp, On(1)), (fsdp, Shard(0))),
        "rows on the first": laid((3, 2), (pp, On(0)), (fsdp, Shard(0))),
        "so are these": laid((1, 2), (pp, On(0)), (fsdp, Shard(0))),
    }
    layouts["narrow"] = replace(layouts["rows"], dtype=torch.float32)
    wholes = {n: whole(w.shape, i).to(w.dtype) for i, (n, w) in enumerate(layouts.items())}
    parts = {n: slice_local(wholes[n], w).clone() if w.here else None for n, w in layouts.items()}
    with mesh.wire.ledger.recording() as recorded:
        found = gather_all(parts, layouts, together)
    assert list(found) == list(layouts)
    for name, tensor in found.items():
        assert torch.equal(tensor, wholes[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} lies in a larger memory"
        tensor.fill_(9)  # and in none of what is given, of which the rest would be full
    here = [name for name, where in layouts.items() if where.here]
    assert all(torch.equal(parts[n], slice_local(wholes[n], layouts[n])) for n in here)
    # Once for each way, axis, rank that has it, and dtype; on their own, each tensor and split.
    assert len(recorded) == calls - (together == 0 and pp.index == 1)


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_what_lies_on_one_rank_comes_from_that_one(mesh):
    layouts = {str(i): laid((2, i + 1), (mesh["pp"], On(i))) for i in range(3)}
    parts = {name: whole(w.shape) if w.here else None for name, w in layouts.items()}
    for name, found in gather_all(parts, layouts).items():
        assert torch.equal(found, whole(layouts[name].shape)), name


@pytest.mark.ranks(4)
def test_boxes_tile_the_tensor_without_overlap(mesh):
    where = laid((10, 6), (mesh["dp"], Shard(0)))
    expected = [(0, 3), (3, 6), (6, 9), (9, 10)][mesh.rank]
    assert where.box == (slice(*expected), slice(0, 6))


def test_a_tensor_that_is_not_split_is_its_own_box():
    assert laid((3, 2)).box == (slice(0, 3), slice(0, 2))


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_the_global_norm_is_that_of_one_process_in_every_layout(mesh):
    # Trap 5: low by sqrt(shards) when shards are not summed, high when copies are.
    tp, fsdp = mesh["tp"], mesh["fsdp"]
    layouts = {
        "copied": laid((5, 4)),
        "rows": laid((7, 4), (fsdp, Shard(0))),
        "columns": laid((3, 5), (tp, Shard(1))),
        "both": laid((6, 4), (tp, Shard(0)), (fsdp, Shard(0))),
        "empty on some ranks": laid((1, 4), (fsdp, Shard(0))),
        "elements": laid((3, 5), (fsdp, Flat(4, 10))),
        "elements of rows": laid((6, 4), (tp, Shard(0)), (fsdp, Flat(0, 12))),
        "a scalar": laid((), (fsdp, Flat(0, 1))),
        "unused": laid((2, 2), (tp, Shard(0))),
    }
    full = {n: whole(w.shape, i) for i, (n, w) in enumerate(layouts.items()) if n != "unused"}
    local = {n: slice_local(g, layouts[n]).clone() for n, g in full.items()}
    want = torch.cat([g.flatten() for g in full.values()]).norm()
    assert float(global_norm(local, layouts)) == pytest.approx(float(want), rel=1e-14)


def test_a_half_precision_norm_does_not_overflow_and_no_gradient_is_no_norm():
    g = torch.full((4096,), 10.0, dtype=torch.float16)  # the norm is 640, its square 409,600
    assert global_norm({"a": g}, {"a": laid((4096,))}) == 640
    assert global_norm({}, {"a": laid((3,))}) == 0
    clip([], torch.zeros(()), 1.0)


def test_a_tied_tensor_counts_once():
    layouts = {
        "a": laid((3,)),
        "b": Laid(torch.Size((3,)), torch.float64, alias_of="a"),
    }
    g = torch.tensor([3.0, 4.0, 0.0])
    assert global_norm({"a": g, "b": g}, layouts) == 5


def test_clipping_is_torchs_rule_to_the_last_digit():
    for max_norm in (0.5, 100.0):
        ours, theirs = ([torch.nn.Parameter(torch.zeros(4)) for _ in range(2)] for _ in range(2))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.arange(4.0) + i
            b.grad = a.grad.clone()
        norm = global_norm({str(i): p.grad for i, p in enumerate(ours)}, LAYOUTS_OF_TWO)
        clip([p.grad for p in ours], norm, max_norm)
        theirs_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert float(norm) == pytest.approx(float(theirs_norm), rel=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-6)


LAYOUTS_OF_TWO = {str(i): Laid(torch.Size((4,)), torch.float32) for i in range(2)}


def test_init_mesh_alone_needs_no_group():
    where = laid((4, 2), (init_mesh()["dp"], Shard(0)))
    assert torch.equal(gather_full(whole((4, 2)), where), whole((4, 2)))
