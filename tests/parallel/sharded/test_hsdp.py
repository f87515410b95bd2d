"""hsdp: rows along one axis, copies along the other; the sum over copies comes once a step."""

import pytest
import torch
from models import MODELS, batch_of, units_of
from test_sharded_param import (
    ABC,
    USES,
    assert_equal,
    build,
    check,
    gradients,
    loss_of,
    of_one_step,
    rows,
    trained,
)

import dist_lab
from dist_lab.comm import ops
from dist_lab.comm.ledger import formula_bytes
from dist_lab.parallel.sharded.sharded_param import shard_length

MESHES = [{"dp": 2, "fsdp": 2}, {"dp": 1, "fsdp": 4}, {"dp": 4, "fsdp": 1}]


@pytest.mark.parametrize("model", ["gpt tied", "odd"])
@pytest.mark.parametrize(
    "shape", [pytest.param(m, marks=pytest.mark.ranks(4, mesh=m), id=str(m)) for m in MESHES]
)
def test_hsdp_equals_one_process_on_every_mesh_shape(model, shape, mesh):
    report = dist_lab.verify(
        MODELS[model], lambda step: batch_of(model, step), mesh, "hsdp", units=units_of(model),
        microbatches=2, clip=0.5, steps=2,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.parametrize(
    "use", ["another order in another step", "others in other micro-batches", "never called"]
)
@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_units_that_are_not_always_used_are_right(use, mesh):
    check(mesh, *USES[use], "hsdp", lambda step: rows(step, 16))


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_a_unit_that_no_rank_used_is_not_summed_over_replicas(mesh):
    job, _ = trained(mesh, *USES["never called"], strategy="hsdp")
    loss_of(job).backward()
    with mesh.comm.ledger.recording() as calls:
        job.finish()
    assert [c.unit for c in calls if c.axis == "dp"] == ["", "root", "a", "c"]


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_shards_are_summed_over_replicas_once_per_step(microbatches, mesh):
    job, optimizer = trained(mesh, strategy="hsdp")
    for _ in range(2):
        with mesh.comm.ledger.recording() as calls:
            for i in range(microbatches):
                with job.microbatch(last=i == microbatches - 1):
                    loss_of(job, i).backward()
            job.finish()
        optimizer.zero_grad()
    along = {axis: [c for c in calls if c.axis == axis] for axis in ("dp", "fsdp")}
    assert len(along["dp"]) + len(along["fsdp"]) == len(calls)
    assert {c.phase for c in along["dp"]} == {"finish"}
    assert {c.op for c in along["dp"]} == {"all_reduce"}
    used, *sums = along["dp"]
    assert used.payload == 4  # a byte for each unit and the root: who was used at all
    assert [c.unit for c in sums] == ["root", *"abc"]
    pieces = sum(shard_length(laid.shape, 2) for laid in job.layouts.values()) + len(job.layouts)
    assert sum(c.payload for c in sums) == 8 * pieces
    everyone = ops.all_reduce(torch.tensor(sum(c.sent for c in sums)), mesh.world)
    assert int(everyone) == 4 * formula_bytes("all_reduce", 2, 8 * pieces)
    of = {op: [c for c in along["fsdp"] if c.op == op] for op in ("all_gather", "reduce_scatter")}
    assert [len(of[op]) for op in of] == [8 * microbatches, 4 * microbatches]
    assert sum(c.payload for c in of["reduce_scatter"]) == microbatches * 2 * 8 * pieces


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_a_unit_that_only_one_replica_uses_gets_its_gradient_on_all(mesh):
    # All the ranks of one copy of the model, and none of the other, go through b.
    def forward(net, x):
        x = net.a(x)
        return (net.b(x) if mesh["dp"].index == 0 else x) * net.last

    job, _ = trained(mesh, build(forward, **ABC), strategy="hsdp")
    loss_of(job).backward()
    job.finish()
    found = gradients(job)
    assert found["b.gain"] is not None
    assert found["c.gain"] is None
    for name, gradient in found.items():
        if gradient is not None:
            highest = ops.all_reduce(gradient, mesh.world, "max")
            assert torch.equal(highest, -ops.all_reduce(-gradient, mesh.world, "max")), name


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_a_cleared_gradient_does_not_come_back(set_to_none, mesh):
    # b is used in the micro-batch that is given up (an even step), and not in the next.
    made = build(lambda net, x: (net.b(x) if x[0, 1] > 0 else net.a(x)) * net.last, **ABC)
    wanted = of_one_step(mesh, 1, made=made, strategy="hsdp")
    job, optimizer = trained(mesh, made, strategy="hsdp")
    with job.microbatch(last=False):
        loss_of(job, 0).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    loss_of(job, 1).backward()
    job.finish()
    found = gradients(job)
    assert wanted["b.gain"] is None
    if not set_to_none:
        for name in [name for name in found if name.startswith("b.")]:
            assert not found[name].any()
            found[name] = None
    assert_equal(found, wanted)
