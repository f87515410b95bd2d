"""Pipeline parallelism: every schedule equals one process, and reports its events in time."""

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
    """m micro-batches."""
    x, y = batch(step, rows)
    return list(zip(x.tensor_split(m), y.tensor_split(m), strict=True))


def microbatch_counts(p):
    return sorted({1, p - 1, p, 2 * p + 1})


ROWS = [
    (p, m, schedule)
    for p in (2, 3, 4)
    for schedule in SCHEDULES
    for m in (microbatch_counts(p) if schedule != "interleaved" else (p, 2 * p))
]

# Fewer micro-batches than ranks, twice as many and more; one stage per rank and two.
# Embeddings are tied where the number of micro-batches is even. The slice of the matrix has each
# schedule, too.
USUAL = [(2, 1, "zbv"), (2, 5, "zb"), (2, 4, "interleaved")]


@pytest.mark.slow_unless(lambda p, m, schedule: (p, m, schedule) in USUAL)
@pytest.mark.nightly_unless(lambda p, m: p != 3 or m >= 6)
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


@pytest.mark.slow_unless(lambda model, schedule: schedule == "zbv" and model in ("mlp", "resnet"))
@pytest.mark.parametrize(
    ("model", "schedule"),
    [(model, schedule) for model in ("mlp", "vit", "resnet") for schedule in SCHEDULES]
    + [("resnet18", "zbv")],
)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_every_schedule_equals_one_process_on_every_model(model, schedule, mesh):
    # BatchNorm normalizes per micro-batch: the one process takes the same micro-batches, so that
    # the running statistics are equal too.
    def build_model():
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
        build_model, data, mesh, "pp", schedule=schedule, microbatches=2, steps=2,
        example_inputs=data(0)[0][:2],
    )  # fmt: skip
    assert report.equal, report.sentence()
    assert any(c.quantity == "buffer" for c in report.comparisons) == model.startswith("resnet")


