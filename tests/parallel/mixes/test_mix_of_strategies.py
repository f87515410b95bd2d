"""Strategies in several dimensions: what a mix must keep of each of its strategies.

Parity with one process is in programs/verify/matrix; here is what a comparison of numbers cannot
see: when gradients travel, how often, how many bytes, and that options keep their meaning.
"""

import time

import pytest
import torch
from models import VOCAB, batch, gpt, resnet
from torch import nn

import dist_lab
from dist_lab import zoo
from dist_lab.errors import TrainingDiverged, UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.parallel.schedules.actions import Op
from dist_lab.programs.verify import batch as batches

EIGHT = [
    ({"pp": 2, "fsdp": 2, "tp": 2}, None),
    ({"pp": 2, "dp": 2, "tp": 2}, "zero1"),
    ({"pp": 2, "dp": 2, "tp": 2}, "zero2"),
    ({"pp": 2, "dp": 2, "fsdp": 2}, None),
    ({"dp": 2, "fsdp": 2, "tp": 2}, None),
]
FOUR = [
    ({"pp": 2, "dp": 2}, "ddp"),
    ({"pp": 2, "dp": 2}, "zero1"),
    ({"pp": 2, "dp": 2}, "zero2"),
    ({"pp": 2, "fsdp": 2}, None),
    ({"pp": 2, "tp": 2}, None),
    ({"dp": 2, "tp": 2}, "ddp"),
    ({"dp": 2, "tp": 2}, "zero1"),
    ({"fsdp": 2, "tp": 2}, None),
]
UNITS = ("model.layers.0", "model.layers.1")


def loss_of(total):
    return lambda output, target: cross_entropy_sum(output, target) / total


def train(job, steps=2, microbatches=4, rows=8, optimizer=None):
    """Take steps on rows that differ by rank. Returns the losses."""
    optimizer = optimizer or job.optimizer(torch.optim.AdamW, lr=1e-2)
    data, losses = job.mesh.data, []
    for step in range(steps):
        own = batches.slice_rows(batch(step, rows), data.size)[data.index]
        pairs = batches.slice_rows(own, microbatches)
        losses.append(job.run(pairs, loss_of(rows * 6)))
        job.finish()
        job.clip_grad_norm(1.0)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    return losses


