"""Boxes, gathering, global norms and clipping, for every kind of layout."""

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


def layout_of(shape, *splits):
    return Layout(torch.Size(shape), torch.float64, splits)


def local_slice(tensor, layout, mesh):
    return slice_local(tensor, layout, mesh.axes, mesh.coordinates)


def full_tensor(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("world", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3, 4)])
def test_gather_undoes_slice_also_for_uneven_shards(world, mesh):
    for shape in SHAPES:
        layout = layout_of(shape, ("dp", Shard(0)))
        local = local_slice(full_tensor(shape), layout, mesh).clone()
        assert torch.equal(gather_full(local, layout, mesh), full_tensor(shape)), shape


@pytest.mark.parametrize("offset", [0, 3, 11])
@pytest.mark.ranks(3)
def test_gather_undoes_slice_at_any_offset_in_a_bucket(offset, mesh):
    # Each of three ranks has 25 elements of the bucket; the tensor begins at `offset`.
    for shape in (*SHAPES, (), (0, 3)):
        layout = layout_of(shape, ("dp", FlatShard(offset, 25)))
        local = local_slice(full_tensor(shape), layout, mesh).clone()
        first, last = 25 * mesh.rank - offset, 25 * (mesh.rank + 1) - offset
        everything = full_tensor(shape).flatten()
        assert torch.equal(local, everything[max(first, 0) : max(last, 0)]), shape
        assert torch.equal(gather_full(local, layout, mesh), full_tensor(shape)), shape


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_a_flat_shard_may_be_of_rows_that_another_axis_has_split(mesh):
    layout = layout_of((7, 5), ("tp", Shard(0)), ("fsdp", FlatShard(2, 11)))
    local = local_slice(full_tensor((7, 5)), layout, mesh).clone()
    assert (
        len(local)
        == {(0, 0): 9, (0, 1): 11, (1, 0): 9, (1, 1): 6}[mesh["tp"].index, mesh["fsdp"].index]
    )
    assert torch.equal(gather_full(local, layout, mesh), full_tensor((7, 5)))
    assert local_numel(layout, mesh.axes, mesh.coordinates) == len(local)


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_two_axes_split_one_tensor_in_the_order_applied(dims, mesh):
    layout = layout_of((7, 5), ("tp", Shard(dims[0])), ("fsdp", Shard(dims[1])))
    local = local_slice(full_tensor((7, 5)), layout, mesh).clone()
    assert torch.equal(gather_full(local, layout, mesh), full_tensor((7, 5)))


