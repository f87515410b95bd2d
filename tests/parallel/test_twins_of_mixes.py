"""Mixes of strategies by torch: equal to one process and to ours, or refused with torch's reason.

Most refusals were tried in torch 2.13 without them: the gradients or weights were wrong, without an
error, or the library raised one of its own. Three follow from its source: zbv with tied weights,
find_unused in low precision, and reductions that are not deferred.
"""

import pytest
import torch
from models import VOCAB, batch, gpt
from torch import nn

import dist_lab
from dist_lab import zoo
from dist_lab.errors import UserError
from dist_lab.programs.cli.mixes import UNMIXABLE, IllegalMix, check_impl

pytestmark = pytest.mark.slow  # each twin alone has its own file

FSDP_TP, HSDP_TP = {"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 1, "tp": 2}
PP_TP, PP_FSDP, PP_DP = {"pp": 2, "tp": 2}, {"pp": 2, "fsdp": 2}, {"pp": 2, "dp": 2}
PP_HSDP, PP_FSDP_TP = {"pp": 2, "dp": 2, "fsdp": 2}, {"pp": 2, "fsdp": 2, "tp": 2}
HSDP_TP_8 = {"dp": 2, "fsdp": 2, "tp": 2}
MESHES = {
    "fsdp x tp": FSDP_TP, "hsdp x tp": HSDP_TP, "pp x tp": PP_TP, "pp x fsdp": PP_FSDP,
    "pp x ddp": PP_DP, "pp x zero1": PP_DP, "pp x hsdp": PP_HSDP, "pp x fsdp x tp": PP_FSDP_TP,
    "hsdp x tp on 8": HSDP_TP_8,
}  # fmt: skip
BLOCKS = [f"model.layers.{i}" for i in range(4)]
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb", "zbv")
TOKENS = 16 * 6


def ranks(mix):
    axes = MESHES[mix]
    size = torch.Size(axes.values()).numel()
    return pytest.mark.ranks(size, mesh=axes, timeout=120 if size == 4 else 240)


def on(mix, *values):
    return pytest.param(mix, *values, id=" ".join(map(str, (mix, *values))), marks=ranks(mix))


def strategy_of(mix):
    return "zero1" if "zero1" in mix else None


def tp_of(mix, sequence_parallel):
    return {"sequence_parallel": True} if sequence_parallel and "tp" in mix else {}


def share(output, targets):
    return dist_lab.cross_entropy_sum(output, targets) / TOKENS


def pairs_of(mesh, step=0, count=4):
    data = mesh.data
    x, y = (t.tensor_split(data.size)[data.index] for t in batch(step, rows=16))
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def equal_or_why(mix, mesh, *, tied, sequence_parallel=False, rows=16, **options):
    layers, microbatches = (4, 4) if "pp" in mix else (2, 2)
    report = dist_lab.verify(
        lambda: gpt(tied=tied, layers=layers), lambda step: batch(step, rows), mesh,
        strategy_of(mix), "torch", units=BLOCKS[:layers], microbatches=microbatches, steps=3,
        **tp_of(mix, sequence_parallel), **options,
    )  # fmt: skip
    return report.equal or report.sentence()


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"tp": 2})
def test_tp_with_sequence_parallelism_equals_one_process(mesh):
    assert equal_or_why("tp", mesh, tied=False, sequence_parallel=True) is True


