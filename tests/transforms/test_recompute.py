"""Recomputation changes no number under any strategy, and stores as much as its formula says."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import MODELS, axes_of, batch, batch_of, build, gpt, mlp, plan_of, resnet
from models import units_of as model_units
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.observe.memory import LiveBytes
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.transforms.precision import compute_in
from dist_lab.transforms.recompute import CheckpointedForward, recompute

NAMED = {
    "odd": ("frozen", "mix"),
    "resnet": ("3", "4"),
}  # units of models without a `units` attribute


def units_of(model, names=()):
    modules = dict(model.named_modules())
    if names:
        return {name: modules[name] for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, model.units)}


def recomputing_model(name, every, dtype=torch.float64):
    model = MODELS[name](dtype)
    if name == "odd":  # a single layer is no unit
        model.frozen, model.mix = nn.Sequential(model.frozen), nn.Sequential(model.mix)
    recompute(model, units_of(model, NAMED.get(name, ())), every)
    return model


def record_calls(module):
    """A list that gets an entry when a forward of the module begins."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(module))
    return calls


def same_gradients(model, reference):
    """Check that the gradients of two models or two jobs are equal to the bit."""
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(local_part(p.grad), local_part(q.grad)), name


def assert_same(model, reference):
    """Check that gradients and buffers are equal to the bit."""
    same_gradients(model, reference)
    for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b), name


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda name, every: every == 1 or name == "gpt")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_no_bit_of_gradients_or_statistics(name, every):
    plain, model = recomputing_model(name, 0), recomputing_model(name, every)
    layers = [
        next(m for m in unit.modules() if not list(m.children())) for unit in recomputing(model)
    ]
    calls = [record_calls(module) for module in layers]
    for step in range(2):  # gradients add up, running statistics change twice
        x, y = batch_of(name, step)
        for each in (plain, model):
            dist_lab.cross_entropy_sum(each(x), y).backward()
    assert_same(model, plain)
    assert [len(c) for c in calls] == [4] * (2 // every)


def recomputing(model):
    return [m for m in model.modules() if isinstance(m.forward, CheckpointedForward)]


@pytest.mark.slow_unless(lambda strategy, name: strategy == "ddp" and name in ("odd", "resnet"))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["dp", "ddp"])
@pytest.mark.ranks(2)
def test_recomputation_changes_no_event_and_no_bytes_of_a_strategy(strategy, name, mesh):
    jobs = [
        dist_lab.parallelize(recomputing_model(name, every), mesh, strategy) for every in (0, 1)
    ]
    assert recomputing(jobs[1].model)
    x, y = batch_of(name, mesh.rank)
    for _ in range(2):  # from the second step on, ddp reduces buckets in backward
        sent = []
        for job in jobs:
            with mesh.comm.ledger.recording() as calls:
                job.run([(x, y), (x.flip(0), y.flip(0))], dist_lab.cross_entropy_sum)
                job.finish()
            sent.append([(call.op, call.payload, call.phase) for call in calls])
        assert_same(*(job.model for job in jobs))
        assert sent[0] == sent[1]
        for job in jobs:
            job.after_step()
            job.model.zero_grad()


# Cells of the matrix with `recompute` do the same for gpt.
@pytest.mark.slow_unless(
    lambda strategy, impl, name: (strategy, impl, name) == ("fsdp", "hand", "resnet")
)
@pytest.mark.nightly_unless(lambda strategy, impl, name: impl != "hand" or name == "resnet")
@pytest.mark.parametrize(
    ("strategy", "impl", "name"),
    [
        pytest.param(s, i, name, marks=pytest.mark.ranks(4, mesh=axes_of(s, 4)))
        for s, i in IMPLEMENTATIONS
        if s not in ("single", "tp")  # tp is tested in tests/parallel/tensor/test_tp.py
        for name in (["gpt tied", "resnet"] if i == "hand" else ["gpt tied"])
    ],
)
def test_every_strategy_that_recomputes_equals_one_process_that_does_not(
    strategy, impl, name, mesh
):
    report = dist_lab.verify(
        lambda: build(strategy, name), lambda step: batch_of(name, step), mesh, strategy, impl,
        microbatches=2, clip=0.5, units=model_units(name), recompute=1,
        **plan_of(strategy, name, impl),
        steps=2,  # the first is special for some strategies, which record an order in it
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.ranks(3)
def test_recomputed_sync_batchnorm_gathers_again_and_counts_a_batch_once(mesh):
    jobs = [
        dist_lab.parallelize(recomputing_model("resnet", every), mesh, "ddp", sync_batchnorm=True)
        for every in (0, 1)
    ]
    x, y = batch_of("resnet", mesh.rank)
    rows = 8 - 3 * mesh.rank
    for job in jobs:
        job.run([(x[:rows], y[:rows])], dist_lab.cross_entropy_sum)
        job.finish()
    assert_same(*(job.model for job in jobs))
    assert jobs[1].model[3].bn1.num_batches_tracked == 1


class DropoutBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.drop(torch.relu(self.up(x))))