@pytest.mark.slow  # cells of the matrix with `ragged` do the same
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.ranks(3, mesh={"pp": 3})
def test_micro_batches_may_differ_in_rows(schedule, mesh):
    # 7 rows are split in 3, 2 and 2. Every rank knows the shapes before anything is sent.
    report = dist_lab.verify(
        lambda: gpt(layers=4), lambda step: batch(step, 7), mesh, "pp",
        schedule=schedule, microbatches=3,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_several_runs_accumulate_and_only_the_last_completes_the_gradients(schedule, mesh):
    # Trap 4: the gradients of all but the last run are lost, or the sum is divided twice.
    plain = gpt(layers=4)
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    gradients = ReadyGradients()
    total = 0.0
    with job.listening(gradients):
        for run in range(3):
            with job.microbatch(last=run == 2):
                total += job.run(pairs_of(4, step=run), cross_entropy(3 * 48))
    job.finish()
    loss = sum(
        dist_lab.cross_entropy_sum(plain(x), y) / (3 * 48) for x, y in (batch(i) for i in range(3))
    )
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    assert job.clip_grad_norm(None) == pytest.approx(float(norm), rel=1e-12)
    names = [name for name, _ in job.model.named_parameters()]
    assert sorted(gradients.complete) == sorted(names)  # each once, in the last run


class ReadyGradients(Sync):
    """Records the names of `grads_ready`."""

    def __init__(self):
        self.complete, self.partial = [], []

    def grads_ready(self, names, *, last):
        (self.complete if last else self.partial).extend(names)


@pytest.mark.slow_unless(lambda schedule: schedule in ("1f1b", "zbv"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_each_gradient_is_reported_complete_once_when_it_is_final(schedule, mesh):
    # Trap 11: a weight gradient that is computed outside of backward fires no hook, and a strategy
    # that waits for one never reduces it.
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    reported = {}

    class Copies(Sync):
        def grads_ready(self, names, *, last):
            for name in names:
                if last:
                    assert name not in reported
                    reported[name] = job.model.get_parameter(name).grad.clone()

    with job.listening(Copies()):
        job.run(pairs_of(4), cross_entropy(48))
    for name, parameter in job.model.named_parameters():
        assert torch.equal(reported[name], parameter.grad), name


class UnitEvents(Sync):
    """Records the calls of `unshard`, `reshard` and `forget`."""

    def __init__(self):
        self.log = []

    def unshard(self, unit, phase):
        self.log.append(("unshard", unit, phase.value))

    def reshard(self, unit, phase):
        self.log.append(("reshard", unit, phase.value))

    def forget(self):
        self.log.append(("forget",))


@pytest.mark.slow_unless(
    lambda schedule, keep_gathered: schedule == "zbv" or (schedule == "1f1b" and keep_gathered)
)
@pytest.mark.parametrize("keep_gathered", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved"])
@pytest.mark.ranks(2, mesh={"pp": 2, "fsdp": 1})
def test_a_stage_is_unsharded_for_each_action_or_once_a_run(schedule, keep_gathered, mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, schedule=schedule, keep_gathered=keep_gathered)
    events = UnitEvents()
    with job.listening(events):
        job.run(pairs_of(4), cross_entropy(64))
        of_run, events.log = events.log, []
        job.evaluate(pairs_of(3), cross_entropy(64))
        of_evaluation = events.log
    assert of_run[:2] == [("unshard", "", "forward"), ("unshard", "", "backward")]
    assert of_run[-1] == ("reshard", "", "backward")
    per_stage = {stage: [] for stage in job._runner.pipeline.modules}
    for event, unit, phase in of_run[2:-1]:
        per_stage[int(unit.removeprefix("stage "))].append((event, phase))
    forward, backward = [
        [("unshard", phase), ("reshard", phase)] for phase in ("forward", "backward")
    ]
    halves = 2 if schedule == "zbv" else 1
    for log in per_stage.values():
        if keep_gathered:
            assert log == [("unshard", "forward"), ("reshard", "backward")]
        else:
            assert sorted(log) == sorted(4 * forward + 4 * halves * backward)
            assert all(event == "unshard" for event, _ in log[::2])
    assert of_evaluation[-1] == ("reshard", "", "forward")
    assert {event[2] for event in of_evaluation} == {"forward"}
    assert len(of_evaluation) == 2 + 2 * len(per_stage) * (1 if keep_gathered else 3)


@pytest.mark.ranks(1, mesh={"pp": 1, "fsdp": 1})
def test_an_exception_in_a_step_reshards_all_unsharded_stages(mesh):
    job = dist_lab.parallelize(gpt(layers=2), mesh)
    events = UnitEvents()

    def loss(out, y):
        raise ArithmeticError

    with job.listening(events), pytest.raises(ArithmeticError):
        job.run(pairs_of(2), loss)
    expected = [("reshard", "stage 0", "abort"), ("reshard", "", "abort"), ("forget",)]
    assert events.log[-3:] == expected


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_parameter_of_two_stages_of_a_rank_is_reported_complete_once(mesh):
    # Under zbv the embedding and the head are both on rank 0: one parameter in two stages.
    job = dist_lab.parallelize(gpt(layers=4, tied=True), mesh, "pp", schedule="zbv")
    gradients = ReadyGradients()
    with job.listening(gradients):
        job.run(pairs_of(4), cross_entropy(48))
    names = gradients.complete
    assert len(names) == len(set(names)) == len(list(job.model.parameters()))


@pytest.mark.slow  # by default it is known of the table, and of the memory, below
@pytest.mark.parametrize("m", [2, 4, 7])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb", "zbv"])
@pytest.mark.ranks(4, mesh={"pp": 4})
def test_a_rank_has_as_many_microbatches_in_flight_as_the_schedule_says(schedule, m, mesh):
    job = dist_lab.parallelize(gpt(layers=8), mesh, "pp", schedule=schedule)
    job.run(pairs_of(m, rows=m), cross_entropy(m * 6))
    rank, expected = mesh["pp"].index, peak_activations(make(schedule, 4, m))
    assert job._runner.pipeline.peak == expected[rank]
    if schedule == "1f1b":
        assert expected[rank] == min(m, 4 - rank)


@pytest.mark.parametrize("schedule", ["gpipe", "zbv"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_at_most_two_sends_are_pending_and_none_after_a_run(schedule, mesh):
    # A sent tensor is kept until its send completes. If gpipe waited at the end only, the outputs
    # of all micro-batches would be kept.
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    pending, finish, execute = [], PipelineRun.finish, PipelineRun.execute

    def execute_and_count(run, action):
        execute(run, action)
        pending.append(len(run.pending_sends))

    def finish_and_count(run):
        finish(run)
        pending.append(len(run.pending_sends))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineRun, "execute", execute_and_count)
        patch.setattr(PipelineRun, "finish", finish_and_count)
        job.run(pairs_of(8), cross_entropy(48))
    assert max(pending) == IN_FLIGHT
    assert pending[-1] == 0


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_peak_memory_grows_with_the_microbatches_under_gpipe_and_not_under_1f1b(mesh):
    def peak(schedule, m):
        job = dist_lab.parallelize(mlp(layers=8), mesh, "pp", schedule=schedule)
        job.run(pairs_of(m, rows=4 * m), cross_entropy(m))  # allocates what stays: gradients
        for p in job.parameters():
            p.grad.zero_()
        with LiveBytes(job.parameters()) as live:
            job.run(pairs_of(m, rows=4 * m), cross_entropy(m))
        return live.peak

    few, many = ({s: peak(s, m) for s in ("gpipe", "1f1b")} for m in (4, 8))
    inputs = 2 * 16 * 6 * 8  # of four more micro-batches, allocated by the test itself
    one = (many["gpipe"] - few["gpipe"] - inputs) / 4
    assert one > 40_000
    assert many["1f1b"] - few["1f1b"] <= inputs + one / 4


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_evaluation_gives_every_rank_the_loss_of_one_process(schedule, mesh):
    plain = gpt(layers=4)
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule=schedule)
    val = job.evaluate(pairs_of(5), cross_entropy(48))  # any number, of unequal rows
    with torch.no_grad():
        x, y = batch(0)
        expected = float(dist_lab.cross_entropy_sum(plain(x), y) / 48)
    assert val == pytest.approx(expected, rel=1e-12)
    assert job.run(pairs_of(4), cross_entropy(48)) == pytest.approx(expected, rel=1e-12)
    assert all(p.grad is not None for p in job.model.parameters())


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_full_state_dicts_have_all_names_of_the_model(mesh):
    other = gpt(layers=4, tied=True, seed=1)
    job = dist_lab.parallelize(gpt(layers=4, tied=True), mesh, "pp")
    names = list(other.state_dict())
    assert set(job.model.state_dict()) < set(names)
    job.load_full_state_dict(other.state_dict())
    full = job.full_state_dict()
    assert list(full) == names
    for name, value in other.state_dict().items():
        assert torch.equal(full[name], value), name
    with pytest.raises(UserError, match=r"1 names do not match, first: lm_head.weight is missing"):
        job.load_full_state_dict({n: t for n, t in full.items() if n != "lm_head.weight"})


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_tied_tensors_stay_equal_on_both_stages(mesh):
    # Trap 9: two parameters that nobody synchronizes.
    job = dist_lab.parallelize(gpt(layers=4, tied=True), mesh, "pp")
    optimizer = job.optimizer(torch.optim.AdamW, lr=0.1)
    for step in range(3):
        job.run(pairs_of(4, step=step), cross_entropy(48))
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    name = {0: "model.embed_tokens.weight", 2: "lm_head.weight"}.get(mesh.rank)
    weight = job.model.get_parameter(name).detach() if name else torch.zeros(VOCAB, 32).double()
    weights = dist_lab.comm.ops.all_gather(weight[None], mesh["pp"])
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], gpt(tied=True).state_dict()["lm_head.weight"])


class Skips(nn.Module):
    """The last layer reads the output of the first layer, and a mask, across all other stages."""

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


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(4, mesh={"pp": 4})
def test_values_that_skip_stages_are_passed_through(schedule, mesh):
    def build_model():
        torch.manual_seed(0)
        return Skips().double()

    report = dist_lab.verify(
        build_model, lambda step: batch(step), mesh, "pp", schedule=schedule, microbatches=4,
        example_inputs=batch(0)[0][:2],
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.slow_unless(lambda schedule: schedule in ("interleaved", "zb"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_frozen_unused_and_tied_parameters_under_every_schedule(schedule, mesh):
    report = dist_lab.verify(
        odd, lambda step: batch(step), mesh, "pp", schedule=schedule, microbatches=2,
        example_inputs=batch(0)[0][:2],
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.slow_unless(lambda schedule: schedule == "zbv")
@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_param_dtype_bfloat16_computes_and_sends_bfloat16(schedule, mesh):
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
def test_a_rank_sends_as_many_elements_as_the_docstring_says(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", balance="count")
    with mesh.comm.ledger.recording() as calls:
        job.run(pairs_of(4), cross_entropy(48))
    sent = sum(call.sent for call in calls if call.op == "send")
    sides = (mesh.rank > 0) + (mesh.rank < 3)
    assert sent == sides * 8 * 6 * 32 * 8  # m micro-batches are the batch: B T D doubles a side


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_schedule_from_a_file_is_checked_and_run(mesh, tmp_path):
    # 1f1b with one more warm-up forward on the first rank.
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
def test_the_timeline_has_all_actions_of_the_run_in_their_order(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule="zb", emulate_compute=5.0)
    job.run(pairs_of(4), cross_entropy(48))
    rows = job.timeline()
    expected = [[str(a) for a in r if len(a.op.value) == 1] for r in make("zb", 2, 4).ranks]
    assert [[str(timed.action) for timed in row] for row in rows] == expected
    assert min(row[0].start for row in rows) == 0.0
    for row in rows:
        assert all(timed.end - timed.start > 4.999 for timed in row)  # milliseconds
        assert all(a.end <= b.start for a, b in pairwise(row))
    assert rows[1][0].start >= rows[0][0].end  # stage 1 waits for the output of stage 0


# --- models with shared or in-place layers --------------------------------------------------------


def width_six():
    return nn.Linear(6, 6)


def one_relu_twice():
    relu = nn.ReLU()
    return nn.Sequential(width_six(), relu, width_six(), relu)


def one_linear_twice():
    linear = width_six()
    return nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh())


def in_place_across_stages():
    return nn.Sequential(width_six(), nn.BatchNorm1d(6), nn.ReLU(inplace=True), width_six())


class Scaled(nn.Module):
    """Holds a parameter directly, and contains a layer that is used elsewhere too."""

    def __init__(self, inner):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(())), inner

    def forward(self, x):
        return self.inner(x) * self.scale


def linear_inside_a_split_module():
    linear = width_six()
    return nn.Sequential(width_six(), nn.Tanh(), nn.Sequential(linear, Scaled(linear)), nn.Tanh())


class Aliased(nn.Module):
    """A model in which one block has a second name that the forward does not use."""

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
        one_relu_twice, one_linear_twice, in_place_across_stages,
        linear_inside_a_split_module, Aliased,
    ],
)  # fmt: skip
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_models_with_shared_or_in_place_layers_equal_one_process(build, schedule, mesh):
    if build is Aliased and schedule == "zbv":
        pytest.skip("it has two blocks, zbv four stages")

    def build_model():
        torch.manual_seed(0)
        return build().double()

    report = dist_lab.verify(
        build_model, rows_of_six, mesh, "pp", schedule=schedule, microbatches=2, loss_sum=squares,
        balance="count",
    )  # fmt: skip
    assert report.equal, report.sentence()  # buffers too, under all their names


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_block_with_two_names_is_on_its_stage_only(mesh):
    job = dist_lab.parallelize(Aliased(), mesh, "pp")
    assert sum(p.numel() for p in job.parameters()) == 6 * 6 + 6 + 6 + 6


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_evaluation_takes_one_row_on_which_batchnorm_could_not_train(mesh):
    # The shapes between stages are found in the mode of the run, train or eval.
    torch.manual_seed(0)
    model = nn.Sequential(width_six(), nn.BatchNorm1d(6), nn.Tanh(), width_six()).double()
    plain = copy.deepcopy(model).eval()
    job = dist_lab.parallelize(model, mesh, "pp", balance="count")
    x, y = rows_of_six(0, rows=1)
    with torch.no_grad():
        expected = float(squares(plain(x), y))
    assert job.evaluate([(x, y)], squares) == pytest.approx(expected, rel=1e-12)


class ToFloat(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_float32_value_between_stages_is_not_cast_to_param_dtype(mesh):
    # One process casts the model's inputs and nothing after them.
    model = nn.Sequential(width_six(), ToFloat(), nn.Identity(), nn.Tanh())
    job = dist_lab.parallelize(model, mesh, "pp", param_dtype=torch.bfloat16, balance="count")
    dtypes = []

    def loss(out, y):
        dtypes.append(out.dtype)
        return squares(out, y)

    job.run([rows_of_six(0, dtype=torch.float32)], loss)
    assert dtypes == [torch.float32] * mesh.rank  # only the last stage computes a loss


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.ranks(3, mesh={"pp": 3})
def test_more_stages_than_blocks_are_refused_with_the_numbers(mesh):
    with pytest.raises(UserError, match="3 stages are more than the 2 blocks of GPT"):
        dist_lab.parallelize(gpt(), mesh, "pp")


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_unsupported_calls_and_options_are_refused_with_the_fix(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp")
    with pytest.raises(UserError, match=r"call job.run\(microbatches, loss_fn\)"):
        job.model(batch(0)[0])
    with pytest.raises(UserError, match="no option bucket_mb; it takes schedule, chunks"):
        dist_lab.parallelize(gpt(layers=4), mesh, "pp", bucket_mb=1)
    with pytest.raises(
        UserError, match="has no `stages`, and to split its graph pp needs an input"
    ):
        dist_lab.parallelize(odd(), mesh, "pp")
    with pytest.raises(UserError, match="recompute needs a backward in one piece, but schedule zb"):
        model = gpt(layers=4)
        dist_lab.parallelize(model, mesh, "pp", schedule="zb", units=model.units, recompute=1)
    with pytest.raises(UserError, match="3 do not divide by 2 ranks of pp"):
        job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule="interleaved")
        job.run(pairs_of(3), cross_entropy(48))


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_second_run_onto_complete_gradients_is_refused(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp")
    job.run(pairs_of(2), cross_entropy(48))
    with pytest.raises(UserError, match="backward on gradients that hold their last micro-batch"):
        job.run(pairs_of(2), cross_entropy(48))
    job.finish()
    with pytest.raises(UserError, match="without a backward since the last one"):
        job.finish()


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_a_copy_of_the_model_has_its_original_forwards(mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp", schedule="zb")
    job.run(pairs_of(2), cross_entropy(48))
    copied = copy.deepcopy(job.model)
    assert not any("SplitForward" in type(m.forward).__name__ for m in copied.modules())


@pytest.mark.ranks(1, mesh={"pp": 1})
def test_every_schedule_runs_on_one_rank(mesh):
    for schedule in SCHEDULES:
        report = dist_lab.verify(
            lambda: gpt(layers=4), lambda step: batch(step), mesh, "pp",
            schedule=schedule, microbatches=3, steps=1,
        )  # fmt: skip
        assert report.equal, report.sentence()


def test_pp_runs_without_a_process_group():
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
def test_models_that_cannot_be_split_faithfully_are_refused(mesh):
    x, _ = rows_of_six(0, dtype=torch.float32)
    with pytest.raises(UserError, match="in sequence, do not compute what its forward computes"):
        dist_lab.parallelize(Forgets(), mesh, "pp", example_inputs=x)
    with pytest.raises(UserError, match=r"its forward reads self\.training"):
        dist_lab.parallelize(Asks(), mesh, "pp", example_inputs=x)
    with pytest.raises(UserError, match="or a complex tensor, which cannot be sent"):
        model = nn.Sequential(width_six(), Complex(), nn.Identity(), nn.Identity())
        dist_lab.parallelize(model, mesh, "pp", example_inputs=x, balance="count")
    with pytest.raises(UserError, match="does not split rows over ranks, so sync_batchnorm"):
        model = in_place_across_stages()
        dist_lab.parallelize(model, mesh, "pp", sync_batchnorm=True)
    job = dist_lab.parallelize(gpt(layers=4), mesh, "pp")
    with torch.no_grad(), pytest.raises(UserError, match=r"gradients, which are off here; call"):
        job.run(pairs_of(2), cross_entropy(48))
