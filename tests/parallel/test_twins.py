"""Our implementations against the library's own: the same model, data and steps."""

import copy
import math
import os
import warnings
from collections import Counter

import pytest
import torch
from models import MODELS, VOCAB, axes_of, batch, batch_of, units_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dist_lab
from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.gather import gather_full, local_part
from dist_lab.layout.layout import Layout
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.step.setup import Setup

# The twins of strategies that split the batch. For tp see tests/parallel/tensor/test_tp.py.
TWINS = [
    (name, impl) for name, impl in IMPLEMENTATIONS if impl != "hand" and name not in ("tp", "pp")
]
BY_DDP = [pair for pair in TWINS if pair[0] in ("ddp", "zero1")]
SPLIT = [(name,) for name, impl in TWINS if name in ("fsdp", "hsdp")]


def on_ranks(size, pairs=TWINS):
    """Test parameters: pairs of strategy and impl, or strategies, each with its mesh."""
    return [
        pytest.param(
            *row, id="@".join(row), marks=pytest.mark.ranks(size, mesh=axes_of(row[0], size))
        )
        for row in pairs
    ]  # fmt: skip


def build(mesh, model, strategy, impl, dtype=torch.float64, **options):
    return dist_lab.parallelize(
        MODELS[model](dtype), mesh, strategy, impl, units=units_of(model), **options
    )


def step_of(job, model, optimizer, step, dtype=torch.float64, microbatches=2):
    """Loss and norm of one step on this rank's rows."""
    data = job.mesh.data
    x, y = (t.tensor_split(data.size)[data.index] for t in batch_of(model, step, dtype=dtype))
    pairs = list(zip(x.tensor_split(microbatches), y.tensor_split(microbatches), strict=True))
    total = job.count(y.numel())
    loss = job.run(pairs, lambda out, t: dist_lab.cross_entropy_sum(out, t) / total)
    job.finish()
    norm = job.clip_grad_norm(0.5)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    return [loss, norm]


def trained(mesh, model, strategy, impl, steps=3, dtype=torch.float64, **options):
    job = build(mesh, model, strategy, impl, dtype, **options)
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-2)
    return job, [n for step in range(steps) for n in step_of(job, model, optimizer, step, dtype)]


def assert_same_weights(ours, theirs):
    ours, theirs = ours.full_state_dict(), theirs.full_state_dict()
    assert list(ours) == list(theirs), "a library's prefix shows"
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11, msg=name)


# tests/programs/verify/test_parity.py compares each twin with one process.
@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt", "gpt tied", "mlp", "resnet"])
@pytest.mark.parametrize(("strategy", "impl"), on_ranks(4))
def test_hand_and_library_train_to_the_same_weights(strategy, impl, model, mesh):
    ours, losses = trained(mesh, model, strategy, "hand")
    theirs, their_losses = trained(mesh, model, strategy, impl)
    assert losses == pytest.approx(their_losses, rel=1e-11)
    assert_same_weights(ours, theirs)


@pytest.mark.slow  # each twin equals one process in bfloat16: tests/programs/verify/test_parity.py
@pytest.mark.parametrize("model", ["gpt", "resnet"])
@pytest.mark.parametrize(("strategy", "impl"), on_ranks(2))
def test_hand_and_library_are_close_in_bfloat16(strategy, impl, model, mesh):
    narrow = {"param_dtype": torch.bfloat16, "dtype": torch.float32}
    ours, losses = trained(mesh, model, strategy, "hand", **narrow)
    theirs, their_losses = trained(mesh, model, strategy, impl, **narrow)
    assert losses == pytest.approx(their_losses, rel=2e-2)
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    x, _ = batch_of(model, 0, dtype=torch.float32)
    assert ours.model(x).dtype == theirs.model(x).dtype == torch.bfloat16


ABOUT = {
    "ddp": "DistributedDataParallel(bucket_cap_mb=25, gradient_as_bucket_view=True",
    "zero1": "ZeroRedundancyOptimizer(parameters_as_bucket_view=True, overlap_with_ddp=False)",
    "fsdp": "torch fully_shard of 3 units and the model(mesh=(2,), reshard_after_forward=True",
    "hsdp": "torch fully_shard of 3 units and the model(mesh=(2, 1), reshard_after_forward=True",
}


