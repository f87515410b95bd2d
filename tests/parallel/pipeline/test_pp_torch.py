"""PyTorch's pipelining as the twin of ours: it equals one process and ours, and refuses the rest.

Each case that is refused or repaired was tried in torch 2.13 with `PipelineStage` alone: it ended
in an exception, an abort, or a wrong number.
"""

from contextlib import nullcontext

import pytest
import torch
from models import IMAGE, VOCAB, batch, images, resnet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dist_lab
from dist_lab import zoo
from dist_lab.errors import UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.observe.flops import OPERATIONS
from dist_lab.parallel.pipeline import pp_torch
from dist_lab.parallel.pipeline.library_stages import StageForward
from dist_lab.parallel.pipeline.stages import StageInput
from dist_lab.parallel.schedules.check import check
from dist_lab.parallel.schedules.library import make
from dist_lab.step.protocol import Sync

pytestmark = pytest.mark.slow  # tests/programs/verify/test_parity.py has a quick row

SCHEDULES = tuple(pp_torch.LIBRARY_NAMES)
MICROBATCHES = {1: 2, 2: 4, 3: 6, 4: 4}  # ranks -> micro-batches


def gpt(tied=False, dtype=torch.float64, layers=6):
    shape = {"layers": layers, "width": 24, "heads": 4, "kv_heads": 2, "ffn": 32}
    return zoo.build("gpt", "tiny", vocab=VOCAB, seed=0, dtype=dtype, tied=tied, **shape)


def vit():
    shape = {"layers": 6, "width": 24, "heads": 4, "ffn": 40, "patch": 4}
    return zoo.build("vit", "tiny", vocab=VOCAB, image=IMAGE, seed=0, dtype=torch.float64, **shape)


def ranks(size, **options):
    return pytest.mark.ranks(size, mesh={"pp": size}, **options)


def microbatches(rows, count, step=0):
    """`count` micro-batches."""
    x, y = batch(step, rows)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def mean_over(total):
    return lambda output, targets: cross_entropy_sum(output, targets) / total


def equal_or_why(build, mesh, schedule, count, data=batch, **options):
    report = dist_lab.verify(
        build, lambda step: data(step, 2 * count), mesh, "pp", "torch", schedule=schedule,
        microbatches=count, steps=2, **options,
    )  # fmt: skip
    return report.equal or report.sentence()


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tied", "schedule"),
    [
        pytest.param(*row, schedule, marks=ranks(row[0]))
        for row in ((1, True), (2, False), (3, True), (3, False), (4, True))
        for schedule in SCHEDULES
    ],
)
def test_each_schedule_equals_one_process(size, tied, schedule, mesh):
    layers = size * (2 if schedule in ("interleaved", "zbv") else 1)
    assert (
        equal_or_why(lambda: gpt(tied, layers=layers), mesh, schedule, MICROBATCHES[size]) is True
    )


@pytest.mark.slow_unless(lambda schedule: schedule == "1f1b")
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(3)
def test_hand_and_twin_are_equal(schedule, mesh):
    results = []
    for impl in ("hand", "torch"):
        job = dist_lab.parallelize(gpt(tied=True), mesh, "pp", impl, schedule=schedule)
        optimizer = job.optimizer(torch.optim.AdamW, lr=1e-3)
        numbers = []
        for step in range(2):
            numbers.append(job.run(microbatches(12, 6, step), mean_over(72)))
            job.finish()
            numbers.append(job.clip_grad_norm(1.0))
            optimizer.step()
            job.after_step()
            optimizer.zero_grad()
        results.append((numbers, job.full_state_dict()))
    (our_numbers, our_weights), (their_numbers, their_weights) = results
    assert their_numbers == pytest.approx(our_numbers, rel=1e-12)
    for name, weight in our_weights.items():
        assert torch.allclose(their_weights[name], weight, rtol=0, atol=1e-12), name


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(3)
def test_a_vision_transformer_equals_one_process(schedule, mesh):
    assert equal_or_why(vit, mesh, schedule, 3, images) is True


