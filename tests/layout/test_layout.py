"""Boxes, gathering, global norms and clipping, on layouts that later strategies use."""

import json
from dataclasses import replace

import pytest
import torch

from dist_lab.layout.gather import gather_all, gather_full
from dist_lab.layout.layout import (
    FlatShard,
    Layout,
    OnlyOn,
    Owed,
    Shard,
    boxes,
    from_json,
    holds,
    is_counted,
    is_first_holder,
    local_numel,
    slice_local,
    to_json,
)
from dist_lab.mesh.mesh import init_mesh
from dist_lab.mesh.topology import coordinates, rank_at
from dist_lab.step.clip import clip, global_norm

SHAPES = [(10, 6), (7, 5), (2, 3), (1, 1), (4,)]  # even, uneven, fewer rows than ranks


def lies(shape, *splits):
    return Layout(torch.Size(shape), torch.float64, splits)


def sliced(tensor, layout, mesh):
    return slice_local(tensor, layout, mesh.axes, mesh.coordinates)


def whole(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3, 4)])
def test_gather_undoes_slice_however_unevenly_it_divides(world, shape, mesh):
    where = lies(shape, ("dp", Shard(0)))
    local = sliced(whole(shape), where, mesh).clone()
    assert torch.equal(gather_full(local, where, mesh), whole(shape))


@pytest.mark.parametrize("shape", [*SHAPES, (), (0, 3)], ids=str)
@pytest.mark.parametrize("offset", [0, 3, 11])
@pytest.mark.ranks(3)
def test_gather_undoes_slice_wherever_the_elements_lie_among_others(offset, shape, mesh):
    # Three ranks have 25 elements each; this tensor begins at `offset`, and may end before.
    where = lies(shape, ("dp", FlatShard(offset, 25)))
    local = sliced(whole(shape), where, mesh).clone()
    first, last = 25 * mesh.rank - offset, 25 * (mesh.rank + 1) - offset
    everything = whole(shape).flatten()
    assert torch.equal(local, everything[max(first, 0) : max(last, 0)])
    assert torch.equal(gather_full(local, where, mesh), whole(shape))


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_a_range_of_elements_may_be_of_rows_that_were_split_before(mesh):
    where = lies((7, 5), ("tp", Shard(0)), ("fsdp", FlatShard(2, 11)))
    local = sliced(whole((7, 5)), where, mesh).clone()
    assert (
        len(local)
        == {(0, 0): 9, (0, 1): 11, (1, 0): 9, (1, 1): 6}[mesh["tp"].index, mesh["fsdp"].index]
    )
    assert torch.equal(gather_full(local, where, mesh), whole((7, 5)))
    assert local_numel(where, mesh.axes, mesh.coordinates) == len(local)


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_two_axes_split_one_tensor_in_the_order_applied(dims, mesh):
    where = lies((7, 5), ("tp", Shard(dims[0])), ("fsdp", Shard(dims[1])))
    local = sliced(whole((7, 5)), where, mesh).clone()
    assert torch.equal(gather_full(local, where, mesh), whole((7, 5)))