@pytest.mark.slow_unless(lambda strategy: strategy != "hsdp")
@pytest.mark.parametrize(("strategy", "impl"), on_ranks(2))
def test_a_twin_describes_its_configuration_and_uses_no_collectives_of_ours(strategy, impl, mesh):
    job = build(mesh, "mlp", strategy, impl)
    assert ABOUT[strategy] in job.about
    x, y = batch(mesh.rank)
    with mesh.comm.ledger.recording() as calls:
        (dist_lab.cross_entropy_sum(job.model(x), y) / 96).backward()
        job.finish()
    assert calls == []
    assert build(mesh, "mlp", strategy, "hand").about == ""


# --- through DistributedDataParallel --------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "impl"), BY_DDP)
@pytest.mark.ranks(2)
def test_a_twin_does_not_send_before_the_last_microbatch(strategy, impl, mesh):
    job = dist_lab.parallelize(MODELS["mlp"](), mesh, strategy, impl, bucket_mb=3)
    assert "bucket_cap_mb=3," in job.about
    x, y = batch(mesh.rank)
    with job.microbatch(last=False):
        (dist_lab.cross_entropy_sum(job.model(x), y) / 96).backward()
    grad = job.model.head.weight.grad.clone()
    grads = ops.all_gather(grad[None], mesh["dp"])
    assert not torch.equal(grads[0], grads[1])


class Two(nn.Module):
    """Returns outputs that depend on each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.body(x)
        return {"logits": self.head(hidden), "hidden": [hidden, hidden]}


@pytest.mark.slow_unless(lambda strategy, impl: (strategy, impl) == ("ddp", "torch"))
@pytest.mark.parametrize(("strategy", "impl"), on_ranks(2))
def test_outputs_that_depend_on_each_other_are_not_scaled_twice(strategy, impl, mesh):
    gradients = []
    for implementation in ("hand", impl):
        job = dist_lab.parallelize(Two().double(), mesh, strategy, implementation, units=["body"])
        out = job.model(torch.ones(2, 3, dtype=torch.float64) * (1 + mesh.rank))
        (out["logits"].sum() + out["hidden"][0].square().sum() + out["hidden"][1].sum()).backward()
        job.finish()
        gradients.append(job.clip_grad_norm(None))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)


@pytest.mark.ranks(2)
def test_the_users_own_accelerator_is_not_changed(mesh):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from dist_lab.mesh.groups import as_under_torchrun

    states = [PartialState, AcceleratorState, GradientState]
    with as_under_torchrun(mesh.rank, mesh.size):
        own = Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision="bf16")
    before = [dict(state._shared_state) for state in states]
    plain, x = nn.Linear(2, 2), torch.rand(3, 2)
    job = dist_lab.parallelize(copy.deepcopy(plain), mesh, "ddp", "accelerate", broadcast=False)
    assert torch.equal(job.model(x), plain(x)), "the twin is not in the user's bfloat16"
    assert [state._shared_state for state in states] == before
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 3)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.ranks(4)
def test_accelerate_refuses_an_axis_that_is_not_the_world(mesh):
    half = mesh.sub("dp", [0, 1]) or mesh["dp"]
    if half.size == 2:
        from dist_lab.parallel.replicated import ddp_accelerate

        model = MODELS["mlp"]()
        layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
        with pytest.raises(UserError, match=r"runs over all 4 processes, and .* has 2"):
            setup = Setup(model, mesh, {"dp": half}, layouts, frozenset(layouts), None, {})
            ddp_accelerate.apply(setup)


# --- ZeroRedundancyOptimizer ----------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_zero_redundancy_optimizer_shards_its_state_and_takes_groups_and_fused(mesh):
    def decayed(name, shape):
        return {"weight_decay": 0.3 if len(shape) > 1 else 0.0}

    jobs = [build(mesh, "gpt", "zero1", impl) for impl in ("hand", "torch")]
    options = {"groups": decayed, "lr": 1e-2, "fused": True}
    optimizers = [job.optimizer(torch.optim.AdamW, **options) for job in jobs]
    for optimizer in optimizers:
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for step in range(3):
        for job, optimizer in zip(jobs, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)  # as a schedule would
            step_of(job, "gpt", optimizer, step)
    assert_same_weights(*jobs)
    state = optimizers[1].optim.state.values()
    numel = sum(value.numel() for values in state for value in values.values() if value.dim())
    total = sum(p.numel() for p in jobs[1].parameters())
    assert ops.all_reduce(torch.tensor(numel), mesh["dp"]) == 2 * total
    assert numel < 2 * total / 2


@pytest.mark.ranks(4)
def test_ranks_without_a_parameter_step_on_nothing(mesh):
    def two_parameters():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(VOCAB, 5), nn.Linear(5, VOCAB, bias=False)).double()

    report = dist_lab.verify(two_parameters, batch, mesh, "zero1", "torch")
    assert report.equal, report.sentence()


@pytest.mark.ranks(2)
def test_zero_redundancy_optimizer_refuses_two_dtypes(mesh):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(UserError, match="one dtype, this model has float32 and float64; give"):
        dist_lab.parallelize(model, mesh, "zero1", "torch")


# --- fully_shard ----------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Counts the collectives on torch's process groups."""

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.calls[name] += 1
            self.dtypes[name] = tree_leaves(args)[0].dtype
        return func(*args, **(kwargs or {}))