def one_process(steps=2, rows=8, build=gpt):
    model = build(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        x, y = batch(step, rows)
        loss_of(rows * 6)(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_weights_equal(job, model, tolerance=1e-10):
    full = job.full_state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(full[name], expected, rtol=tolerance, atol=tolerance)


# --- state and evaluation -------------------------------------------------------------------------


@pytest.mark.slow  # cells of the matrix with `round-trip` do the same
@pytest.mark.nightly_unless(lambda axes, strategy: {"pp", "tp"} <= {*axes} and strategy != "zero2")
@pytest.mark.parametrize(("axes", "strategy"), EIGHT, ids=str)
@pytest.mark.ranks(8)
def test_a_state_dict_moves_between_mixes_and_evaluation_sees_the_loaded_weights(axes, strategy):
    mesh = dist_lab.init_mesh(**axes)
    job = dist_lab.parallelize(gpt(layers=4), mesh, strategy, units=UNITS)
    trained = one_process()
    job.load_full_state_dict(trained.state_dict())
    assert_weights_equal(job, trained, tolerance=0)
    x, y = batch(7, 8)
    own = batches.slice_rows((x, y), mesh.data.size)[mesh.data.index]
    loss = job.evaluate(batches.slice_rows(own, 2), loss_of(48))
    with torch.no_grad():
        expected = float(loss_of(48)(trained(x), y))
    assert loss == pytest.approx(expected, rel=1e-12)
    train(job, steps=1)  # training goes on from there
    assert job.evaluate(batches.slice_rows(own, 2), loss_of(48)) != loss


@pytest.mark.slow  # cells of the matrix with `round-trip` do the same on four ranks
@pytest.mark.nightly_unless(lambda axes, strategy: {"pp", "tp"} <= {*axes} and strategy is None)
@pytest.mark.parametrize(("axes", "strategy"), EIGHT, ids=str)
@pytest.mark.ranks(8)
def test_a_mix_from_the_meta_device_starts_with_the_weights_of_one_process(axes, strategy):
    mesh = dist_lab.init_mesh(**axes)
    shape = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 48}

    def build(device):
        return zoo.build("gpt", "tiny", vocab=VOCAB, seed=3, device=device, **shape)

    job = dist_lab.parallelize(build("meta"), mesh, strategy, units=UNITS, seed=3)
    assert not any(p.is_meta for _, p in job.named_parameters())
    assert_weights_equal(job, build("cpu"), tolerance=0)


@pytest.mark.slow_unless(lambda axes, strategy: strategy is None and {*axes} != {"fsdp", "tp"})
@pytest.mark.parametrize(("axes", "strategy"), FOUR, ids=str)
@pytest.mark.ranks(4)
def test_a_rank_draws_its_own_parameters_only_and_each_of_them_once(axes, strategy):
    mesh, drawn = dist_lab.init_mesh(**axes), []

    def init(name, tensor, generator):
        drawn.append(name)
        tensor.normal_(generator=generator)

    model = gpt(torch.float32, layers=4).to("meta")
    job = dist_lab.parallelize(model, mesh, strategy, init_fn=init, units=UNITS)
    assert sorted(drawn) == sorted(name for name, _ in job.model.named_parameters())


# --- options keep their meaning -------------------------------------------------------------------


@pytest.mark.slow  # cells of the matrix recompute on four ranks
@pytest.mark.nightly_unless(lambda axes, strategy: {"pp", "tp"} <= {*axes} and strategy is None)
@pytest.mark.parametrize(("axes", "strategy"), EIGHT, ids=str)
@pytest.mark.ranks(8)
def test_recompute_changes_no_number_in_a_mix(axes, strategy):
    mesh = dist_lab.init_mesh(**axes)
    job = dist_lab.parallelize(gpt(layers=4), mesh, strategy, units=UNITS, recompute=1)
    train(job)
    assert_weights_equal(job, one_process())


@pytest.mark.slow  # cells of the matrix with `bf16` do the same
@pytest.mark.nightly_unless(lambda axes, strategy: {"pp", "tp"} <= {*axes} and strategy != "zero2")
@pytest.mark.parametrize(("axes", "strategy"), EIGHT, ids=str)
@pytest.mark.ranks(8)
def test_bfloat16_keeps_float32_master_weights_in_a_mix(axes, strategy):
    mesh = dist_lab.init_mesh(**axes)
    options = {"reduce_dtype": torch.float32} if "fsdp" in axes else {}
    job = dist_lab.parallelize(
        gpt(torch.float32, layers=4), mesh, strategy, units=UNITS, param_dtype=torch.bfloat16,
        **options,
    )  # fmt: skip
    losses = train(job, steps=3)
    assert {p.dtype for _, p in job.named_parameters()} == {torch.float32}
    alone = dist_lab.parallelize(
        gpt(torch.float32, layers=4), dist_lab.init_mesh(dp=8), "ddp", param_dtype=torch.bfloat16
    )
    expected = train(alone, steps=3, microbatches=1)
    assert losses == pytest.approx(expected, rel=2e-2)


@pytest.mark.slow  # cells of the matrix with `sync-bn` do the same, on a smaller model
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
@pytest.mark.ranks(4)
def test_batchnorm_is_synchronized_over_the_data_axis_of_a_pipeline(strategy):
    axis = "fsdp" if strategy == "fsdp" else "dp"
    mesh = dist_lab.init_mesh(pp=2, **{axis: 2})
    from models import images

    report = dist_lab.verify(
        resnet, images, mesh, strategy, microbatches=2, sync_batchnorm=True,
        example_inputs=images(0, 2)[0],
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.slow  # cells of the matrix with `offload` do the same
@pytest.mark.ranks(4, mesh={"pp": 2, "fsdp": 2})
def test_offload_keeps_the_shards_of_a_stage_in_files(mesh):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        job = dist_lab.parallelize(gpt(layers=4), mesh, offload=folder)
        train(job)
        assert_weights_equal(job, one_process())


@pytest.mark.slow_unless(lambda axes, strategy: strategy == "zero2")
@pytest.mark.parametrize(("axes", "strategy"), FOUR, ids=str)
@pytest.mark.ranks(4)
def test_collectives_of_a_mix_can_be_checked(axes, strategy):
    mesh = dist_lab.init_mesh(**axes, check=True)
    job = dist_lab.parallelize(gpt(layers=4), mesh, strategy, units=UNITS)
    train(job)
    assert_weights_equal(job, one_process())


@pytest.mark.slow_unless(lambda axes, strategy: strategy == "zero2" and "pp" in axes)
@pytest.mark.parametrize(("axes", "strategy"), FOUR, ids=str)
@pytest.mark.ranks(4)
def test_a_gradient_that_is_not_finite_is_named_on_every_rank(axes, strategy):
    mesh = dist_lab.init_mesh(**axes)
    job = dist_lab.parallelize(gpt(layers=4), mesh, strategy, units=UNITS)
    weights = job.full_state_dict()
    weights["model.layers.3.mlp.down_proj.weight"][:] = float("inf")
    job.load_full_state_dict(weights)
    own = batches.slice_rows(batch(0, 8), mesh.data.size)[mesh.data.index]
    loss = job.run(batches.slice_rows(own, 2), loss_of(48))
    job.finish()
    norm = job.clip_grad_norm(1.0)
    with pytest.raises(TrainingDiverged, match=r"step 3: .* in the gradient of"):
        job.check_finite(3, loss, norm)


# --- when gradients travel, and how many bytes ----------------------------------------------------


def calls_of_a_step(job, microbatches=4, rows=8, after=2):
    """The collectives of the third step: by then ddp knows its buckets and fsdp its order.

    Without those, `after` one step is enough: in the first one a plan of tp is tried.
    """
    optimizer = job.optimizer(torch.optim.SGD, lr=1e-2)
    train(job, after, microbatches=microbatches, rows=rows, optimizer=optimizer)
    with job.mesh.comm.ledger.recording() as calls:
        train(job, steps=1, microbatches=microbatches, rows=rows, optimizer=optimizer)
    return calls


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@pytest.mark.ranks(4, mesh={"pp": 2, "dp": 2})
def test_ddp_in_a_pipeline_sends_the_bytes_of_ddp_of_the_stage(schedule, mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, schedule=schedule)
    sent = [c for c in calls_of_a_step(job) if c.axis == "dp" and c.unit.startswith("bucket")]
    stage = list(job.model.parameters())
    flags = len(stage) + len(sent)  # one for each parameter, and one for each bucket
    assert sum(c.payload for c in sent) == 8 * (sum(p.numel() for p in stage) + flags)


def drains_at(job):
    """Seconds of this rank's clock when the last rank of the pipeline ends its last action."""
    ends = torch.tensor([max(t.end for t in job._runner.pipeline.timings)], dtype=torch.float64)
    return float(dist_lab.comm.ops.all_reduce(ends, job.mesh["pp"], "max"))


@pytest.mark.slow_unless(lambda schedule, strategy: (schedule, strategy) == ("zbv", "fsdp"))
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@pytest.mark.ranks(4)
def test_the_gradients_of_a_stage_leave_while_the_pipeline_still_runs(schedule, strategy):
    mesh = dist_lab.init_mesh(pp=2, **{"fsdp" if strategy == "fsdp" else "dp": 2})
    job = dist_lab.parallelize(
        gpt(layers=4), mesh, strategy, schedule=schedule, emulate_compute=10.0
    )
    optimizer = job.optimizer(torch.optim.SGD, lr=1e-2)
    train(job, optimizer=optimizer)
    issued = []

    def note(call):
        if call.op in ("all_reduce", "reduce_scatter") and call.unit.startswith(
            ("bucket", "stage")
        ):
            issued.append((call.phase, time.perf_counter()))

    mesh.comm.ledger.listeners.append(note)
    train(job, steps=1, optimizer=optimizer)
    mesh.comm.ledger.listeners.remove(note)
    assert {phase for phase, _ in issued} == {"backward"}, "none is left for finish()"
    # Under zb all ranks end at one time: there is no bubble in which gradients could travel.
    is_early = {"1f1b": mesh["pp"].index == 1, "zb": False, "zbv": True}[schedule]
    drained = drains_at(job)
    if is_early:
        assert min(at for _, at in issued) < drained - 0.005


@pytest.mark.slow_unless(lambda schedule, sequence_parallel: schedule == "zb" and sequence_parallel)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("schedule", ["zb", "zbv"])
@pytest.mark.ranks(4, mesh={"pp": 2, "tp": 2})
def test_tp_sends_nothing_in_w_and_as_much_as_without_a_split_backward(
    schedule, sequence_parallel, mesh
):
    def tp_calls(name):
        job = dist_lab.parallelize(
            gpt(layers=4), mesh, schedule=name, sequence_parallel=sequence_parallel
        )
        calls = [c for c in calls_of_a_step(job, after=1) if c.axis == "tp"]
        return [c for c in calls if c.phase in ("forward", "backward")]

    split = tp_calls(schedule)
    whole = tp_calls("interleaved" if schedule == "zbv" else "1f1b")
    ops = {c.unit[1:].rstrip("0123456789") for c in split}
    assert ops <= {Op.F.value, Op.I.value}
    sums = [torch.tensor(float(sum(c.payload for c in calls))) for calls in (split, whole)]
    by_schedule = [float(dist_lab.comm.ops.all_reduce(s, mesh["pp"])) for s in sums]
    assert by_schedule[0] == by_schedule[1]  # zbv and interleaved place stages differently


@pytest.mark.slow_unless(lambda keep_gathered, defer_reduce: defer_reduce and not keep_gathered)
@pytest.mark.parametrize("keep_gathered", [False, True])
@pytest.mark.parametrize("defer_reduce", [True, False])
@pytest.mark.ranks(4, mesh={"pp": 2, "fsdp": 2})
def test_fsdp_in_a_pipeline_sends_what_its_formula_says(keep_gathered, defer_reduce, mesh):
    m = 4
    job = dist_lab.parallelize(
        gpt(layers=4), mesh, keep_gathered=keep_gathered, defer_reduce=defer_reduce
    )
    calls = [c for c in calls_of_a_step(job, microbatches=m) if c.axis == "fsdp"]
    gathers = [c for c in calls if c.op == "all_gather" and c.phase in ("forward", "backward")]
    reductions = [c for c in calls if c.op == "reduce_scatter"]
    local = [job.layouts[name].shape for name, _ in job.model.named_parameters()]
    padded = sum(2 * -(-shape[0] // 2) * shape[1:].numel() for shape in local)
    assert {c.payload for c in gathers} == {8 * padded}
    assert {c.payload for c in reductions} == {8 * (padded + 2 * len(local))}, "and used flags"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.ranks(4, mesh={"pp": 2, "tp": 2})
def test_tp_of_a_traced_pipeline_is_refused_with_the_reason(mesh):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x)

    with pytest.raises(UserError, match=r"pp has cut this model's graph, in which .* give"):
        dist_lab.parallelize(
            Wrapped(), mesh, plan={"net.0": "colwise", "net.2": "rowwise"},
            example_inputs=torch.randn(2, 4, dtype=torch.float64),
        )  # fmt: skip


@pytest.mark.ranks(2, mesh={"pp": 2, "fsdp": 1})
def test_unsharded_forward_to_backward_is_not_an_option_of_a_pipeline(mesh):
    with pytest.raises(UserError, match=r"several forwards come before .*: give keep_gathered"):
        dist_lab.parallelize(gpt(layers=4), mesh, reshard_after_forward=False)


@pytest.mark.ranks(4, mesh={"pp": 2, "tp": 2})
def test_tp_ranks_with_different_rows_are_refused_in_a_pipeline(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh)
    pairs = [batch(mesh["tp"].index, 2)] * 2
    if mesh["pp"].index == 0:
        with pytest.raises(UserError, match="ranks of tp have different inputs"):
            job.run(pairs, loss_of(24))


class Clamped(nn.Linear):
    """Writes to its weight by .data in each forward; `by` may depend on the rows."""

    by_rows = False

    def forward(self, x):
        most = 0.1 + x.mean().abs().item() / 100 if self.by_rows else 0.1
        self.weight.data.clamp_(-most, most)
        return super().forward(x)


def clamped():
    torch.manual_seed(0)
    layers = [
        nn.Embedding(VOCAB, 8),
        nn.Flatten(),
        Clamped(48, 16),
        nn.Tanh(),
        nn.Linear(16, VOCAB),
    ]
    return nn.Sequential(*layers).double()


@pytest.mark.ranks(2, mesh={"pp": 1, "fsdp": 2})
def test_a_forward_of_a_stage_that_clamps_its_weights_trains_as_in_one_process(mesh):
    report = dist_lab.verify(
        clamped, lambda step: (batch(step)[0], batch(step)[1][:, 0]), mesh, microbatches=2
    )
    assert report.equal, report.sentence()


@pytest.mark.ranks(2, mesh={"pp": 1, "fsdp": 2})
def test_a_forward_of_a_stage_that_writes_by_its_rows_is_refused(mesh):
    model = clamped()
    model[2].by_rows = True
    job = dist_lab.parallelize(model, mesh)
    x, y = batch(mesh.rank)
    job.run([(x, y[:, 0])], loss_of(16))
    with pytest.raises(UserError, match=r"writes to 2.weight by .data, with different values"):
        job.finish()


# --- what users do between the runs of a step -----------------------------------------------------

DEFERRING = [
    ({"pp": 2, "fsdp": 2}, None, {}),
    ({"pp": 2, "dp": 2}, "zero2", {}),
    ({"pp": 2, "dp": 2}, "zero1", {}),
    ({"pp": 2, "dp": 2}, "ddp", {}),
]


@pytest.mark.slow_unless(lambda strategy, set_to_none: strategy is None and set_to_none)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("axes", "strategy", "options"), DEFERRING, ids=str)
@pytest.mark.ranks(4)
def test_gradients_cleared_between_two_runs_of_a_step_are_not_in_its_sum(
    axes, strategy, options, set_to_none
):
    mesh = dist_lab.init_mesh(**axes)
    job = dist_lab.parallelize(gpt(layers=4), mesh, strategy, **options)
    optimizer = job.optimizer(torch.optim.SGD, lr=1e-2)
    norms = []
    for clear in (True, False):  # the second time there is nothing to clear
        own = batches.slice_rows(batch(0, 8), mesh.data.size)[mesh.data.index]
        pairs = batches.slice_rows(own, 2)
        if clear:
            with job.microbatch(last=False):
                job.run(pairs, loss_of(48))
            optimizer.zero_grad(set_to_none=set_to_none)
        job.run(pairs, loss_of(48))
        job.finish()
        norms.append(job.clip_grad_norm(None))
        optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
@pytest.mark.ranks(2)
def test_gradients_cleared_between_deferred_micro_batches_are_not_in_the_sum(strategy):
    mesh = dist_lab.init_mesh(**{"fsdp" if strategy == "fsdp" else "dp": 2})
    job = dist_lab.parallelize(gpt(), mesh, strategy, units=UNITS, defer_reduce=True)
    optimizer = job.optimizer(torch.optim.SGD, lr=1e-2)
    x, y = batches.slice_rows(batch(0, 4), 2)[mesh.data.index]
    norms = []
    for clear in (True, False):
        if clear:
            with job.microbatch(last=False):
                loss_of(24)(job.model(x), y).backward()
            optimizer.zero_grad()
        with job.microbatch(last=True):
            loss_of(24)(job.model(x), y).backward()
        job.finish()
        norms.append(job.clip_grad_norm(None))
        optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


class WritesInPlace(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.add_(0.1)
        return super().forward(x)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
@pytest.mark.ranks(2)
def test_a_forward_of_a_stage_that_writes_in_place_is_refused(strategy):
    mesh = dist_lab.init_mesh(pp=1, **{"fsdp" if strategy == "fsdp" else "dp": 2})
    model = nn.Sequential(nn.Linear(4, 4), WritesInPlace(4, 3)).double()
    job = dist_lab.parallelize(model, mesh, strategy)
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(UserError, match=r"the forward writes to 1.weight"):
        job.run([(x, x)], lambda out, _: out.sum())


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
@pytest.mark.ranks(2)
def test_a_gradient_set_when_its_bucket_has_been_sent_is_refused(strategy):
    mesh = dist_lab.init_mesh(pp=1, dp=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[1].unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    job = dist_lab.parallelize(model, mesh, strategy)
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):  # ddp's first step makes its buckets
        job.run([(x, x)], lambda out, _: out.sum())
        job.finish()
        job.optimizer(torch.optim.SGD, lr=0.1).zero_grad()
    job.run([(x, x)], lambda out, _: out.sum())
    job.model[1].unused.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(UserError, match=r"gradient of 1.unused was set after job.run"):
        job.finish()


@pytest.mark.ranks(2, mesh={"pp": 1, "fsdp": 2})
def test_a_pipeline_never_gathers_in_advance(mesh):
    with pytest.raises(UserError, match="when the schedule says so, and never in advance"):
        dist_lab.parallelize(gpt(layers=4), mesh, prefetch=False)


def freeze_a_layer(model):
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)


@pytest.mark.slow_unless(lambda axes, strategy: "fsdp" in axes)
@pytest.mark.parametrize(("axes", "strategy"), [(a, s) for a, s in FOUR if "pp" in a])
@pytest.mark.ranks(4)
def test_a_layer_that_is_frozen_between_two_steps_stays_as_it_is(axes, strategy, mesh):
    job = dist_lab.parallelize(gpt(layers=4), dist_lab.init_mesh(**axes), strategy)
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-2)
    train(job, steps=1, optimizer=optimizer)
    freeze_a_layer(job.model)
    train(job, steps=1, optimizer=optimizer)
    model = gpt(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        x, y = batch(0, 8)
        loss_of(48)(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        freeze_a_layer(model)
    assert_weights_equal(job, model)
