"""The sentinel: one element, one number or one generator that differs stops the run by name."""

import random

import pytest
import torch
from models import VOCAB, batch, gpt, images
from programs import run
from torch import nn

import dist_lab
from dist_lab.errors import ReplicasDiffer, UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import FlatShard, Layout, OnlyOn, Shard
from dist_lab.layout.replicas import replicas, same_along, without_flat
from dist_lab.programs.verify import batch as batches
from dist_lab.sentinel.digest import CHUNK, digest
from dist_lab.torch_private import of_plain_tensors

# --- who holds the same ---------------------------------------------------------------------------


def layout(*splits):
    return Layout(torch.Size([8, 6]), torch.float32, splits)


HOLDERS = {
    "ddp": (layout(), {"dp": 3}, ((0, 1, 2),)),
    "fsdp": (layout(("fsdp", Shard(0))), {"fsdp": 4}, ()),
    "hsdp": (layout(("fsdp", Shard(0))), {"dp": 2, "fsdp": 2}, ((0, 2), (1, 3))),
    "a norm under tp x fsdp": (
        layout(("fsdp", Shard(0))), {"fsdp": 2, "tp": 2}, ((0, 1), (2, 3))),
    "shared key heads": (layout(("tp", Shard(0, copies=2))), {"tp": 4}, ((0, 1), (2, 3))),
    "zero's shards": (layout(("dp", FlatShard(0, 24))), {"dp": 2, "tp": 2}, ((0, 1), (2, 3))),
    "tied stages": (layout(("pp", OnlyOn((0, 2)))), {"pp": 3}, ((0, 2),)),
    "one stage": (layout(("pp", OnlyOn((1,)))), {"pp": 2, "dp": 2}, ((2, 3),)),
    "empty shards": (layout(("fsdp", Shard(1))), {"fsdp": 12}, ()),
}  # fmt: skip


@pytest.mark.parametrize(("how", "sizes", "expected"), HOLDERS.values(), ids=HOLDERS)
def test_ranks_with_equal_boxes_hold_the_same(how, sizes, expected):
    assert replicas(how, sizes) == expected


def test_the_model_under_zero_holds_what_its_optimizer_steps_on_in_parts():
    how = layout(("pp", OnlyOn((0,))), ("dp", FlatShard(0, 24)))
    assert replicas(how, {"pp": 2, "dp": 2}) == ()
    assert replicas(without_flat(how), {"pp": 2, "dp": 2}) == ((0, 1),)


def test_ranks_at_one_position_of_the_data_axes_read_the_same_rows():
    assert same_along({"dp", "fsdp"}, {"pp": 2, "dp": 2}) == ((0, 2), (1, 3))
    assert same_along(set(), {"dp": 2}) == ((0, 1),)


# --- the digest -----------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_bit_or_two_exchanged_elements_change_the_digest(dtype):
    x = torch.arange(70_001).to(torch.uint8).fmod(2).to(dtype)
    before = digest(x)
    assert digest(x.clone()) == before
    for i in (0, 65_535, 65_536, 70_000):
        y = x.clone()
        y.view(torch.uint8)[i * dtype.itemsize] ^= 1
        assert digest(y) != before, i
    y = x.clone()
    y[[0, 1]], y[[65_536, 65_537]] = x[[1, 0]], x[[65_537, 65_536]]
    assert digest(y) != before


def test_chunks_that_have_exchanged_their_places_change_the_digest():
    x = torch.arange(2 * CHUNK)
    assert digest(torch.cat([x[CHUNK:], x[:CHUNK]])) != digest(x)


def test_a_digest_does_not_depend_on_memory_and_takes_any_shape():
    x = torch.randn(6, 5)
    assert digest(x) == digest(x.t().contiguous().t()) == digest(torch.cat([x[:1], x])[1:])
    assert digest(torch.zeros(3)) != digest(-torch.zeros(3))
    assert digest(torch.zeros(0)) == digest(torch.zeros(0, 3))
    assert isinstance(digest(x.to_sparse()), int)