@pytest.mark.slow  # each option trains alike, below
@pytest.mark.parametrize(
    "option",
    [{}, {"reshard_after_forward": False}, {"keep_gathered": True}, {"defer_reduce": True}],
    ids=str,
)
@pytest.mark.parametrize("strategy", on_ranks(4, SPLIT))
def test_under_each_option_the_library_issues_as_many_collectives_as_ours(strategy, option, mesh):
    ours, theirs = (build(mesh, "mlp", strategy, impl, **option) for impl in ("hand", "torch"))
    rows = batch(mesh.rank)[0][:3].split(1)
    pairs = list(zip(rows, rows, strict=True))

    def step(job):
        job.model.zero_grad()
        job.run(pairs, dist_lab.cross_entropy_sum)
        job.finish()

    step(ours), step(theirs)
    with mesh.comm.ledger.recording() as calls:
        step(ours)
    with Sent() as sent:
        step(theirs)
    counts = Counter(call.op for call in calls if call.phase != "order")
    assert sent.calls["allgather_base"] == counts["all_gather"] > 0
    assert sent.calls["reduce_scatter_base"] == counts["reduce_scatter"] > 0
    if strategy == "hsdp":  # ours has two more: of the loss, and of the groups that were used
        assert sent.calls["allreduce"] - 1 == counts["all_reduce"] - 2 == 4


@pytest.mark.slow_unless(
    lambda strategy, reduce_dtype: (strategy == "fsdp") == (reduce_dtype is None)
)
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", on_ranks(2, SPLIT))
def test_parameters_are_gathered_in_param_dtype_and_gradients_reduced_in_reduce_dtype(
    strategy, reduce_dtype, mesh
):
    narrow = torch.bfloat16
    job = build(
        mesh, "mlp", strategy, "torch", torch.float32, param_dtype=narrow, reduce_dtype=reduce_dtype
    )
    with Sent() as sent:
        job.model(batch(0)[0]).sum().backward()
    wanted = reduce_dtype or torch.float32
    if strategy == "fsdp":
        assert sent.dtypes == {"allgather_base": narrow, "reduce_scatter_base": wanted}
    else:  # two replicas, each with a shard that is all of a parameter
        assert sent.dtypes == {"allreduce": wanted}
    assert {local_part(p.grad).dtype for p in job.parameters()} == {torch.float32}