def test_a_recomputed_forward_uses_the_same_random_masks():
    torch.manual_seed(0)
    plain = nn.Sequential(DropoutBlock(), DropoutBlock())
    model = copy.deepcopy(plain)
    recompute(model, {"0": model[0], "1": model[1]}, 1)
    after = []
    for each in (plain, model):
        torch.manual_seed(1)
        each(torch.ones(4, 8)).square().sum().backward()
        after.append(torch.rand(1))
    assert_same(model, plain)
    assert after[0] == after[1], "the state of the generator differs afterwards"


class BufferedLayer(nn.Module):
    """The output depends on a buffer that forward replaces, and on one that it adds to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("none", None)

    def forward(self, x):
        y = torch.tanh(self.linear(x)) / self.mean * (self.seen + 1)
        self.mean = 0.5 * self.mean + 0.5 * y.detach().abs().mean()
        self.seen += 1
        return y * self.mean


def test_each_recomputed_call_of_a_unit_sees_its_own_buffers():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), BufferedLayer())
    model = copy.deepcopy(plain)
    recompute(model, {"1": model[1]}, 1)
    x = torch.randn(5, 3)
    for each in (plain, model):
        each[1](each(x)).square().sum().backward()
    assert_same(model, plain)
    assert model[1].seen == 2


def test_backward_may_run_twice_through_a_recomputing_unit():
    torch.manual_seed(0)
    plain = nn.Sequential(BufferedLayer())
    model = copy.deepcopy(plain)
    recompute(model, {"0": model[0]}, 1)
    for each in (plain, model):
        loss = each(torch.ones(1, 3)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(model, plain)


class KeywordLayer(nn.Module):
    """Takes tensors by keyword, with names of checkpoint()'s options; returns a nested dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, *, debug, use_reentrant=None, what="nothing"):
        return {"y": torch.tanh(self.linear(x) * debug), "what": what, "rest": (use_reentrant, 7)}


def test_a_recomputing_unit_may_take_keywords_and_return_any_structure():
    torch.manual_seed(0)
    model = nn.ModuleList([KeywordLayer()])
    plain = copy.deepcopy(model)
    recompute(model, {"0": model[0]}, 1)
    scales = [torch.full((3,), 2.0, requires_grad=True) for _ in range(2)]
    for each, scale in zip((plain, model), scales, strict=True):
        out = each[0](torch.ones(2, 3), debug=scale.exp(), what="all")
        assert (out["what"], out["rest"]) == ("all", (None, 7))
        out["y"].sum().backward()
    assert_same(model, plain)
    assert torch.equal(scales[0].grad, scales[1].grad)


# --- bfloat16 with float32 master weights ---------------------------------------------------------