@pytest.mark.parametrize(("bucket_bytes", "calls"), [(10**6, 5), (0, 12)])
@pytest.mark.ranks(4, mesh={"pp": 2, "fsdp": 2})
def test_tensors_that_are_split_alike_are_gathered_in_one_call(bucket_bytes, calls, mesh):
    pp = mesh["pp"]
    layouts = {
        "replicated": layout_of((5, 4)),
        "rows": layout_of((7, 4), ("fsdp", Shard(0))),
        "columns": layout_of((3, 5), ("fsdp", Shard(1))),
        "in a bucket": layout_of((4, 4), ("fsdp", FlatShard(3, 11))),
        "on the first": layout_of((2, 3), ("pp", OnlyOn((0,)))),
        "on the last": layout_of((4,), ("pp", OnlyOn((1,)))),
        "a scalar on the last": layout_of((), ("pp", OnlyOn((1,)))),
        "rows on the last": layout_of((5, 2), ("pp", OnlyOn((1,))), ("fsdp", Shard(0))),
        "rows on the first": layout_of((3, 2), ("pp", OnlyOn((0,))), ("fsdp", Shard(0))),
        "one row on the first": layout_of((1, 2), ("pp", OnlyOn((0,))), ("fsdp", Shard(0))),
    }
    layouts["narrow"] = replace(layouts["rows"], dtype=torch.float32)
    full = {n: full_tensor(w.shape, i).to(w.dtype) for i, (n, w) in enumerate(layouts.items())}
    shards = {
        n: local_slice(full[n], w, mesh).clone() if is_counted(w, mesh.coordinates) else None
        for n, w in layouts.items()
    }
    with mesh.comm.ledger.recording() as recorded:
        gathered = gather_all(shards, layouts, mesh, bucket_bytes)
    assert list(gathered) == list(layouts)
    for name, tensor in gathered.items():
        assert torch.equal(tensor, full[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} shares a larger storage"
        tensor.fill_(9)  # its storage is not an input's: the inputs are checked below
    counted = [name for name, layout in layouts.items() if is_counted(layout, mesh.coordinates)]
    assert all(torch.equal(shards[n], local_slice(full[n], layouts[n], mesh)) for n in counted)
    # One call per axis, kind of split, root and dtype; without buckets, per tensor and split.
    assert len(recorded) == calls - (bucket_bytes == 0 and pp.index == 1)


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_a_tensor_on_one_rank_is_broadcast_from_that_rank(mesh):
    layouts = {str(i): layout_of((2, i + 1), ("pp", OnlyOn((i,)))) for i in range(3)}
    shards = {
        name: full_tensor(w.shape) if is_counted(w, mesh.coordinates) else None
        for name, w in layouts.items()
    }
    for name, gathered in gather_all(shards, layouts, mesh).items():
        assert torch.equal(gathered, full_tensor(layouts[name].shape)), name


@pytest.mark.ranks(4)
def test_boxes_tile_the_tensor_without_overlap(mesh):
    layout = layout_of((10, 6), ("dp", Shard(0)))
    expected = [(0, 3), (3, 6), (6, 9), (9, 10)][mesh.rank]
    assert boxes(layout, mesh.axes, mesh.coordinates) == [(slice(*expected), slice(0, 6))]


def test_an_unsplit_tensor_is_one_box():
    assert boxes(layout_of((3, 2)), {}, {}) == [(slice(0, 3), slice(0, 2))]


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_the_global_norm_is_that_of_one_process_in_every_layout(mesh):
    # The norm is too low by sqrt(shards) if shards are not summed, too high if copies are.
    layouts = {
        "replicated": layout_of((5, 4)),
        "rows": layout_of((7, 4), ("fsdp", Shard(0))),
        "columns": layout_of((3, 5), ("tp", Shard(1))),
        "both": layout_of((6, 4), ("tp", Shard(0)), ("fsdp", Shard(0))),
        "empty on some ranks": layout_of((1, 4), ("fsdp", Shard(0))),
        "elements": layout_of((3, 5), ("fsdp", FlatShard(4, 10))),
        "elements of rows": layout_of((6, 4), ("tp", Shard(0)), ("fsdp", FlatShard(0, 12))),
        "a scalar": layout_of((), ("fsdp", FlatShard(0, 1))),
        "unused": layout_of((2, 2), ("tp", Shard(0))),
    }
    full = {n: full_tensor(w.shape, i) for i, (n, w) in enumerate(layouts.items()) if n != "unused"}
    local = {n: local_slice(g, layouts[n], mesh).clone() for n, g in full.items()}
    expected = torch.cat([g.flatten() for g in full.values()]).norm()
    assert float(global_norm(local, layouts, mesh)) == pytest.approx(float(expected), rel=1e-14)


def test_a_half_precision_norm_does_not_overflow_and_a_missing_gradient_counts_as_zero():
    g = torch.full((4096,), 10.0, dtype=torch.float16)  # the norm is 640, its square 409,600
    assert global_norm({"a": g}, {"a": layout_of((4096,))}, init_mesh()) == 640
    assert global_norm({}, {"a": layout_of((3,))}, init_mesh()) == 0
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


def test_a_mesh_of_one_process_needs_no_process_group():
    layout = layout_of((4, 2), ("dp", Shard(0)))
    assert torch.equal(gather_full(full_tensor((4, 2)), layout, init_mesh()), full_tensor((4, 2)))


# --- any rank of any mesh, without starting ranks -------------------------------------------------

MESH = {"pp": 2, "dp": 2, "fsdp": 3, "tp": 4}
LAYOUTS = {
    "replicated": layout_of((5, 4)),
    "rows": layout_of((7, 4), ("fsdp", Shard(0))),
    "fewer rows than ranks": layout_of((2, 4), ("fsdp", Shard(0))),
    "columns, then rows": layout_of((5, 6), ("tp", Shard(1)), ("fsdp", Shard(0))),
    "the same dim twice": layout_of((11, 2), ("tp", Shard(0)), ("fsdp", Shard(0))),
    "heads on two ranks each": layout_of((4, 3), ("tp", Shard(0, copies=2)), ("fsdp", Shard(1))),
    "elements": layout_of((3, 2, 5), ("dp", FlatShard(4, 19))),
    "elements of columns": layout_of((3, 6), ("tp", Shard(1)), ("dp", FlatShard(0, 3))),
    "on one stage": layout_of((3, 2), ("pp", OnlyOn((1,)))),
    "tied over stages": layout_of((3, 2), ("pp", OnlyOn((1, 0))), ("fsdp", Shard(0))),
    "a scalar": layout_of((), ("dp", FlatShard(0, 1))),
    "a replicated scalar": layout_of(()),
    "empty": layout_of((0, 3), ("fsdp", Shard(0))),
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
def test_boxes_follow_the_order_of_a_ranks_elements(layout):
    numbers = torch.arange(layout.shape.numel()).view(layout.shape)
    for position in all_ranks(MESH):
        held_boxes = boxes(layout, MESH, position)
        if not holds(layout, position):
            assert held_boxes == []
            continue
        local = slice_local(numbers, layout, MESH, position).flatten()
        assert local.tolist() == [int(n) for box in held_boxes for n in numbers[box].flatten()]
        assert local_numel(layout, MESH, position) == len(local)
        if not isinstance(layout.splits[-1][1] if layout.splits else None, FlatShard):
            assert len(held_boxes) == (1 if len(local) else 0)
        assert len(held_boxes) <= 2 * len(layout.shape) + 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_layout_survives_json(layout):
    sums = Owed("dp"), Owed("tp", neighbours=2), Owed("pp", positions=(0, 3))
    for each in (layout, layout.owing(*sums), replace(layout, dtype=torch.bfloat16)):
        assert from_json(json.loads(json.dumps(to_json(each)))) == each


def test_an_unknown_placement_is_an_error():
    with pytest.raises(ValueError, match="not a placement"):
        from_json({"shape": [1], "dtype": "float32", "splits": [["dp", {"x": 1}]], "partial": []})


def test_a_layout_extends_another_only_by_adding_splits_and_sums():
    tp = layout_of((4, 4), ("tp", Shard(0))).owing(Owed("tp"))
    assert tp.split("fsdp", Shard(0)).owing(Owed("dp")).extends(tp)
    assert not tp.extends(tp.split("fsdp", Shard(0)))
    assert not layout_of((4, 4), ("fsdp", Shard(0))).owing(Owed("tp")).extends(tp)
    assert not tp.extends(replace(tp, shape=torch.Size((4, 5))))


def test_coordinates_and_ranks_are_inverse():
    assert [rank_at(position, MESH) for position in all_ranks(MESH)] == list(range(48))


@pytest.mark.ranks(4, mesh={"tp": 4})
def test_shards_with_copies_are_gathered_and_counted_once(mesh):
    layouts = {"keys": layout_of((4, 3), ("tp", Shard(0, copies=2))), "other": layout_of((2, 2))}
    full = {name: full_tensor(layout.shape) for name, layout in layouts.items()}
    local = {
        name: local_slice(full[name], layout, mesh).clone() for name, layout in layouts.items()
    }
    assert torch.equal(local["keys"], full["keys"][:2] if mesh.rank < 2 else full["keys"][2:])
    assert torch.equal(gather_all(local, layouts, mesh)["keys"], full["keys"])
    expected = torch.cat([tensor.flatten() for tensor in full.values()]).norm()
    assert float(global_norm(local, layouts, mesh)) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.ranks(4, mesh={"pp": 2, "tp": 2})
def test_a_tensor_on_one_rank_of_two_axes_is_broadcast_from_that_rank(mesh):
    layout = layout_of((2, 3), ("pp", OnlyOn((1,))), ("tp", OnlyOn((0,))))
    local = full_tensor((2, 3)) if mesh.coordinates == {"pp": 1, "tp": 0} else None
    assert torch.equal(gather_full(local, layout, mesh), full_tensor((2, 3)))
