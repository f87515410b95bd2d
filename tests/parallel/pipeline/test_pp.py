"""Pipeline parallelism: every schedule equals one process, holds what it says, and tells when."""

import copy
from itertools import pairwise

import pytest
import torch
from models import VOCAB, batch, batch_of, build, gpt, mlp, odd, vit
from torch import nn

import dist_lab
from dist_lab import zoo
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe.memory import LiveBytes
from dist_lab.parallel.pipeline.executor import PipelineRun
from dist_lab.parallel.schedules.library import SCHEDULES, make
from dist_lab.parallel.schedules.simulate import IN_FLIGHT, peak_activations
from dist_lab.step.protocol import Sync


def cross_entropy(total):
    return lambda out, y: dist_lab.cross_entropy_sum(out, y) / total


def pairs_of(m, rows=8, step=0):
    x, y = batch(step, rows)
    return list(zip(x.tensor_split(m), y.tensor_split(m), strict=True))


def numbers(p):
    return sorted({1, p - 1, p, 2 * p + 1})


ROWS = [
    (p, m, schedule)
    for p in (2, 3, 4)
    for schedule in SCHEDULES
    for m in (numbers(p) if schedule != "interleaved" else (p, 2 * p))
]

# One stage a rank and two, fewer micro-batches than ranks, as many, twice as many and more; tied
# where their number is even.
USUAL = [(4, 1, "zbv"), (4, 9, "1f1b"), (4, 8, "interleaved")]


@pytest.mark.slow_unless(lambda p, m, schedule: (p, m, schedule) in USUAL or (p, m) == (2, 5))
@pytest.mark.parametrize(
    ("p", "m", "schedule"),
    [pytest.param(*row, marks=pytest.mark.ranks(row[0], mesh={"pp": row[0]})) for row in ROWS],
)
def test_every_schedule_equals_one_process(p, m, schedule, mesh):
    tied, clip = m % 2 == 0, 0.1 if m % 2 else None
    report = dist_lab.verify(
        lambda: gpt(tied=tied, layers=2 * p), lambda step: batch(step, 9), mesh, "pp",
        schedule=schedule, microbatches=m, clip=clip, steps=2,
    )  # fmt: skip
    assert report.equal, report.sentence()  # loss, gradients, gradient norm, weights