@pytest.mark.slow_unless(lambda schedule: schedule == "zb")
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(2)
def test_a_traced_model_equals_one_process(schedule, mesh):
    example = images(0, 2)[0]
    assert equal_or_why(resnet, mesh, schedule, 4, images, example_inputs=example) is True


@pytest.mark.slow_unless(lambda schedule: schedule == "1f1b")
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@ranks(2)
def test_param_dtype_bfloat16_equals_one_process(schedule, mesh):
    def build():
        return gpt(dtype=torch.float32)

    assert equal_or_why(build, mesh, schedule, 4, param_dtype=torch.bfloat16) is True


@pytest.mark.slow_unless(lambda schedule, count: (schedule, count) == ("zb", 1))
@pytest.mark.parametrize(
    ("schedule", "count"),
    [("gpipe", 1), ("gpipe", 5), ("1f1b", 7), ("zb", 1), ("zb", 2), ("zb", 5), ("zbv", 1),
     ("zbv", 2), ("zbv", 7)],
)  # fmt: skip
@ranks(3)
def test_every_number_of_microbatches_that_is_accepted_equals_one_process(schedule, count, mesh):
    assert equal_or_why(gpt, mesh, schedule, count) is True


@pytest.mark.slow
@ranks(2)
def test_three_stages_per_rank_equal_one_process(mesh):
    assert equal_or_why(gpt, mesh, "interleaved", 4, chunks=3) is True


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb", "zbv"])
@ranks(2)
def test_the_number_and_shape_of_microbatches_may_change_between_steps(schedule, mesh):
    jobs = [
        dist_lab.parallelize(gpt(), mesh, "pp", impl, schedule=schedule)
        for impl in ("hand", "torch")
    ]
    for rows, count in ((8, 4), (8, 2), (16, 4), (24, 6), (8, 4), (4, 4), (8, 4)):
        numbers = []
        for job in jobs:
            numbers.append([job.run(microbatches(rows, count), mean_over(rows)), 0.0])
            job.finish()
            numbers[-1][1] = job.clip_grad_norm(None)
            job.model.zero_grad()
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-12)