class Scaled(nn.Module):
    """A unit with its own parameter, parameters inside, and a float32 value in between."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1.5))
        self.inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, bias):
        wide = torch.tanh(x.float()) * bias  # bfloat16 -> float32; bias may be either
        narrow = self.inner[1](torch.tanh(self.scale * x))
        return self.norm(self.inner[0](wide.to(x.dtype)) + narrow) * self.scale


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unit = nn.Linear(4, 4), Scaled()

    def forward(self, x):
        return self.unit(self.first(x), torch.ones(4) / 3)  # a float32 tensor, which is not cast


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_recomputing_unit_sees_low_precision_copies_in_backward_too(by_itself):
    torch.manual_seed(0)
    plain = Outer()
    model = copy.deepcopy(plain)
    recompute(model, {"unit": model.unit}, 1)
    x, dtypes = torch.randn(6, 4), []
    model.unit.inner[1].register_forward_hook(lambda m, args, out: dtypes.append(m.weight.dtype))
    for each in (plain, model):
        compute_in(each, torch.bfloat16)
        (each.unit(x, x) if by_itself else each(x)).float().square().sum().backward()
    assert_same(model, plain)
    assert dtypes == [torch.bfloat16] * 2
    assert model.unit.scale is model.unit._parameters["scale"], (
        "the low-precision copy is still there"
    )
    assert model.unit.norm.num_batches_tracked == 1


@pytest.mark.slow_unless(lambda strategy: strategy in ("zero2", "fsdp"))
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=pytest.mark.ranks(2, mesh=axes_of(s, 2)), id=s)
        for s, impl in IMPLEMENTATIONS
        if impl == "hand" and s not in ("single", "hsdp", "tp", "pp")
    ],
)
def test_a_strategy_in_bfloat16_gets_the_same_float32_gradients(strategy, mesh):
    torch.manual_seed(0)
    plain = Outer()
    jobs = [
        dist_lab.parallelize(
            copy.deepcopy(plain), mesh, strategy, units=["unit"], recompute=every,
            param_dtype=torch.bfloat16,
        )
        for every in (0, 1)
    ]  # fmt: skip
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(mesh.rank))
    for job in jobs:
        job.run([(x, x)], lambda out, y: (out.float() - y).square().sum())
        job.finish()
    same_gradients(*jobs)
    assert any(g is not None and g.any() for g in jobs[1].full_gradients().values())


# --- memory ---------------------------------------------------------------------------------------


def measure_memory(module, *inputs):
    """Bytes allocated after the forward, and at the peak of forward and backward.

    Gradients are allocated before, so that backward adds in place and they are not counted.
    """
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for tensor in inputs:
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    tensors = [
        t for p in (*module.parameters(), *inputs) for t in (p.detach(), p.grad) if t is not None
    ]
    with LiveBytes(tensors) as bytes_:
        before = bytes_.live
        output = module(*inputs)
        stored = bytes_.live - before
        output.sum().backward()
        return stored, bytes_.peak - before


@pytest.mark.slow_unless(lambda every: every == 2)
@pytest.mark.parametrize("every", [1, 2, 4])
def test_recomputation_stores_inputs_and_recomputes_one_unit_at_a_time(every):
    def build(every):
        model = dist_lab.zoo.build("gpt", "tiny", vocab=256, seed=0)
        recompute(model, units_of(model), every)
        return model

    rows, seq, width, layers = 2, 64, 128, 4
    tokens = torch.randint(256, (rows, seq))
    size = rows * seq * width * 4  # bytes of a unit's input, and of its output
    unit = build(0).model.layers["0"]
    activations, unit_peak = measure_memory(unit, torch.randn(rows, seq, width, requires_grad=True))
    assert activations > 20 * size

    plain, plain_peak = measure_memory(build(0), tokens)
    stored, peak = measure_memory(build(every), tokens)
    # All three include the output of each unit, which is the input of the next.
    assert plain - stored == layers // every * (activations - size)
    if every == 1:
        # At the peak at most the stored inputs and the activations of one unit are alive.
        assert peak <= stored + unit_peak
        assert plain_peak > layers * activations > 2 * peak


def test_without_gradients_nothing_is_stored_and_eval_mode_may_have_gradients():
    plain, model = recomputing_model("resnet", 0), recomputing_model("resnet", 1)
    calls = record_calls(model[3].conv1)
    x, _ = batch_of("resnet", 0)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert_same(model, plain)
    for each in (plain, model):
        each.eval()(x).square().sum().backward()
    assert_same(model, plain)
    assert len(calls) == 3

    peaks = []
    for every in (0, 1):
        model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(1000)))
        recompute(model, {"0": model[0]}, every)
        rows = torch.randn(2, 1000)
        with LiveBytes([rows, *model.parameters(), *model.buffers()]) as bytes_, torch.no_grad():
            model(rows)
        peaks.append(bytes_.peak)
    assert peaks[0] == peaks[1], "the buffers were copied without gradients"


def test_a_deleted_recomputing_model_is_freed():
    model = recomputing_model("gpt", 1)
    reference = weakref.ref(model)
    out = model(batch(0)[0])
    out.sum().backward()
    del model, out
    gc.collect()
    assert reference() is None


# --- still an ordinary module ---------------------------------------------------------------------


def test_recomputation_keeps_names_and_calls_hooks_on_a_unit_once():
    plain, model = mlp(), mlp()
    events = []
    block = model.blocks["0"]
    block.register_forward_pre_hook(lambda *_: events.append("enter"))
    block.register_forward_hook(lambda *_: events.append("leave"))
    recompute(model, units_of(model), 1)
    block.up.register_forward_hook(lambda *_: events.append("inside"))
    block.register_full_backward_hook(lambda *_: events.append("backward"))
    model(batch(0)[0]).sum().backward()
    assert events == ["enter", "inside", "leave", "inside", "backward"]
    assert list(model.state_dict()) == list(plain.state_dict())
    for walk in ("named_modules", "named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(model, walk)()] == [n for n, _ in getattr(plain, walk)()]


def test_a_copy_or_a_pickle_of_a_recomputing_model_is_plain_and_runs_its_own_modules():
    model = recomputing_model("gpt", 1)
    x, _ = batch(0)
    model(x)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(copy.deepcopy(model)),
    ):
        assert torch.equal(copied(x), model(x))
        assert recomputing(copied) == []
        calls = [
            record_calls(copied.model.layers["0"].mlp),
            record_calls(model.model.layers["0"].mlp),
        ]
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert not copied(x).any()
        copied(x).sum().backward()
        assert [len(c) for c in calls] == [2, 0]


def test_a_copy_keeps_a_forward_that_the_user_has_replaced():
    model = mlp()
    block = model.blocks["0"]
    block.forward = lambda x: 2 * x
    recompute(model, units_of(model), 1)
    x = torch.ones(1, 1, 24, dtype=torch.float64, requires_grad=True)
    block(x).sum().backward()
    assert torch.equal(x.grad, 2 * torch.ones_like(x))


def test_an_exception_in_either_forward_restores_buffers():
    plain, model = recomputing_model("resnet", 0), recomputing_model("resnet", 1)
    compute_in(model, torch.float64)
    x, y = batch_of("resnet", 0)
    broken_forward = []

    def raise_if_broken(module, args):
        if broken_forward:
            raise KeyError("broken")

    hook = model[3].bn2.register_forward_pre_hook(raise_if_broken)
    with torch.no_grad():
        plain(x)
    out = model(x)
    broken_forward.append("second forward")
    with pytest.raises(KeyError, match="broken"):
        dist_lab.cross_entropy_sum(out, y).backward()
    model.zero_grad()
    with torch.no_grad():
        plain[3].bn1(
            plain[3].conv1(plain[:3](x))
        )  # what the next forward does before its exception
    with pytest.raises(KeyError, match="broken"):
        model(x)
    hook.remove()
    assert "weight" not in vars(model[3].conv1), "the low-precision copy is still there"
    for each in (plain, model):
        dist_lab.cross_entropy_sum(each(x), y).backward()
    assert_same(model, plain)


# --- which units ----------------------------------------------------------------------------------


def names_recomputing(model):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module.forward, CheckpointedForward)
    ]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (4, [0, 4]), (5, [0])],
)
def test_every_kth_unit_recomputes_starting_with_the_first(every, expected):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(5)))
    recompute(model, dict(model.named_children()), every)
    assert names_recomputing(model) == [str(index) for index in expected]


def test_only_outermost_units_of_several_layers_recompute():
    model = gpt()
    recompute(model, dict(model.named_modules()), 1)
    assert names_recomputing(model) == ["model"]

    model = gpt()
    layers = {n: m for n, m in model.named_modules() if "layers." in n}
    recompute(model, {"": model} | layers, 2)
    assert names_recomputing(model) == ["model.layers.0"]


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (-1, "recompute=-1 does not fit a model of 2 units; give 1 for all, k up to 2 for every"),
        (3, "recompute=3 does not fit a model of 2 units"),
    ],
)
def test_a_recompute_interval_that_does_not_fit_is_refused(every, message):
    model = resnet()
    with pytest.raises(UserError, match=message):
        recompute(model, units_of(model, NAMED["resnet"]), every)
    assert names_recomputing(model) == []


def test_recompute_without_units_or_twice_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(
        UserError, match=r"recompute=1, but there is no unit of several .* units=\[Block\]"
    ):
        recompute(model, {"": model, "layer": nn.Linear(2, 2)}, 1)
    model = recomputing_model("mlp", 1)
    with pytest.raises(UserError, match=r"blocks.0 recomputes already"):
        recompute(model, units_of(model), 2)