@pytest.mark.slow_unless(lambda model, schedule: schedule == "zbv" and model != "resnet18")
@pytest.mark.parametrize(
    ("model", "schedule"),
    [(model, schedule) for model in ("mlp", "vit", "resnet") for schedule in SCHEDULES]
    + [("resnet18", "zbv")],
)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_every_schedule_runs_every_model(model, schedule, mesh):
    # BatchNorm normalizes a micro-batch: the one process takes the same micro-batches, and the
    # running statistics are equal, too.
    def made():
        if model == "resnet18":
            return zoo.build(model, "tiny", vocab=VOCAB, image=(1, 9, 9), seed=0).double()
        return build("pp", model)

    def data(step):
        if model != "resnet18":
            return batch_of(model, step)
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(4, 1, 9, 9, dtype=torch.float64, generator=generator)
        return pixels, torch.randint(VOCAB, (4,), generator=generator)

    report = dist_lab.verify(
        made, data, mesh, "pp", schedule=schedule, microbatches=2, steps=2,
        example_inputs=data(0)[0][:2],
    )  # fmt: skip
    assert report.equal, report.sentence()
    assert any(c.quantity == "buffer" for c in report.comparisons) == model.startswith("resnet")


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.ranks(3, mesh={"pp": 3})
def test_micro_batches_may_differ_in_rows(schedule, mesh):
    # 7 rows in 3: 3, 2 and 2. Their shapes are known to each rank before anything is sent.
    report = dist_lab.verify(
        lambda: gpt(layers=4), lambda step: batch(step, 7), mesh, "pp",
        schedule=schedule, microbatches=3,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_several_runs_accumulate_and_only_the_last_completes_the_gradients(schedule, mesh):
    # Trap 4: all but the last run's gradients dropped, or the sum divided once too often.
    plain = gpt(layers=4)
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    heard = Heard()
    total = 0.0
    with job.listening(heard):
        for run in range(3):
            with job.microbatch(last=run == 2):
                total += job.run(pairs_of(4, step=run), cross_entropy(3 * 48))
    job.finish()
    loss = sum(
        dist_lab.cross_entropy_sum(plain(x), y) / (3 * 48) for x, y in (batch(i) for i in range(3))
    )
    loss.backward()
    wanted = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    assert job.clip_grad_norm(None) == pytest.approx(float(wanted), rel=1e-12)
    own = [name for name, _ in job.model.named_parameters()]
    assert sorted(heard.complete) == sorted(own)  # each once, in the last run


class Heard(Sync):
    def __init__(self):
        self.complete, self.not_yet = [], []

    def grads_ready(self, names, *, last):
        (self.complete if last else self.not_yet).extend(names)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_gradient_is_told_complete_once_when_it_is(schedule, mesh):
    # Trap 11: a weight gradient that comes outside of backward fires no hook, and strategies that
    # wait for one reduce nothing. At the moment it is told, the gradient is the final one.
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    told = {}

    class Copies(Sync):
        def grads_ready(self, names, *, last):
            for name in names:
                if last:
                    assert name not in told
                    told[name] = job.model.get_parameter(name).grad.clone()

    with job.listening(Copies()):
        job.run(pairs_of(4), cross_entropy(48))
    for name, parameter in job.model.named_parameters():
        assert torch.equal(told[name], parameter.grad), name


class Units(Sync):
    """Writes down when which unit must be there, may go, and has been given up."""

    def __init__(self):
        self.log = []

    def unshard(self, unit, phase):
        self.log.append(("unshard", unit, phase.value))

    def reshard(self, unit, phase):
        self.log.append(("reshard", unit, phase.value))

    def forget(self):
        self.log.append(("forget",))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_strategies_are_told_when_the_units_of_a_stage_are_used(schedule, mesh):
    units = [f"model.layers.{i}" for i in range(4)]
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule, units=units)
    mine = [
        name for name in units if any(n.startswith(name) for n, _ in job.model.named_parameters())
    ]
    seen = Units()
    with job.listening(seen):
        job.run(pairs_of(4), cross_entropy(64))
        told, seen.log = seen.log, []
        job.evaluate(pairs_of(3), cross_entropy(64))
        told_in_evaluation, seen.log = seen.log, []
    assert told[0] == ("unshard", "", "forward")
    assert told[-1] == ("reshard", "", "backward")
    assert sorted(told[1:-1]) == sorted(
        entry for u in mine for entry in (("unshard", u, "forward"), ("reshard", u, "backward"))
    )
    assert told_in_evaluation[-1] == ("reshard", "", "forward")
    assert {entry[2] for entry in told_in_evaluation} == {"forward"}
    assert len(told_in_evaluation) == len(told)


@pytest.mark.ranks(1, mesh={"pp": 1})
def test_a_step_that_is_broken_off_reshards_what_was_unsharded(mesh):
    job = dist_lab.parallelize(gpt(layers=2), mesh, "pp", units=["model.layers.0"])
    seen = Units()

    def loss(out, y):
        raise ArithmeticError

    with job.listening(seen), pytest.raises(ArithmeticError):
        job.run(pairs_of(2), loss)
    ended = [("reshard", "model.layers.0", "abort"), ("reshard", "", "abort"), ("forget",)]
    assert seen.log[-3:] == ended


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_tensor_shared_by_both_stages_of_a_rank_is_complete_after_the_later(mesh):
    # zbv has the embedding and the head on rank 0: one parameter, in two stages.
    job = dist_lab.parallelize(gpt(layers=4, tied=True), mesh, "pp", schedule="zbv")
    heard = Heard()
    with job.listening(heard):
        job.run(pairs_of(4), cross_entropy(48))
    assert len(heard.complete) == len(set(heard.complete)) == len(list(job.model.parameters()))