# --- jobs -----------------------------------------------------------------------------------------


def norm_model():
    """A model with buffers of its own, and with running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, VOCAB)).double()
    model.register_buffer("scale", torch.ones(3, dtype=torch.float64))
    return model


class Run:
    """A job in training with a sentinel that compares at every second step."""

    def __init__(self, mesh, strategy, model=None, every=2, **options):
        units = [] if model else ["model.layers.0", "model.layers.1"]
        self.job = dist_lab.parallelize(
            model or gpt(layers=4 if mesh["pp"].size > 1 else 2, tied="pp" in options), mesh,
            strategy, units=units, **{k: v for k, v in options.items() if k != "pp"},
        )  # fmt: skip
        self.mesh, self.steps = mesh, 0
        self.optimizer = self.job.optimizer(torch.optim.AdamW, lr=1e-2)
        self.sentinel = self.job.sentinel(every)

    def step(self, before_check=lambda: None, **changes):
        self.steps += 1
        data = self.mesh.data
        own = batches.slice_rows(batch(self.steps, 8), data.size)[data.index]
        loss = self.job.run(
            batches.slice_rows(own, 2), lambda out, y: dist_lab.cross_entropy_sum(out, y) / 48
        )
        self.job.finish()
        norm = self.job.clip_grad_norm(1.0)
        self.optimizer.step()
        self.job.after_step()
        self.optimizer.zero_grad()
        before_check()
        numbers = {"loss": loss, "norm": norm, "position": 8 * self.steps, "inputs": own}
        self.sentinel.check(self.steps, self.optimizer, **numbers | changes)


def stopped(action):
    """The one line of the error that the action raises."""
    with pytest.raises(ReplicasDiffer) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAST = "all that is compared was last equal after step"
# mesh, strategy, options, what is broken, on which rank, with which rank it is compared
BROKEN = {
    "ddp": ({"dp": 2}, "ddp", {}, "model.norm.weight", 1, 0),
    "ddp of 3": ({"dp": 3}, "ddp", {}, "model.layers.1.mlp.up_proj.weight", 0, 1),
    "zero1": ({"dp": 2}, "zero1", {}, "lm_head.weight", 1, 0),
    "zero2": ({"dp": 2}, "zero2", {}, "lm_head.weight", 0, None),
    "hsdp": ({"dp": 2, "fsdp": 2}, None, {}, "model.layers.0.self_attn.o_proj.weight", 3, 1),
    "tp": ({"tp": 2}, "tp", {}, "model.layers.0.input_layernorm.weight", 1, 0),
    "tp, shared keys": ({"tp": 4}, "tp", {}, "model.layers.0.self_attn.k_proj.weight", 3, 2),
    "tied": ({"pp": 2}, "pp", {"pp": True}, "model.embed_tokens.weight", 1, 0),
    "pp x ddp": ({"pp": 2, "dp": 2}, "ddp", {}, "lm_head.weight", 3, 2),
    "fsdp x tp": ({"fsdp": 2, "tp": 2}, None, {}, "model.norm.weight", 3, 2),
    "all": ({"pp": 2, "fsdp": 2, "tp": 2}, None, {"sequence_parallel": True},
            "model.norm.weight", 5, 4),
}  # fmt: skip
USUAL = ("zero1", "tp, shared keys")


@pytest.mark.slow_unless(lambda name: name in USUAL)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.ranks(torch.Size(r[0].values()).numel()))
     for n, r in BROKEN.items()],
)  # fmt: skip
def test_one_broken_element_stops_all_ranks_by_name(name):
    axes, strategy, options, parameter, odd, other = BROKEN[name]
    training = Run(dist_lab.init_mesh(**axes), strategy, **options)
    for _ in range(2):  # nothing differs
        training.step()
    assert training.sentinel.last_equal == 2

    def break_it():
        if training.mesh.rank == odd:
            tensor = dict(training.job.model.named_parameters())[parameter].detach()
            of_plain_tensors(lambda: tensor.view(-1)[-1:].add_(1e-9))

    training.step()
    line = stopped(lambda: training.step(break_it))
    pair = (odd, other) if other is not None else (1, 0)
    start = f"step 4: {parameter} differs between rank {pair[0]} and rank {pair[1]}, which should"
    assert line.startswith(start), line
    assert f"{LAST} 2; find what changes it" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "strategy"),
    [({"dp": 2, "fsdp": 2}, None), ({"fsdp": 2, "tp": 2}, None), ({"pp": 2, "dp": 2}, "ddp"),
     ({"dp": 4}, "zero1")],
    ids=str,
)  # fmt: skip
@pytest.mark.ranks(4)
def test_under_a_librarys_strategies_replicas_are_compared_too(axes, strategy):
    training = Run(dist_lab.init_mesh(**axes), strategy, impl="torch")
    for _ in range(3):
        training.step()
    tensors = dict(training.job.model.named_parameters())
    name = next(n for n in reversed(tensors) if "norm" in n)

    def break_it():
        if training.mesh.rank == 3:
            local_part(tensors[name].detach()).view(-1)[-1:].add_(1e-9)

    line = stopped(lambda: training.step(break_it))
    assert " differs between rank 3 and rank " in line
    assert line.startswith("step 4: model.")


@pytest.mark.slow_unless(lambda axes: axes == {"dp": 2, "tp": 2})
@pytest.mark.parametrize("axes", [{"dp": 2, "tp": 2}, {"pp": 2, "dp": 2}], ids=str)
@pytest.mark.ranks(4)
def test_a_number_a_rate_a_batch_or_a_generator_that_drifts_is_named(axes):
    mesh = dist_lab.init_mesh(**axes)
    training = Run(mesh, "ddp", every=1)
    training.step()

    def own(odd, usual):
        return odd if mesh.rank == 3 else usual

    def line_of_next_step(**changes):
        step, _, line = stopped(lambda: training.step(**changes)).partition(": ")
        assert step == f"step {training.steps}"
        assert f"{LAST} 1;" in line
        return line

    line = line_of_next_step(position=own(24, 16))
    assert line.startswith(
        "position differs between rank 3 (24) and rank 0 (16), which should hold"
    )
    line = line_of_next_step(norm=own(2.5, torch.tensor(2.0)))
    assert line.startswith("norm differs between rank 3 (2.5) and rank 0 (2.0), which should hold")
    line = line_of_next_step(inputs=torch.tensor([float(mesh.data.index), own(1.0, 0.0)]))
    assert line.startswith("the batch differs between rank 3 and rank"), line
    training.optimizer.param_groups[0]["lr"] = own(2e-2, 1e-2)
    line = line_of_next_step()
    assert line.startswith("the learning rate differs between rank 3 ([0.02]) and rank"), line
    training.optimizer.param_groups[0]["lr"] = 1e-2
    line = line_of_next_step(before_check=lambda: own(torch.rand, torch.zeros)(1))
    assert line.startswith("the state of torch's random generator differs between rank 3"), line


@pytest.mark.ranks(2)
def test_buffers_are_compared_but_not_statistics_of_a_ranks_own_rows(mesh):
    job = dist_lab.parallelize(norm_model(), mesh, "ddp")
    sentinel = job.sentinel(1)
    own = [t.chunk(2)[mesh.rank] for t in (images(0)[0].flatten(1)[:, :6], images(0)[1])]
    for _ in range(2):
        job.run([own], lambda out, y: dist_lab.cross_entropy_sum(out, y) / 8)
        job.finish()
        job.model.zero_grad()
    sentinel.check(1)
    job.model.scale[1] += mesh.rank
    assert stopped(lambda: sentinel.check(2)).startswith("step 2: scale differs between rank 1 and")


@pytest.mark.ranks(2)
def test_ranks_may_have_seeds_of_their_own_and_generators_of_equal_ranks_may_not_part(mesh):
    torch.manual_seed(mesh.rank)
    random.seed(0)
    job = dist_lab.parallelize(nn.Linear(3, 3), mesh, "ddp")
    sentinel = job.sentinel(1)
    torch.rand(1 + mesh.rank)
    sentinel.check(1)
    if mesh.rank:
        random.random()
    line = stopped(lambda: sentinel.check(2))
    assert line.startswith("step 2: the state of Python's random generator differs between rank 1")
    assert "if each rank draws as many numbers as it has rows, give each a seed of its own" in line


@pytest.mark.ranks(2)
def test_what_differs_from_the_start_was_never_equal_and_the_last_step_is_always_compared(mesh):
    job = dist_lab.parallelize(nn.Linear(3, 3), mesh, "ddp")
    bias = job.model.bias.detach()
    of_plain_tensors(lambda: bias.fill_(mesh.rank))
    assert "already when the sentinel was made" in stopped(lambda: job.sentinel(50))
    of_plain_tensors(lambda: bias.fill_(0))
    sentinel = job.sentinel(50)
    of_plain_tensors(lambda: bias.fill_(mesh.rank))
    sentinel.check(1)
    assert stopped(lambda: sentinel.check(2, now=True)).startswith("step 2: bias differs")


@pytest.mark.slow
@pytest.mark.ranks(4, mesh={"pp": 2, "dp": 2})
def test_stages_may_draw_different_numbers_and_replicas_of_a_stage_may_not(mesh):
    training = Run(mesh, "ddp", every=1)
    if mesh["pp"].index:
        torch.rand(1)
    training.step()
    if mesh.rank == 2:
        torch.rand(1)
    line = stopped(training.step)
    assert line.startswith("step 2: the state of torch's random generator differs between rank 3")


@pytest.mark.slow_unless(lambda axes: axes in ({"fsdp": 2}, {"pp": 2}))
@pytest.mark.parametrize(
    ("axes", "why"),
    [({"fsdp": 2}, "are split over fsdp"), ({"pp": 2}, "are split over pp"),
     ({"pp": 2, "fsdp": 1}, "are split over pp")],
    ids=str,
)  # fmt: skip
@pytest.mark.ranks(2)
def test_a_model_that_no_two_ranks_hold_alike_is_refused_in_one_line(axes, why):
    mesh = dist_lab.init_mesh(**axes)
    with pytest.raises(UserError, match=rf"no two ranks hold .* \(model.embed.* {why}\)") as caught:
        Run(mesh, None)
    assert "\n" not in str(caught.value)


def test_one_rank_and_a_wrong_number_of_steps_are_refused():
    job = dist_lab.parallelize(nn.Linear(3, 3), dist_lab.init_mesh(), "single")
    with pytest.raises(
        UserError, match=r"no two ranks hold .* \(there is one rank\); only the step"
    ):
        job.sentinel(50)
    with pytest.raises(
        UserError, match="a sentinel compares every N steps, N >= 1; it was given 0"
    ):
        job.sentinel(0)


@pytest.mark.ranks(2)
def test_between_two_comparisons_nothing_is_sent_and_a_comparison_sends_a_few_numbers(mesh):
    training = Run(mesh, "ddp", every=3)
    total = lambda: mesh.comm.ledger.total.payload  # noqa: E731
    sent = []
    for step in range(1, 7):
        before = total()
        training.sentinel.check(step, training.optimizer, norm=1.0)
        sent.append(total() - before)
    assert sent[:2] == [0, 0]
    assert 0 < sent[2] <= 200
    assert sent == sent[:3] * 2


@pytest.mark.slow
def test_train_with_a_sentinel_is_quiet_and_refuses_in_one_line(tmp_path):
    small = "--nproc 2 --size tiny --steps 4 --batch 8 --seq 32 --sentinel 2".split()
    done = run("train.py", *small, "--strategy", "zero1", "--out", str(tmp_path / "a"))
    assert (done.returncode, done.stderr) == (0, "")
    done = run("train.py", *small, "--strategy", "fsdp", "--out", str(tmp_path / "b"))
    [line] = done.stderr.splitlines()
    assert line.startswith("train.py: error: a sentinel compares what several ranks hold alike")
    assert done.returncode == 2