class Transposed(nn.Module):
    """Its output is not contiguous, and neither is its input's gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        return torch.tanh(self.linear(x.mT.contiguous().mT)).transpose(0, 1)


class Viewed(Transposed):
    """Its output is a view, and it transposes its input."""

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).view(x.shape[1], x.shape[0], 3, 4)


class Twice(Transposed):
    """Applies its weights twice in sequence."""

    def forward(self, x):
        x = x.flatten(2)
        return x + self.linear(torch.tanh(self.linear(x)))


class OddLayouts(nn.Module):
    stages = ("embed", "transposed", "viewed", "twice", "head")

    def __init__(self, frozen=()):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12)
        self.transposed, self.viewed, self.twice = Transposed(), Viewed(), Twice()
        self.head = nn.Linear(12, VOCAB)
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x):
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x


def odd_layouts(frozen=()):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OddLayouts(frozen).double()


@pytest.mark.slow  # below, some of its layers are frozen
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb"])
@ranks(4)
def test_stage_outputs_may_be_views_or_not_contiguous(schedule, mesh):
    assert equal_or_why(odd_layouts, mesh, schedule, 4, balance="count") is True


@pytest.mark.slow_unless(lambda schedule, frozen: schedule == "zb" and "viewed" in frozen)
@pytest.mark.parametrize("frozen", [("embed", "transposed"), ("viewed",), ("twice", "head")])
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@ranks(4)
def test_layers_may_be_frozen(schedule, frozen, mesh):
    assert equal_or_why(lambda: odd_layouts(frozen), mesh, schedule, 4, balance="count") is True


@pytest.mark.slow_unless(lambda schedule: schedule in ("1f1b", "zbv"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(2)
def test_batchnorm_counts_each_microbatch_once(schedule, mesh):
    example, target = images(0, 8)
    job = dist_lab.parallelize(
        resnet(), mesh, "pp", "torch", schedule=schedule, example_inputs=example[:2]
    )
    job.run(list(zip(example.split(2), target.split(2), strict=True)), mean_over(8))
    counts = [v for k, v in job.full_state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 4 for count in counts)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "zb", "zbv"])
@ranks(2)
def test_flop_counter_mode_counts_as_many_operations_as_for_ours(schedule, mesh):
    counts = []
    for impl in ("hand", "torch"):
        job = dist_lab.parallelize(gpt(), mesh, "pp", impl, schedule=schedule)
        job.run(microbatches(8, 4), mean_over(48))  # the first run also finds the shapes
        job.finish()
        job.model.zero_grad()
        # torch's own counter, as users use it: unlike ours it puts hooks on all modules.
        with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as count:
            job.run(microbatches(8, 4), mean_over(48))
        counts.append(count.get_total_flops())
    assert counts[0] == counts[1]


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(3)
def test_evaluate_gives_the_global_loss_on_every_rank(schedule, mesh):
    job = dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule=schedule)
    x, y = batch(7, 30)
    with torch.no_grad():
        expected = float(cross_entropy_sum(gpt()(x), y) / y.numel())
    norms = []
    for _ in range(2):  # evaluation does not change the step between
        for count in (15, 3):  # several groups of one per rank, and one
            loss = job.evaluate(microbatches(30, count, 7), mean_over(y.numel()))
            assert loss == pytest.approx(expected, rel=1e-12)
        job.run(microbatches(12, 6), mean_over(72))
        job.finish()
        norms.append(job.clip_grad_norm(None))
        job.model.zero_grad()
    assert norms[1] == norms[0]


@pytest.mark.slow_unless(lambda schedule: schedule == "1f1b")
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(3)
def test_evaluate_takes_fewer_microbatches_than_ranks_and_several_shapes(schedule, mesh):
    job = dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule=schedule)
    x, y = batch(7, 4)
    with torch.no_grad():
        expected = float(cross_entropy_sum(gpt()(x), y) / y.numel())
    even, uneven = microbatches(4, 2, 7), [(x[:3], y[:3]), (x[3:], y[3:])]
    assert job.evaluate(even, mean_over(y.numel())) == pytest.approx(expected, rel=1e-12)
    assert job.evaluate(uneven, mean_over(y.numel())) == pytest.approx(expected, rel=1e-12)


# --- events and description -----------------------------------------------------------------------


class ReadyGradients(Sync):
    def __init__(self):
        self.names = []

    def grads_ready(self, names, *, last):
        self.names += names if last else ()


@pytest.mark.slow_unless(lambda schedule: schedule == "interleaved")
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(2)
def test_each_gradient_is_reported_complete_once(schedule, mesh):
    job = dist_lab.parallelize(gpt(tied=True), mesh, "pp", "torch", schedule=schedule)
    ready = ReadyGradients()
    with job.listening(ready):
        job.run(microbatches(8, 4), mean_over(48))
    assert sorted(ready.names) == sorted(name for name, _ in job.model.named_parameters())


@ranks(2)
def test_about_names_the_librarys_schedule_and_options(mesh):
    jobs = [dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule=s) for s in ("zb", "zbv")]
    assert [job.about for job in jobs] == [
        "torch ScheduleInterleavedZeroBubble, one stage a rank, shapes known, scale_grads=False",
        "torch ScheduleZBVZeroBubble, 2 stages a rank, shapes known, scale_grads=False",
    ]
    assert all(row == [] for job in jobs for row in job.timeline())


@pytest.mark.slow_unless(lambda schedule: schedule in ("interleaved", "zbv"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@ranks(3)
def test_the_librarys_schedule_is_ours_except_for_the_order_of_zbv(schedule, mesh):
    job = dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule=schedule)
    theirs, ours = job._runner.pipeline.schedule_for(6), make(schedule, 3, 6)
    check(theirs)
    assert theirs.rank_of == ours.rank_of
    assert (theirs.ranks == ours.ranks) == (schedule != "zbv")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda schedule: schedule == "1f1b")
@pytest.mark.parametrize(
    ("schedule", "count", "message"),
    [
        ("1f1b", 3, "PyTorch's 1f1b takes at least one micro-batch per rank, 4, not 3"),
        ("interleaved", 6, "interleaved takes micro-batches in groups of one per rank, but 6"),
        ("zb", 9, "PyTorch's zero bubble takes micro-batches in 2 equal rounds of at least 4"),
    ],
)
@ranks(4)
def test_a_number_of_microbatches_that_the_library_does_not_take_is_refused(
    schedule, count, message, mesh
):
    job = dist_lab.parallelize(gpt(layers=8), mesh, "pp", "torch", schedule=schedule)
    with pytest.raises(UserError, match=message):
        job.run(microbatches(2 * count, count), mean_over(12 * count))
    assert job.run(microbatches(8, 4), mean_over(48)) > 0  # no message was left over


@ranks(2)
def test_microbatches_of_several_shapes_are_refused(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule="gpipe")
    longer, empty = batch(0, 2, seq=7), batch(0, 0)
    for odd, message in (
        (microbatches(7, 3), "these have 2 and 3 rows, in 2 shapes"),
        ([batch(0, 2), longer], "these have 2 rows, in 2 shapes"),
        ([empty, empty], "these have 0 rows, in 1 shapes"),
        ([], "these have no rows, in 0 shapes"),
    ):
        with pytest.raises(UserError, match=message):
            job.run(odd, mean_over(42))
    assert job.run(microbatches(8, 4), mean_over(48)) > 0


@ranks(2)
def test_a_schedule_from_a_file_and_stages_that_do_not_fit_are_refused(mesh):
    for schedule in ("schedule.csv", "1f2b"):
        with pytest.raises(UserError, match=r"runs schedules by name, not '.*give gpipe, 1f1b"):
            dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule=schedule)
    with pytest.raises(UserError, match="schedule zb has 1 stage a rank, not 2"):
        dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule="zb", chunks=2)


def test_without_a_process_group_it_is_refused():
    with pytest.raises(UserError, match="needs a process group, even for one: torchrun"):
        dist_lab.parallelize(gpt(), dist_lab.init_mesh(), "pp", "torch")


class Aside(nn.Module):
    """A middle stage computes a value from the model's input only, and the last stage reads it."""

    def __init__(self):
        super().__init__()
        self.embed, self.aside = nn.Embedding(VOCAB, 12), nn.Embedding(VOCAB, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))
        self.head = nn.Linear(12, VOCAB)

    def forward(self, tokens):
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == 2:
                aside = self.aside(tokens)
        return self.head(x + aside)