@pytest.mark.parametrize(("together", "calls"), [(10**6, 5), (0, 12)])
@pytest.mark.ranks(4, mesh={"pp": 2, "fsdp": 2})
def test_many_are_gathered_in_as_few_calls_as_there_are_ways_to_be_split(together, calls, mesh):
    pp = mesh["pp"]
    layouts = {
        "copied": lies((5, 4)),
        "rows": lies((7, 4), ("fsdp", Shard(0))),
        "columns": lies((3, 5), ("fsdp", Shard(1))),
        "among others": lies((4, 4), ("fsdp", FlatShard(3, 11))),
        "on the first": lies((2, 3), ("pp", OnlyOn((0,)))),
        "on the last": lies((4,), ("pp", OnlyOn((1,)))),
        "too": lies((), ("pp", OnlyOn((1,)))),
        "rows on the last": lies((5, 2), ("pp", OnlyOn((1,))), ("fsdp", Shard(0))),
        "rows on the first": lies((3, 2), ("pp", OnlyOn((0,))), ("fsdp", Shard(0))),
        "so are these": lies((1, 2), ("pp", OnlyOn((0,))), ("fsdp", Shard(0))),
    }
    layouts["narrow"] = replace(layouts["rows"], dtype=torch.float32)
    wholes = {n: whole(w.shape, i).to(w.dtype) for i, (n, w) in enumerate(layouts.items())}
    parts = {
        n: sliced(wholes[n], w, mesh).clone() if is_counted(w, mesh.coordinates) else None
        for n, w in layouts.items()
    }
    with mesh.comm.ledger.recording() as recorded:
        found = gather_all(parts, layouts, mesh, together)
    assert list(found) == list(layouts)
    for name, tensor in found.items():
        assert torch.equal(tensor, wholes[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} lies in a larger memory"
        tensor.fill_(9)  # and in none of what is given, of which the rest would be full
    here = [name for name, where in layouts.items() if is_counted(where, mesh.coordinates)]
    assert all(torch.equal(parts[n], sliced(wholes[n], layouts[n], mesh)) for n in here)
    # Once for each way, axis, rank that has it, and dtype; on their own, each tensor and split.
    assert len(recorded) == calls - (together == 0 and pp.index == 1)


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_what_lies_on_one_rank_comes_from_that_one(mesh):
    layouts = {str(i): lies((2, i + 1), ("pp", OnlyOn((i,)))) for i in range(3)}
    parts = {
        name: whole(w.shape) if is_counted(w, mesh.coordinates) else None
        for name, w in layouts.items()
    }
    for name, found in gather_all(parts, layouts, mesh).items():
        assert torch.equal(found, whole(layouts[name].shape)), name


@pytest.mark.ranks(4)
def test_boxes_tile_the_tensor_without_overlap(mesh):
    where = lies((10, 6), ("dp", Shard(0)))
    expected = [(0, 3), (3, 6), (6, 9), (9, 10)][mesh.rank]
    assert boxes(where, mesh.axes, mesh.coordinates) == [(slice(*expected), slice(0, 6))]


def test_a_tensor_that_is_not_split_is_its_own_box():
    assert boxes(lies((3, 2)), {}, {}) == [(slice(0, 3), slice(0, 2))]


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_the_global_norm_is_that_of_one_process_in_every_layout(mesh):
    # Trap 5: low by sqrt(shards) when shards are not summed, high when copies are.
    layouts = {
        "copied": lies((5, 4)),
        "rows": lies((7, 4), ("fsdp", Shard(0))),
        "columns": lies((3, 5), ("tp", Shard(1))),
        "both": lies((6, 4), ("tp", Shard(0)), ("fsdp", Shard(0))),
        "empty on some ranks": lies((1, 4), ("fsdp", Shard(0))),
        "elements": lies((3, 5), ("fsdp", FlatShard(4, 10))),
        "elements of rows": lies((6, 4), ("tp", Shard(0)), ("fsdp", FlatShard(0, 12))),
        "a scalar": lies((), ("fsdp", FlatShard(0, 1))),
        "unused": lies((2, 2), ("tp", Shard(0))),
    }
    full = {n: whole(w.shape, i) for i, (n, w) in enumerate(layouts.items()) if n != "unused"}
    local = {n: sliced(g, layouts[n], mesh).clone() for n, g in full.items()}
    want = torch.cat([g.flatten() for g in full.values()]).norm()
    assert float(global_norm(local, layouts, mesh)) == pytest.approx(float(want), rel=1e-14)


def test_a_half_precision_norm_does_not_overflow_and_no_gradient_is_no_norm():
    g = torch.full((4096,), 10.0, dtype=torch.float16)  # the norm is 640, its square 409,600
    assert global_norm({"a": g}, {"a": lies((4096,))}, init_mesh()) == 640
    assert global_norm({}, {"a": lies((3,))}, init_mesh()) == 0
    clip([], torch.zeros(()), 1.0)


def test_clipping_is_torchs_rule_to_the_last_digit():
    for max_norm in (0.5, 100.0):
        ours, theirs = ([torch.nn.Parameter(torch.zeros(4)) for _ in range(2)] for _ in range(2))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.arange(4.0) + i
            b.grad = a.grad.clone()
        norm = global_norm(
            {str(i): p.grad for i, p in enumerate(ours)}, LAYOUTS_OF_TWO, init_mesh()
        )
        clip([p.grad for p in ours], norm, max_norm)
        theirs_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert float(norm) == pytest.approx(float(theirs_norm), rel=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-6)


LAYOUTS_OF_TWO = {str(i): Layout(torch.Size((4,)), torch.float32) for i in range(2)}


def test_init_mesh_alone_needs_no_group():
    where = lies((4, 2), ("dp", Shard(0)))
    assert torch.equal(gather_full(whole((4, 2)), where, init_mesh()), whole((4, 2)))


# --- any rank of any mesh, with none started ------------------------------------------------------

MESH = {"pp": 2, "dp": 2, "fsdp": 3, "tp": 4}
LAYOUTS = {
    "whole": lies((5, 4)),
    "rows": lies((7, 4), ("fsdp", Shard(0))),
    "fewer rows than ranks": lies((2, 4), ("fsdp", Shard(0))),
    "columns, then rows": lies((5, 6), ("tp", Shard(1)), ("fsdp", Shard(0))),
    "the same dim twice": lies((11, 2), ("tp", Shard(0)), ("fsdp", Shard(0))),
    "heads on two ranks each": lies((4, 3), ("tp", Shard(0, copies=2)), ("fsdp", Shard(1))),
    "elements": lies((3, 2, 5), ("dp", FlatShard(4, 19))),
    "elements of columns": lies((3, 6), ("tp", Shard(1)), ("dp", FlatShard(0, 3))),
    "on one stage": lies((3, 2), ("pp", OnlyOn((1,)))),
    "tied over stages": lies((3, 2), ("pp", OnlyOn((1, 0))), ("fsdp", Shard(0))),
    "a scalar": lies((), ("dp", FlatShard(0, 1))),
    "a scalar on all": lies(()),
    "empty": lies((0, 3), ("fsdp", Shard(0))),
}


def all_ranks(sizes):
    return [coordinates(rank, sizes) for rank in range(torch.Size(sizes.values()).numel())]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_first_holders_cover_a_tensor_once(layout):
    counted = torch.zeros(layout.shape, dtype=torch.int)
    for position in all_ranks(MESH):
        if is_first_holder(layout, MESH, position):
            for box in boxes(layout, MESH, position):
                counted[box] += 1
    assert (counted == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_boxes_are_in_the_order_of_the_elements_that_a_rank_holds(layout):
    numbers = torch.arange(layout.shape.numel()).view(layout.shape)
    for position in all_ranks(MESH):
        held = boxes(layout, MESH, position)
        if not holds(layout, position):
            assert held == []
            continue
        local = slice_local(numbers, layout, MESH, position).flatten()
        assert local.tolist() == [int(n) for box in held for n in numbers[box].flatten()]
        assert local_numel(layout, MESH, position) == len(local)
        if not isinstance(layout.splits[-1][1] if layout.splits else None, FlatShard):
            assert len(held) == (1 if len(local) else 0)
        assert len(held) <= 2 * len(layout.shape) + 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_layout_is_read_back_from_json_as_it_was(layout):
    sums = Owed("dp"), Owed("tp", neighbours=2), Owed("pp", positions=(0, 3))
    for told in (layout, layout.owing(*sums), replace(layout, dtype=torch.bfloat16)):
        assert from_json(json.loads(json.dumps(to_json(told)))) == told


def test_what_is_no_placement_is_not_read():
    with pytest.raises(ValueError, match="not a placement"):
        from_json({"shape": [1], "dtype": "float32", "splits": [["dp", {"x": 1}]], "partial": []})


def test_a_strategy_may_add_to_a_layout_and_take_nothing_away():
    tp = lies((4, 4), ("tp", Shard(0))).owing(Owed("tp"))
    assert tp.split("fsdp", Shard(0)).owing(Owed("dp")).extends(tp)
    assert not tp.extends(tp.split("fsdp", Shard(0)))
    assert not lies((4, 4), ("fsdp", Shard(0))).owing(Owed("tp")).extends(tp)
    assert not tp.extends(replace(tp, shape=torch.Size((4, 5))))


def test_coordinates_and_ranks_are_inverse():
    assert [rank_at(position, MESH) for position in all_ranks(MESH)] == list(range(48))


@pytest.mark.ranks(4, mesh={"tp": 4})
def test_shards_with_copies_are_gathered_and_counted_once(mesh):
    where = {"keys": lies((4, 3), ("tp", Shard(0, copies=2))), "other": lies((2, 2))}
    full = {name: whole(layout.shape) for name, layout in where.items()}
    local = {name: sliced(full[name], layout, mesh).clone() for name, layout in where.items()}
    assert torch.equal(local["keys"], full["keys"][:2] if mesh.rank < 2 else full["keys"][2:])
    assert torch.equal(gather_all(local, where, mesh)["keys"], full["keys"])
    wanted = torch.cat([tensor.flatten() for tensor in full.values()]).norm()
    assert float(global_norm(local, where, mesh)) == pytest.approx(float(wanted), rel=1e-14)


@pytest.mark.ranks(4, mesh={"pp": 2, "tp": 2})
def test_what_lies_on_one_rank_of_two_axes_comes_from_there(mesh):
    where = lies((2, 3), ("pp", OnlyOn((1,))), ("tp", OnlyOn((0,))))
    own = whole((2, 3)) if mesh.coordinates == {"pp": 1, "tp": 0} else None
    assert torch.equal(gather_full(own, where, mesh), whole((2, 3)))