IN_SLOW = {
    ("fsdp x tp", True, True), ("hsdp x tp", True, False), ("hsdp x tp on 8", False, True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.nightly_unless(
    lambda mix, sequence_parallel, tied: (mix, sequence_parallel, tied) in IN_SLOW
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("mix", [on("fsdp x tp"), on("hsdp x tp"), on("hsdp x tp on 8")])
def test_tp_and_fsdp_equal_one_process(mix, sequence_parallel, tied, mesh):
    assert equal_or_why(mix, mesh, tied=tied, sequence_parallel=sequence_parallel) is True


SPLIT_BACKWARD = ("zb", "zbv")


def torch_can(mix, schedule, tied):
    """See the refusals below."""
    if mix == "pp x fsdp":
        return not (schedule == "zbv" and tied)
    return mix == "pp x tp" or schedule not in SPLIT_BACKWARD


@pytest.mark.slow
@pytest.mark.nightly_unless(
    lambda mix, schedule, tied: (
        tied == (schedule != "interleaved") or (mix, schedule) == ("pp x fsdp", "zbv")
    )
)
@pytest.mark.parametrize(
    ("mix", "schedule", "tied"),
    [
        on(mix, schedule, tied)
        for mix in ("pp x tp", "pp x fsdp", "pp x ddp", "pp x zero1")
        for schedule in SCHEDULES
        for tied in (True, False)
        if torch_can(mix, schedule, tied)
    ],
)
def test_a_pipeline_with_another_strategy_equals_one_process(mix, schedule, tied, mesh):
    assert equal_or_why(mix, mesh, tied=tied, sequence_parallel=tied, schedule=schedule) is True


@pytest.mark.slow
@pytest.mark.nightly_unless(
    lambda mix, schedule: schedule == ("zb" if mix == "pp x hsdp" else "1f1b")
)
@pytest.mark.parametrize(
    ("mix", "schedule", "tied"),
    [
        on("pp x fsdp x tp", "1f1b", True), on("pp x fsdp x tp", "zb", False),
        on("pp x fsdp x tp", "interleaved", True), on("pp x fsdp x tp", "zbv", False),
        on("pp x hsdp", "1f1b", True), on("pp x hsdp", "zb", True),
    ],
)  # fmt: skip
def test_three_axes_equal_one_process(mix, schedule, tied, mesh):
    why = equal_or_why(mix, mesh, tied=tied, sequence_parallel=tied, schedule=schedule, rows=32)
    assert why is True


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"reshard_after_forward": True}, {"keep_gathered": True}, {"schedule": "interleaved",
     "reshard_after_forward": True}, {"schedule": "interleaved", "chunks": 2}],
    ids=str,
)  # fmt: skip
@ranks("pp x fsdp")
def test_each_way_to_keep_a_stage_gathered_equals_one_process(options, mesh):
    assert equal_or_why("pp x fsdp", mesh, tied=False, **options) is True


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda mix: mix != "pp x tp")
@pytest.mark.parametrize("mix", [on(m) for m in ("fsdp x tp", "pp x tp", "pp x fsdp", "pp x ddp")])
def test_param_dtype_bfloat16_equals_one_process(mix, mesh):
    report = dist_lab.verify(
        lambda: gpt(torch.float32), lambda step: batch(step, rows=16), mesh, None, "torch",
        units=BLOCKS[:2], microbatches=4, param_dtype=torch.bfloat16,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- against ours ---------------------------------------------------------------------------------


def losses_and_weights(mix, mesh, impl):
    """Two steps of two runs each, with evaluations between and after."""
    job = dist_lab.parallelize(gpt(tied=True), mesh, strategy_of(mix), impl, units=BLOCKS[:2])
    optimizer, numbers = job.optimizer(torch.optim.AdamW, lr=1e-2), []
    for step in range(2):
        pairs = pairs_of(mesh, step)
        with job.microbatch(last=False):
            numbers.append(job.run(pairs[:2], share))
        numbers.append(job.evaluate(pairs[:2], share))
        with job.microbatch(last=True):
            numbers.append(job.run(pairs[2:], share))
        job.finish()
        numbers.append(job.clip_grad_norm(0.5))
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    full = job.full_state_dict()
    job.load_full_state_dict({name: 2 * tensor for name, tensor in full.items()})
    numbers.append(job.evaluate(pairs[:2], share))
    return numbers, full


@pytest.mark.slow_unless(lambda mix: mix == "pp x fsdp")
@pytest.mark.nightly_unless(lambda mix: mix not in ("hsdp x tp", "pp x fsdp x tp"))
@pytest.mark.parametrize(
    "mix",
    [on(m) for m in MESHES if torch.Size(MESHES[m].values()).numel() == 4] + [on("pp x fsdp x tp")],
)
def test_hand_and_twin_have_the_same_losses_norms_and_weights(mix, mesh):
    ours, our_weights = losses_and_weights(mix, mesh, "hand")
    theirs, their_weights = losses_and_weights(mix, mesh, "torch")
    assert theirs == pytest.approx(ours, rel=1e-11)
    assert list(their_weights) == list(our_weights)
    for name, weight in our_weights.items():
        torch.testing.assert_close(their_weights[name], weight, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mix", [on(m) for m in ("fsdp x tp", "pp x tp", "pp x fsdp", "pp x ddp")])
def test_a_model_on_the_meta_device_starts_alike_by_hand_and_library(mix, mesh):
    full = []
    for impl in ("hand", "torch"):
        with torch.device("meta"):
            model = zoo.build("gpt", "tiny", vocab=VOCAB, seed=0, tied=True)
        job = dist_lab.parallelize(model, mesh, None, impl, units=BLOCKS[:1], seed=3)
        assert not any(p.is_meta for p in job.parameters())
        full.append(job.full_state_dict())
    assert full[0].keys() == full[1].keys()
    assert all(torch.equal(full[0][name], full[1][name]) for name in full[0])


# --- what a twin says, and steps that go wrong ----------------------------------------------------


@ranks("pp x fsdp")
def test_about_says_what_is_sharded_and_that_a_stage_stays_gathered(mesh):
    job = dist_lab.parallelize(gpt(), mesh, None, "torch", units=BLOCKS[:2])
    assert job.about.startswith(
        "torch Schedule1F1B, one stage a rank, shapes known, scale_grads=False, torch fully_shard "
        "of 1 units and each stage(mesh=(2,), reshard_after_forward=False"
    )


@pytest.mark.slow_unless(lambda mix, schedule: (mix, schedule) == ("pp x ddp", "1f1b"))
@pytest.mark.parametrize(
    ("mix", "schedule"),
    [on(m, s) for m in ("pp x ddp", "pp x fsdp") for s in ("1f1b", "interleaved")],
)
def test_after_refused_runs_and_without_an_optimizer_the_next_run_is_right(mix, schedule, mesh):
    job = dist_lab.parallelize(gpt(layers=4), mesh, None, "torch", schedule=schedule, units=BLOCKS)
    pairs = pairs_of(mesh)
    loss = job.run(pairs, share)
    job.finish()
    norm = job.clip_grad_norm(None)
    with pytest.raises(UserError, match="backward on gradients that hold"):
        job.run(pairs, share)
    for _ in range(2):
        job.model.zero_grad()
        x, y = batch(0, rows=8)
        uneven = [(x[:3], y[:3]), (x[3:], y[3:])] if mesh.data.index == 0 else pairs
        with pytest.raises(UserError, match="micro-batches of one shape"):  # on every rank
            job.run(uneven, share)
        assert job.run(pairs, share) == pytest.approx(loss, rel=1e-12)
        job.finish()
        assert job.clip_grad_norm(None) == pytest.approx(norm, rel=1e-12)


class SoftmaxOverShards(nn.Module):
    """A plan that shards `a` is wrong: the softmax needs all its outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8).double(), nn.Linear(8, 5).double()

    def forward(self, x):
        return self.b(torch.softmax(self.a(x), -1))


@pytest.mark.slow_unless(lambda units: not units)
@pytest.mark.parametrize("units", [[], ["a"]], ids=str)
@ranks("fsdp x tp")
def test_a_wrong_plan_is_refused_before_the_first_forward(units, mesh):
    plan = {"a": "colwise", "b": "rowwise"}
    job = dist_lab.parallelize(SoftmaxOverShards(), mesh, None, "torch", plan=plan, units=units)
    with pytest.raises(UserError, match="plan"):
        job.model(torch.rand(4, 6, dtype=torch.float64))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", UNMIXABLE)
def test_a_pair_that_torch_cannot_mix_is_refused_with_its_reason(pair):
    with pytest.raises(IllegalMix, match=r'by torch: its (Distrib|ZeroRed).*give impl="hand"'):
        check_impl(pair, "torch")
    check_impl(pair, "hand")


def refused(mesh, message, tied=False, strategy=None, **options):
    with pytest.raises(UserError, match=message):
        dist_lab.parallelize(gpt(layers=4, tied=tied), mesh, strategy, "torch", **options)


@pytest.mark.slow_unless(lambda strategy: strategy == "ddp")
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
@ranks("pp x ddp")
def test_zero_bubble_is_refused_with_ddp_as_it_would_not_sum_gradients(strategy, mesh):
    refused(mesh, "calls no hook of Distr", strategy=strategy, schedule="zb")


@ranks("pp x fsdp")
def test_what_fsdp2_cannot_do_in_a_pipeline_is_refused_on_every_rank(mesh):
    refused(mesh, "reduces a stage's gradients once", defer_reduce=False)
    refused(mesh, "find_unused only without", find_unused=True, param_dtype=torch.bfloat16)
    refused(mesh, "has put shards in their pl", schedule="zb", reshard_after_forward=True)
    refused(mesh, "FSDP2 would untie model.embed_tokens.weight", tied=True, schedule="zbv")