def aside():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Aside().double()


@ranks(3)
def test_a_gradient_that_the_zero_bubble_would_lose_is_refused(mesh):
    options = {"balance": "count", "example_inputs": batch(0, 2)[0]}
    assert equal_or_why(aside, mesh, "1f1b", 3, **options) is True
    with pytest.raises(
        UserError, match="has an output that depends on its weights alone, and PyTorch's"
    ):
        dist_lab.parallelize(aside(), mesh, "pp", "torch", schedule="zb", **options)


def test_a_stage_with_another_output_shape_than_on_the_meta_device_is_refused():
    class DataDependent(nn.Module):
        def forward(self, x):
            return (x[x > 0],)

    shapes = [StageInput(torch.Size([2, 3]), torch.float32)]
    stage = StageForward(1, DataDependent(), shapes, [], lambda stage: nullcontext())
    with pytest.raises(UserError, match=r"stage 1 returns float32\[6\], but on the meta device"):
        stage(torch.ones(2, 3))


@ranks(1)
def test_a_user_error_in_a_stage_is_raised_unwrapped_and_the_next_step_works(mesh):
    job = dist_lab.parallelize(gpt(), mesh, "pp", "torch", schedule="zb")
    expected = job.run(microbatches(4, 2), mean_over(24))
    job.finish()
    job.model.zero_grad()

    def refuse(module, args):
        raise UserError("no layer for this")

    handle = job.model.get_submodule("model.layers.3").register_forward_pre_hook(refuse)
    with pytest.raises(UserError, match="no layer for this"):
        job.run(microbatches(4, 2), mean_over(24))
    handle.remove()
    job.model.zero_grad()
    assert job.run(microbatches(4, 2), mean_over(24)) == pytest.approx(expected, rel=1e-12)