@pytest.mark.slow_unless(lambda strategy, option: (strategy, option) == ("fsdp", "defer_reduce"))
@pytest.mark.parametrize("option", ["reshard_after_forward", "keep_gathered", "defer_reduce"])
@pytest.mark.parametrize("strategy", on_ranks(4, SPLIT))
def test_under_each_option_both_train_alike_with_evaluations_between_steps(strategy, option, mesh):
    options = {option: option != "reshard_after_forward"}
    jobs = [build(mesh, "odd", strategy, impl, **options) for impl in ("hand", "torch")]
    seen = []
    for job in jobs:
        optimizer = job.optimizer(torch.optim.SGD, lr=0.5)
        losses = []
        for step in range(3):
            losses += step_of(job, "odd", optimizer, step, microbatches=3)
            losses += [job.evaluate([batch(9)], dist_lab.cross_entropy_sum)]
            numel = sum(local_part(p).numel() for p in job.parameters())
            assert numel < 1200, "some are unsharded"
        seen.append(losses)
    assert seen[0] == pytest.approx(seen[1], rel=1e-11)
    assert_same_weights(*jobs)


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", on_ranks(4, SPLIT))
def test_full_state_dicts_of_fsdp2_are_saved_and_loaded(strategy, mesh):
    job = build(mesh, "odd", strategy, "torch")
    doubled = {name: 2 * t for name, t in job.full_state_dict().items()}
    job.load_full_state_dict(doubled)
    for name, tensor in job.full_state_dict().items():
        assert torch.equal(tensor, doubled[name]), name
    plain = MODELS["odd"]()
    plain.load_state_dict(doubled)
    tokens = batch(0)[0]
    torch.testing.assert_close(job.model(tokens), plain(tokens))


@pytest.mark.slow_unless(lambda strategy: strategy == "hsdp")
@pytest.mark.parametrize("strategy", on_ranks(2, SPLIT))
def test_a_model_on_the_meta_device_starts_alike_by_hand_and_library(strategy, mesh):
    from dist_lab import zoo

    full = []
    for impl in ("hand", "torch"):
        with torch.device("meta"):
            model = zoo.build("gpt", "tiny", vocab=VOCAB, seed=0, tied=True)
        job = dist_lab.parallelize(model, mesh, strategy, impl, units=["model.layers.0"], seed=3)
        assert not any(p.is_meta for p in job.parameters())
        full.append(job.full_state_dict())
    assert full[0].keys() == full[1].keys()
    assert all(torch.equal(full[0][name], full[1][name]) for name in full[0])


class Experts(nn.Module):
    """The caller chooses the expert, by rank and micro-batch; the last one is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, which):
        return self.experts[which](x) * self.scale


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", on_ranks(4, SPLIT))
def test_with_find_unused_ranks_may_use_different_parameters_and_unused_ones_get_no_gradient(
    strategy, mesh
):
    results = []
    for impl, options in (("hand", {}), ("torch", {"find_unused": True})):
        job = dist_lab.parallelize(Experts().double(), mesh, strategy, impl, **options)
        for i in range(2):
            with job.microbatch(last=i == 1):
                x = torch.ones(2, 3, dtype=torch.float64) * (1 + mesh.rank)
                job.model(x, (mesh.rank + i) % 2 if mesh.rank else 0).square().sum().backward()
        job.finish()
        none = {n for n, p in job.model.named_parameters() if p.grad is None}
        assert none == {"experts.2.weight", "experts.2.bias"}
        scale = gather_full(job.model.scale.grad, job.layouts["scale"], mesh)
        results.append((job.clip_grad_norm(None), float(scale)))
    assert results[0] == pytest.approx(results[1], rel=1e-12)


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_different_use_in_different_microbatches_is_refused_if_gradients_would_be_lost(mesh):
    job = dist_lab.parallelize(Experts(), mesh, "hsdp", "torch", units=["experts.0", "experts.1"])
    for i in range(2):
        with job.microbatch(last=i == 1):
            job.model(torch.ones(2, 3), i).sum().backward()
    with pytest.raises(
        UserError, match=r"experts.0.bias was not used in each micro-batch, .* find"
    ):
        job.finish()


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", on_ranks(2, SPLIT))
def test_finish_without_a_last_microbatch_is_refused_if_gradients_are_deferred(strategy, mesh):
    job = build(mesh, "mlp", strategy, "torch", defer_reduce=True)
    with job.microbatch(last=False):
        job.model(batch(0)[0]).sum().backward()
    with pytest.raises(UserError, match=r"finish\(\) before a last micro-batch"):
        job.finish()


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("impl", ["hand", "torch"])
@pytest.mark.parametrize("strategy", on_ranks(2, SPLIT))
def test_a_second_backward_on_gradients_that_are_summed_is_refused(strategy, impl, mesh):
    job = build(mesh, "mlp", strategy, impl)
    job.model(batch(0)[0]).sum().backward()
    job.finish()
    with pytest.raises(UserError, match="backward on gradients that hold their last micro-batch"):
        job.model(batch(0)[0]).sum().backward()


@pytest.mark.slow_unless(
    lambda strategy, where, in_block: (strategy, where, in_block) == ("fsdp", "backward", True)
)
@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("strategy", on_ranks(2, SPLIT))
def test_a_step_that_an_exception_broke_off_leaves_nothing_behind(strategy, where, in_block, mesh):
    jobs = [build(mesh, "mlp", strategy, "torch", defer_reduce=d) for d in (False, True, False)]
    for job in jobs[:2]:
        block = job.model.blocks["0"]

        def fail(*_):
            raise ArithmeticError

        def backward(job=job):
            job.model(batch(7)[0]).square().sum().backward()

        if where == "forward":
            handle = block.norm.register_forward_hook(fail)
        else:
            handle = block.up.register_full_backward_hook(fail)
        with pytest.raises(ArithmeticError):
            if in_block:
                with job.microbatch(last=False):
                    backward()
            else:
                backward()
        handle.remove()
        job.model.zero_grad()
    seen = [step_of(job, "mlp", job.optimizer(torch.optim.SGD, lr=0.5), 0) for job in jobs]
    assert seen[0] == pytest.approx(seen[2], rel=1e-12)
    assert seen[1] == pytest.approx(seen[2], rel=1e-12)


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_what_fsdp2_cannot_do_is_refused_in_one_sentence(mesh):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    def apply(model, **options):
        dist_lab.parallelize(model, mesh, "fsdp", "torch", **options)

    with pytest.raises(UserError, match="FSDP2 always prefetches; leave prefetch"):
        apply(nn.Linear(2, 2), prefetch=False)
    with pytest.raises(UserError, match=r"cannot shard a.weight, tied between units that have"):
        apply(Tied(), units=["a", "b"])
    apply(Tied(), units=["a"])  # b belongs to the model itself, so the weight is found there
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(UserError, match=r"of one dtype in a unit, the model has float32 and float"):
        apply(two)
    apply(two, units=["1"])
    with pytest.raises(UserError, match=r"FSDP2 refuses 0: .* does not support non-contiguous"):
        strided = nn.Sequential(nn.Linear(2, 3))
        strided[0].weight = nn.Parameter(torch.ones(2, 3).t())
        apply(strided, units=["0"])
    with pytest.raises(UserError, match=r"cannot be torch.int8; give a floating dtype"):
        apply(nn.Linear(2, 2), reduce_dtype=torch.int8)


class ChangedInPlace(nn.Module):
    """Changes the output of a Linear in place; for a 3-dim input that output is a view."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        y = self.first(x)
        y += x
        return self.second(y.sin()).flatten(0, 1)