@pytest.mark.slow_unless(lambda schedule, m: m == 7 or (schedule, m) == ("1f1b", 2))
@pytest.mark.parametrize("m", [2, 4, 7])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb", "zbv"])
@pytest.mark.ranks(4, mesh={"pp": 4})
def test_a_rank_holds_as_many_forwards_as_the_schedule_says(schedule, m, mesh):
    job = dist_lab.parallelize(gpt(layers=8), mesh, "pp", schedule=schedule)
    job.run(pairs_of(m, rows=m), cross_entropy(m * 6))
    rank, wanted = mesh["pp"].index, peak_activations(make(schedule, 4, m))
    assert job._runner.pipeline.peak == wanted[rank]
    if schedule == "1f1b":
        assert wanted[rank] == min(m, 4 - rank)


@pytest.mark.parametrize("schedule", ["gpipe", "zbv"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_no_more_messages_than_two_wait_to_leave(schedule, mesh):
    # What has been sent is held until it has left, so of a gpipe that waits for it at the end alone
    # every micro-batch's output would be.
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    left, land, do = [], PipelineRun.land, PipelineRun.do
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PipelineRun, "do", lambda self, a: (do(self, a), left.append(len(self.leaving)))
        )
        patch.setattr(
            PipelineRun, "land", lambda self: (land(self), left.append(len(self.leaving)))
        )
        job.run(pairs_of(8), cross_entropy(48))
    assert max(left) == IN_FLIGHT
    assert left[-1] == 0


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_what_a_rank_holds_is_memory_of_so_many_micro_batches_and_no_more(mesh):
    # In bytes: gpipe's peak grows with each micro-batch by as much as 1f1b's does not.
    def peak(schedule, m):
        job = dist_lab.parallelize(mlp(layers=8), mesh, "pp", schedule=schedule)
        job.run(pairs_of(m, rows=4 * m), cross_entropy(m))  # what is kept for good is there
        for p in job.parameters():
            p.grad.zero_()
        with LiveBytes(job.parameters()) as live:
            job.run(pairs_of(m, rows=4 * m), cross_entropy(m))
        return live.peak

    few, many = ({s: peak(s, m) for s in ("gpipe", "1f1b")} for m in (4, 8))
    inputs = 2 * 16 * 6 * 8  # of the four more micro-batches, which the test itself makes
    one = (many["gpipe"] - few["gpipe"] - inputs) / 4
    assert one > 40_000
    assert many["1f1b"] - few["1f1b"] <= inputs + one / 4


@pytest.mark.slow_unless(lambda schedule: schedule in ("1f1b", "interleaved", "zbv"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_evaluation_gives_every_rank_the_loss_of_one_process(schedule, mesh):
    plain = gpt(layers=4)
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    val = job.evaluate(pairs_of(5), cross_entropy(48))  # any number, of other rows
    with torch.no_grad():
        x, y = batch(0)
        wanted = float(dist_lab.cross_entropy_sum(plain(x), y) / 48)
    assert val == pytest.approx(wanted, rel=1e-12)
    assert job.run(pairs_of(4), cross_entropy(48)) == pytest.approx(wanted, rel=1e-12)
    assert all(p.grad is not None for p in job.model.parameters())


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_weights_are_whole_in_and_out_under_the_models_own_names(mesh):
    fresh = gpt(layers=4, tied=True, seed=1)
    job = dist_lab.parallelize(gpt(layers=4, tied=True), mesh, "pp")
    names = list(fresh.state_dict())
    here = set(job.model.state_dict())
    assert here < set(names)
    job.load_full_state_dict(fresh.state_dict())
    full = job.full_state_dict()
    assert list(full) == names
    for name, value in fresh.state_dict().items():
        assert torch.equal(full[name], value), name
    with pytest.raises(UserError, match=r"1 names do not match, first: lm_head.weight is missing"):
        job.load_full_state_dict({n: t for n, t in full.items() if n != "lm_head.weight"})


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_tied_tensors_stay_equal_on_both_stages(mesh):
    # Trap 9: two unsynchronised parameters.
    job = dist_lab.parallelize(gpt(layers=4, tied=True), mesh, "pp")
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        job.run(pairs_of(4, step=step), cross_entropy(48))
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    name = {0: "model.embed_tokens.weight", 2: "lm_head.weight"}.get(mesh.rank)
    mine = job.model.get_parameter(name).detach() if name else torch.zeros(VOCAB, 32).double()
    rows = dist_lab.comm.ops.all_gather(mine[None], mesh["pp"])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], gpt(tied=True).state_dict()["lm_head.weight"])


class Skips(nn.Module):
    """What the first layer makes is read by the last, over all stages between, and so is a mask."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.middle = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, tokens):
        early = self.first(tokens)
        x, odd_ones = early, tokens % 2
        for layer in self.middle:
            x = x + layer(x).tanh()
        return self.last(x * early + odd_ones.unsqueeze(-1))


@pytest.mark.slow_unless(lambda schedule: schedule in ("1f1b", "zb", "zbv"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(4, mesh={"pp": 4})
def test_values_that_skip_stages_are_carried(schedule, mesh):
    def made():
        torch.manual_seed(0)
        return Skips().double()

    report = dist_lab.verify(
        made, lambda step: batch(step), mesh, "pp", schedule=schedule, microbatches=4,
        example_inputs=batch(0)[0][:2],
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_frozen_unused_and_tied_parameters_under_every_schedule(schedule, mesh):
    report = dist_lab.verify(
        odd, lambda step: batch(step), mesh, "pp", schedule=schedule, microbatches=2,
        example_inputs=batch(0)[0][:2],
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_bfloat16_is_sent_and_computed_in(schedule, mesh):
    report = dist_lab.verify(
        lambda: gpt(torch.float32, layers=4), lambda step: batch(step), mesh, "pp",
        schedule=schedule, microbatches=4, param_dtype=torch.bfloat16,
    )  # fmt: skip
    assert report.equal, report.sentence()
    job = dist_lab.parallelize(
        gpt(torch.float32, layers=4), mesh, "pp", schedule=schedule, param_dtype=torch.bfloat16
    )
    with mesh.comm.ledger.recording() as calls:
        job.run(pairs_of(4), cross_entropy(48))
    sent = [call.payload for call in calls if call.op == "send"]
    assert set(sent) == {2 * 6 * 32 * 2}  # 2 rows of 6 tokens of 32 features of 2 bytes


@pytest.mark.ranks(4, mesh={"pp": 4})
def test_a_rank_sends_what_the_docstring_says(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", balance="count")
    with mesh.comm.ledger.recording() as calls:
        job.run(pairs_of(4), cross_entropy(48))
    sent = sum(call.sent for call in calls if call.op == "send")
    sides = (mesh.rank > 0) + (mesh.rank < 3)
    assert sent == sides * 8 * 6 * 32 * 8  # m micro-batches are the batch: B T D doubles a side


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_schedule_of_ones_own_is_checked_and_run(mesh, tmp_path):
    # One more forward ahead than 1f1b has on the first rank.
    path = tmp_path / f"own{mesh.rank}.csv"
    path.write_text("0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n1F0,1B0,1F1,1B1,,1F2,1B2,1F3,1B3\n")
    report = dist_lab.verify(
        lambda: gpt(layers=4), lambda step: batch(step), mesh, "pp",
        schedule=str(path), microbatches=4,
    )  # fmt: skip
    assert report.equal, report.sentence()
    with pytest.raises(UserError, match="is for 4 micro-batches, not 2"):
        job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=str(path))
        job.run(pairs_of(2), cross_entropy(48))


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_run_can_be_seen_as_it_was(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule="zb", emulate_compute=5.0)
    job.run(pairs_of(4), cross_entropy(48))
    rows = job.timeline()
    wanted = [[a for a in r if len(a.op.value) == 1] for r in make("zb", 2, 4).ranks]
    assert [[str(slot.action) for slot in row] for row in rows] == [[*map(str, r)] for r in wanted]
    assert min(row[0].start for row in rows) == 0.0
    for row in rows:
        assert all(slot.end - slot.start > 4.999 for slot in row)  # milliseconds
        assert all(a.end <= b.start for a, b in pairwise(row))
    assert rows[1][0].start >= rows[0][0].end  # what is given must have been made


# --- models with oddities -------------------------------------------------------------------------


def width_six():
    return nn.Linear(6, 6)


def one_relu_twice():
    relu = nn.ReLU()
    return nn.Sequential(width_six(), relu, width_six(), relu)


def one_linear_twice():
    linear = width_six()
    return nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh())


def in_place_across_the_cut():
    return nn.Sequential(width_six(), nn.BatchNorm1d(6), nn.ReLU(inplace=True), width_six())


class Scaled(nn.Module):
    """Holds a parameter itself, and around a layer that others hold, too."""

    def __init__(self, inner):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(())), inner

    def forward(self, x):
        return self.inner(x) * self.scale


def a_layer_within_one_that_is_split():
    linear = width_six()
    return nn.Sequential(width_six(), nn.Tanh(), nn.Sequential(linear, Scaled(linear)), nn.Tanh())


class Aliased(nn.Module):
    """A block that has a second name, which no forward uses."""

    stages = ("blocks.*",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(width_six(), nn.BatchNorm1d(6)) for _ in range(2))
        self.final = self.blocks[1]

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def rows_of_six(step, rows=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype)
    return x, x.roll(1, -1)


def squares(out, y):
    return (out - y).square().sum()


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@pytest.mark.parametrize(
    "build",
    [
        one_relu_twice, one_linear_twice, in_place_across_the_cut,
        a_layer_within_one_that_is_split, Aliased,
    ],
)  # fmt: skip
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_models_with_oddities_equal_one_process(build, schedule, mesh):
    if build is Aliased and schedule == "zbv":
        pytest.skip("it has two blocks, zbv four stages")

    def made():
        torch.manual_seed(0)
        return build().double()

    report = dist_lab.verify(
        made, rows_of_six, mesh, "pp", schedule=schedule, microbatches=2, loss_sum=squares,
        balance="count",
    )  # fmt: skip
    assert report.equal, report.sentence()  # buffers, too, under each of their names


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_block_with_two_names_lies_on_its_stage_alone(mesh):
    job = dist_lab.parallelize(Aliased(), mesh, "pp")
    assert sum(p.numel() for p in job.parameters()) == 6 * 6 + 6 + 6 + 6


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_one_row_can_be_evaluated_which_batchnorm_would_not_train_on(mesh):
    # The shapes that stages give each other are found in the mode of the run.
    torch.manual_seed(0)
    model = nn.Sequential(width_six(), nn.BatchNorm1d(6), nn.Tanh(), width_six()).double()
    plain = copy.deepcopy(model).eval()
    job = dist_lab.parallelize(model, mesh, "pp", balance="count")
    x, y = rows_of_six(0, rows=1)
    with torch.no_grad():
        wanted = float(squares(plain(x), y))
    assert job.evaluate([(x, y)], squares) == pytest.approx(wanted, rel=1e-12)


class ToFloat(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_what_a_model_computes_in_float32_stays_that_across_a_cut(mesh):
    # One process casts what the model is given, and nothing after that.
    model = nn.Sequential(width_six(), ToFloat(), nn.Identity(), nn.Tanh())
    job = dist_lab.parallelize(model, mesh, "pp", param_dtype=torch.bfloat16, balance="count")
    seen = []

    def loss(out, y):
        seen.append(out.dtype)
        return squares(out, y)

    job.run([rows_of_six(0, dtype=torch.float32)], loss)
    assert seen == [torch.float32] * mesh.rank  # the last stage alone sees it


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_more_stages_than_blocks_are_refused_with_the_numbers(mesh):
    with pytest.raises(UserError, match="3 stages are more than the 2 blocks of GPT"):
        dist_lab.parallelize(gpt(), mesh, "pp")


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_what_a_pipeline_cannot_do_is_refused_in_one_line(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp")
    with pytest.raises(UserError, match=r"call job.run\(microbatches, loss_fn\)"):
        job.model(batch(0)[0])
    with pytest.raises(UserError, match="no option bucket_mb; it takes schedule, chunks"):
        dist_lab.parallelize(gpt(layers=4), mesh, "pp", bucket_mb=1)
    with pytest.raises(UserError, match="has no `stages`, and to cut its graph takes an input"):
        dist_lab.parallelize(odd(), mesh, "pp")
    with pytest.raises(UserError, match="recompute computes a block again for the whole of its"):
        model = gpt(layers=4)
        dist_lab.parallelize(model, mesh, "pp", schedule="zb", units=model.units, recompute=1)
    with pytest.raises(UserError, match="3 do not divide by 2 ranks of pp"):
        job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule="interleaved")
        job.run(pairs_of(3), cross_entropy(48))


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_second_run_on_gradients_that_are_complete_is_refused(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp")
    job.run(pairs_of(2), cross_entropy(48))
    with pytest.raises(UserError, match="backward on gradients that hold their last micro-batch"):
        job.run(pairs_of(2), cross_entropy(48))
    job.finish()
    with pytest.raises(UserError, match="without a backward since the last one"):
        job.finish()


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_copy_of_the_model_is_plain(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule="zb")
    job.run(pairs_of(2), cross_entropy(48))
    kept = copy.deepcopy(job.model)
    assert not any("SplitForward" in type(m.forward).__name__ for m in kept.modules())


@pytest.mark.ranks(1, mesh={"pp": 1})
def test_one_stage_is_no_special_case(mesh):
    for schedule in SCHEDULES:
        report = dist_lab.verify(
            lambda: gpt(layers=4), lambda step: batch(step), mesh, "pp",
            schedule=schedule, microbatches=4,
        )  # fmt: skip
        assert report.equal, report.sentence()


def test_the_whole_of_it_runs_without_a_process_group():
    job = dist_lab.parallelize(vit(layers=4), init_mesh(pp=1), "pp")
    x, y = batch_of("vit", 0)
    assert job.run([(x, y)], cross_entropy(8)) > 0


class Forgets(nn.Module):
    stages = ("a", "b")

    def __init__(self):
        super().__init__()
        self.a, self.b = width_six(), width_six()

    def forward(self, x):
        return self.b(self.a(x)) * 2


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = width_six(), width_six()

    def forward(self, x):
        return self.b(self.a(x)) if self.training else self.a(x)


class Complex(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_what_would_be_another_model_is_refused(mesh):
    x, _ = rows_of_six(0, dtype=torch.float32)
    with pytest.raises(UserError, match="do not do what its forward does: that would be another"):
        dist_lab.parallelize(Forgets(), mesh, "pp", example_inputs=x)
    with pytest.raises(UserError, match="its forward asks whether it is in training"):
        dist_lab.parallelize(Asks(), mesh, "pp", example_inputs=x)
    with pytest.raises(UserError, match="one of complex numbers, which is not sent"):
        model = nn.Sequential(width_six(), Complex(), nn.Identity(), nn.Identity())
        dist_lab.parallelize(model, mesh, "pp", example_inputs=x, balance="count")
    with pytest.raises(UserError, match="does not split rows over ranks, so sync_batchnorm"):
        model = in_place_across_the_cut()
        dist_lab.parallelize(model, mesh, "pp", sync_batchnorm=True)
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp")
    with torch.no_grad(), pytest.raises(UserError, match=r"gradients, which are off here; call"):
        job.run(pairs_of(2), cross_entropy(48))
