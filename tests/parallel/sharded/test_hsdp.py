"""hsdp: shards along one axis, replicas along the other, summed over the replicas once a step."""

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


@pytest.mark.slow_unless(lambda model, shape: model == "odd" and shape == {"dp": 2, "fsdp": 2})
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


@pytest.mark.slow_unless(lambda use: use == "others in other micro-batches")
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


@pytest.mark.slow_unless(lambda microbatches: microbatches == 3)
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
    assert used.payload == 4  # a byte for each unit and the root: was it used
    assert [c.unit for c in sums] == ["root", *"abc"]
    layouts = job.layouts.values()
    length = sum(shard_length(layout.shape, 2) for layout in layouts) + len(layouts)  # and flags
    assert sum(c.payload for c in sums) == 8 * length
    sent = ops.all_reduce(torch.tensor(sum(c.sent for c in sums)), mesh.world)
    assert int(sent) == 4 * formula_bytes("all_reduce", 2, 8 * length)
    by_op = {
        op: [c for c in along["fsdp"] if c.op == op] for op in ("all_gather", "reduce_scatter")
    }
    assert [len(calls) for calls in by_op.values()] == [8 * microbatches, 4 * microbatches]
    assert sum(c.payload for c in by_op["reduce_scatter"]) == microbatches * 2 * 8 * length


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_a_unit_that_only_one_replica_uses_gets_its_gradient_on_all(mesh):
    # All ranks of one replica use b, and none of the other.
    def forward(net, x):
        x = net.a(x)
        return (net.b(x) if mesh["dp"].index == 0 else x) * net.last

    job, _ = trained(mesh, build(forward, **ABC), strategy="hsdp")
    loss_of(job).backward()
    job.finish()
    grads = gradients(job)
    assert grads["b.gain"] is not None
    assert grads["c.gain"] is None
    for name, gradient in grads.items():
        if gradient is not None:
            highest = ops.all_reduce(gradient, mesh.world, "max")
            assert torch.equal(highest, -ops.all_reduce(-gradient, mesh.world, "max")), name


@pytest.mark.slow_unless(lambda set_to_none: set_to_none)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_a_cleared_gradient_does_not_come_back(set_to_none, mesh):
    # b is used in the micro-batch whose gradients are cleared (an even step), not in the next.
    make_model = build(lambda net, x: (net.b(x) if x[0, 1] > 0 else net.a(x)) * net.last, **ABC)
    wanted = of_one_step(mesh, 1, make_model=make_model, strategy="hsdp")
    job, optimizer = trained(mesh, make_model, strategy="hsdp")
    with job.microbatch(last=False):
        loss_of(job, 0).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    loss_of(job, 1).backward()
    job.finish()
    grads = gradients(job)
    assert wanted["b.gain"] is None
    if not set_to_none:
        for name in [name for name in grads if name.startswith("b.")]:
            assert not grads[name].any()
            grads[name] = None
    assert_equal(grads, wanted)