def sequences(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(4, 3, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (4, 3), generator=generator)


@pytest.mark.filterwarnings("error")
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_fsdp2_trains_a_model_that_changes_a_units_output_in_place_and_no_filter_is_left(mesh):
    before = list(warnings.filters)
    names = ["first", "second"]
    report = dist_lab.verify(ChangedInPlace, sequences, mesh, "fsdp", "torch", units=names)
    assert report.equal, report.sentence()
    assert warnings.filters == before


def test_fsdp2_without_a_process_group_is_refused_with_the_way_to_have_one():
    with pytest.raises(UserError, match="needs a process group, even for one: torchrun"):
        dist_lab.parallelize(nn.Linear(2, 2), dist_lab.init_mesh(), "fsdp", "torch")


@pytest.mark.ranks(2)
def test_accelerate_leaves_its_fsdp_plugin_unused_on_cpu_and_is_refused_for_that(mesh):
    with pytest.raises(
        UserError, match=r"treats the processes as MULTI_CPU and wraps .*DistributedDataPar"
    ):
        dist_lab.parallelize(nn.Linear(2, 2), mesh, "fsdp", "accelerate")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState

    from dist_lab.mesh.groups import as_under_torchrun

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with as_under_torchrun(mesh.rank, mesh.size):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        del os.environ["ACCELERATE_USE_FSDP"]  # accelerate sets it even so
    assert (accelerator.distributed_type.value, accelerator.is_fsdp2) == ("MULTI_CPU", False)
    model = nn.Linear(2, 2)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    assert type(model) is nn.parallel.DistributedDataParallel
    AcceleratorState._reset_state(reset_partial_state=True)
    assert math.prod(model.module.weight.shape) == 4, "the weight is unsharded"
