"""Quantisation-aware training under every strategy is equal to one process."""

import copy

import pytest
import torch
from models import BLOCKS, UNITS, batch, batch_of, gpt, resnet
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import dist_lab
from dist_lab.errors import UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.quantize.formula import Scheme, grid_between, round_to_nearest
from dist_lab.quantize.qat import QAT, StraightThrough
from dist_lab.transforms import operands
from dist_lab.transforms.operands import Split
from dist_lab.transforms.recipe import linears_of

GROUPS, ROWS, MATRIX = Scheme(4, 4), Scheme(3), Scheme(4, None)
ON_TWO_RANKS, IN_GROUPS = Scheme(4, 8), Scheme(8, 8)
PER_TOKEN, PER_TENSOR = Scheme(8), Scheme(8, None)
SEQUENCE = {"sequence_parallel": True}

# mesh, strategy, schemes of weights and inputs, options, and whether it runs by default
MIXES = {
    "fsdp x tp": ({"fsdp": 2, "tp": 2}, None, (GROUPS, PER_TOKEN), {}, False),
    "fsdp x tp, recomputed": (
        {"fsdp": 2, "tp": 2}, None, (ROWS, PER_TENSOR), {"recompute": 1}, False,
    ),
    "pp x tp": ({"pp": 2, "tp": 2}, None, (ROWS, PER_TENSOR), {"schedule": "zb"}, True),
    "ddp x tp, sequence": ({"dp": 2, "tp": 2}, None, (ROWS, PER_TENSOR), SEQUENCE, False),
    "tp": ({"tp": 4}, None, (MATRIX, None), {}, False),
    "ddp x tp, groups on two ranks": (
        {"dp": 2, "tp": 2}, None, (GROUPS, IN_GROUPS), SEQUENCE, False,
    ),
    "fsdp x tp, groups on two ranks": (
        {"fsdp": 2, "tp": 2}, None, (ON_TWO_RANKS, PER_TOKEN), {"recompute": 1}, True,
    ),
    "ddp": ({"dp": 4}, None, (GROUPS, PER_TENSOR), {}, False),
    "dp": ({"dp": 4}, "dp", (ROWS, PER_TOKEN), {}, False),
    "zero1": ({"dp": 4}, "zero1", (ROWS, PER_TENSOR), {}, False),
    "zero2": ({"dp": 4}, "zero2", (ROWS, None), {}, False),
    "hsdp": ({"dp": 2, "fsdp": 2}, None, (ROWS, PER_TENSOR), {"recompute": 2}, False),
    "pp x fsdp": ({"pp": 2, "fsdp": 2}, None, (ROWS, PER_TENSOR), {}, False),
    "pp x zero2": ({"pp": 2, "dp": 2}, "zero2", (ROWS, PER_TENSOR), {"schedule": "zb"}, False),
    "pp": ({"pp": 4}, None, (GROUPS, PER_TENSOR), {"recompute": 1}, False),
}  # fmt: skip


@pytest.mark.slow_unless(lambda mix, model: MIXES[mix][-1] and model == "gpt")
@pytest.mark.parametrize("model", ["gpt", "mlp", "vit"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.ranks(4)
def test_training_is_equal_to_one_process(mix, model):
    axes, strategy, schemes, options, _ = MIXES[mix]
    if model == "vit" and "sequence_parallel" in options:
        pytest.skip("its 7 tokens do not divide by 2")
    report = dist_lab.verify(
        lambda: BLOCKS[model](layers=4 if "pp" in axes else 2), lambda i: batch_of(model, i),
        dist_lab.init_mesh(**axes), strategy, recipe=QAT(*schemes), units=UNITS[model],
        microbatches=4 if "pp" in axes else 2, **options,
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- the straight-through estimator ---------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 8])
def test_values_and_gradients_have_the_bits_of_torchs_fake_quantize(bits, group, symmetric):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(12, 32, generator=generator)
    scheme, split = Scheme(bits, group, symmetric), Split("", 32, 32)
    dy = torch.randn(x.shape, generator=generator)
    ours, rounding = x.clone().requires_grad_(), StraightThrough(scheme)
    limits = 0.8 * rounding.limits_of(x, split)  # a range that leaves out some values
    y = rounding.round(ours, limits, split)
    y.backward(dy)

    grid = grid_between(-limits[0], limits[1], scheme, 32)
    theirs = x.view(grid.scale.numel(), -1).requires_grad_()  # a group is a row
    expected = torch.fake_quantize_per_channel_affine(
        theirs, grid.scale.flatten(), grid.zero.flatten().int(), 0, scheme.low, scheme.high
    )
    expected.backward(dy.view_as(theirs))
    assert torch.equal(y, expected.view_as(x))
    assert torch.equal(ours.grad, theirs.grad.view_as(x))
    assert (ours.grad == 0).any()
    assert torch.equal(ours.grad == dy, ours.grad != 0)


def test_another_tensor_than_a_leaf_has_the_same_gradient():
    x, rounding, split = torch.randn(4, 8), StraightThrough(Scheme(2)), Split("", 8, 8)
    gradients = []
    for cast in (lambda leaf: leaf, lambda leaf: leaf * 1.0):
        leaf = x.clone().requires_grad_()
        rounding.round(cast(leaf), rounding.limits_of(x, split), split).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_range_that_is_not_finite_gives_nan_and_no_error():
    """One rank alone would raise it, while the others wait for its part of the range."""
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    rounding, split = StraightThrough(Scheme(4)), Split("", 2, 2)
    y = rounding.round(x, rounding.limits_of(x, split), split)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


# --- which weights, and what is left of them ------------------------------------------------------


def run(job, optimizer, steps=3, rows=8, total=48):
    for step in range(steps):
        x, y = batch(step, rows)
        own = slice(job.mesh.data.index * rows // job.mesh.data.size, None)
        own = slice(own.start, own.start + rows // job.mesh.data.size)
        job.run([(x[own], y[own])], lambda out, y: cross_entropy_sum(out, y) / total)
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()


@pytest.mark.ranks(4)
def test_after_training_rounding_gives_the_weights_that_forward_used():
    mesh, scheme = dist_lab.init_mesh(fsdp=2, tp=2), Scheme(3)
    job = dist_lab.parallelize(gpt(), mesh, units=UNITS["gpt"], recipe=QAT(scheme))
    run(job, job.optimizer(torch.optim.AdamW, lr=1e-2))
    rounded = gpt()
    rounded.load_state_dict(job.full_state_dict())  # weights of full precision
    names = linears_of(rounded, QAT(scheme), {})
    assert len(names) == 14
    assert "lm_head" not in names
    for linear in names.values():
        quantized = round_to_nearest(linear.weight.detach(), scheme)
        assert not torch.equal(quantized.values(), linear.weight)
        with torch.no_grad():
            linear.weight.copy_(quantized.values())
    x, y = batch(9)
    own = [(x.chunk(2)[mesh["fsdp"].index], y.chunk(2)[mesh["fsdp"].index])]
    loss = job.evaluate(own, lambda out, y: cross_entropy_sum(out, y) / 48)
    with torch.no_grad():
        expected = float(cross_entropy_sum(rounded(x), y) / 48)
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.ranks(2)
def test_outside_of_a_forward_weights_are_the_models_own_and_a_copy_is_a_plain_model(mesh):
    job = dist_lab.parallelize(gpt(), mesh, units=UNITS["gpt"], recipe=QAT(Scheme(2)))
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    x, _ = batch(0)
    with torch.no_grad():
        rounded, plain = job.model(x), copy.deepcopy(job.model)(x)
    assert not torch.allclose(rounded, plain)
    assert torch.equal(plain, gpt()(x).detach())
    for name, parameter in job.model.named_parameters():
        assert torch.equal(parameter, before[name])
        module, _, attribute = name.rpartition(".")
        assert attribute not in vars(job.model.get_submodule(module))


def test_globs_choose_the_linears():
    recipe = QAT(Scheme(4), linears=("model.layers.*.mlp.*", "lm_head"))
    names = [*linears_of(gpt(), recipe, {})]
    assert names == [
        f"model.layers.{i}.mlp.{each}_proj" for i in (0, 1) for each in ("gate", "up", "down")
    ] + ["lm_head"]


@pytest.mark.slow_unless(lambda axes: "tp" in axes)
@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.ranks(2)
def test_the_head_can_be_quantised_too(axes):
    recipe = QAT(Scheme(4), linears=("model.layers.*.mlp.*", "lm_head"))
    report = dist_lab.verify(
        gpt, batch, dist_lab.init_mesh(**axes), recipe=recipe, units=UNITS["gpt"], steps=1
    )
    assert report.equal, report.sentence()


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_bfloat16_runs_and_rounds_the_weights_in_bfloat16(mesh):
    losses = []
    for strategy, axes in (("ddp", {"dp": 2}), ("fsdp", {"fsdp": 2})):
        job = dist_lab.parallelize(
            gpt(torch.float32), dist_lab.init_mesh(**axes), strategy, units=UNITS["gpt"],
            recipe=QAT(GROUPS, PER_TENSOR), param_dtype=torch.bfloat16, recompute=1,
        )  # fmt: skip
        run(job, job.optimizer(torch.optim.SGD, lr=0.1))
        x, y = batch(9)
        part = x.chunk(2)[mesh.rank], y.chunk(2)[mesh.rank]
        losses.append(job.evaluate([part], lambda out, y: cross_entropy_sum(out, y) / 48))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("inputs", [None, PER_TENSOR], ids=str)
@pytest.mark.parametrize("axes", [{"dp": 4}, {"pp": 2, "fsdp": 2}], ids=str)
@pytest.mark.slow
@pytest.mark.ranks(4)
def test_with_a_fixed_order_the_bits_are_those_of_one_process(axes, inputs):
    report = dist_lab.verify(
        lambda: gpt(torch.float32, layers=4), batch, dist_lab.init_mesh(**axes),
        recipe=QAT(ROWS, inputs), units=UNITS["gpt"], reduce_order="fixed",
    )  # fmt: skip
    assert report.equal, report.sentence()


# --- ranges over ranks ----------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_a_running_range_in_a_buffer_is_that_of_rank_0_under_torchs_ddp():
    """The story of [Note: why there is no observer], with torch's own observer and its own DDP."""
    from torch.ao.quantization import FakeQuantize, MinMaxObserver

    mesh = dist_lab.init_mesh(dp=2)
    x = torch.tensor([[1.0], [8.0]])[mesh.rank :][:1]  # rank 0 sees 1, rank 1 sees 8
    observed = nn.Sequential(FakeQuantize(MinMaxObserver, quant_min=0, quant_max=255),
                             nn.Linear(1, 1, bias=False))  # fmt: skip
    nn.init.ones_(observed[1].weight)
    ddp = nn.parallel.DistributedDataParallel(observed, process_group=mesh["dp"].group)
    ddp(x)
    outputs = ddp(x)  # rank 0's buffers are broadcast before this forward
    ranges = float(observed[0].activation_post_process.max_val)
    assert ranges == (1.0 if mesh.rank == 0 else 8.0)
    saved = observed.state_dict()["0.activation_post_process.max_val"]  # rank 0 saves
    assert mesh.rank == 1 or float(saved) == 1.0, "and 8 will be clamped to 1"
    del outputs

    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    recipe = QAT(Scheme(8, None), Scheme(8, None), linears=("0",))
    job = dist_lab.parallelize(model, mesh, "ddp", recipe=recipe)
    job.model(x)
    assert not [*job.model.named_buffers()]
    seen = []
    job.model[0].register_forward_pre_hook(lambda m, args: seen.append(float(args[0])))
    job.model(x)
    step = 8 / 255  # the range of both ranks
    assert seen == [pytest.approx(round(float(x) / step) * step)]


@pytest.mark.ranks(4)
def test_a_rank_without_rows_takes_part_in_a_range():
    report = dist_lab.verify(
        gpt, lambda i: batch(i, rows=3), dist_lab.init_mesh(dp=4), recipe=QAT(ROWS, PER_TENSOR),
        units=UNITS["gpt"], steps=2,
    )  # fmt: skip
    assert report.equal, report.sentence()


@pytest.mark.slow_unless(lambda axes: "dp" in axes)
@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2}], ids=str)
@pytest.mark.ranks(2)
def test_verify_sees_a_range_from_one_rank_only(axes):
    """Each rank rounds with its own range, as with an observer that DDP does not synchronize."""
    mesh = dist_lab.init_mesh(**axes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operands, "over_ranks", lambda limits, axis, what: limits)
        report = dist_lab.verify(
            gpt, batch, mesh, recipe=QAT(ROWS, PER_TENSOR), units=UNITS["gpt"], steps=1
        )
    assert not report.equal


SENT = {
    "weights, ddp": ({"dp": 4}, (ROWS, None), {}, []),
    "weights, fsdp": ({"fsdp": 4}, (GROUPS, None), {}, []),
    "groups of a rank, tp": ({"tp": 2, "fsdp": 2}, (GROUPS, None), {}, []),
    "rows, tp": ({"tp": 2, "fsdp": 2}, (ROWS, None), {}, [("tp", "ranges of weights", 1024)] * 2),
    "tokens, ddp": ({"dp": 4}, (ROWS, PER_TOKEN), {}, []),
    "tensors, ddp": (
        {"dp": 4}, (ROWS, PER_TENSOR), {}, [("dp", "range of an input", 16)] * 8,
    ),
    "tensors, tp": (
        {"tp": 2, "fsdp": 2}, (GROUPS, PER_TENSOR), {},
        [("fsdp", "range of an input", 16), ("fsdp_tp", "range of an input", 16)] * 4,
    ),
}  # fmt: skip


@pytest.mark.slow_unless(lambda case: case in ("weights, fsdp", "rows, tp", "tensors, tp"))
@pytest.mark.parametrize("case", SENT)
@pytest.mark.ranks(4)
def test_what_ranges_send_is_small_and_labeled(case):
    axes, schemes, options, expected = SENT[case]
    mesh = dist_lab.init_mesh(**axes)
    job = dist_lab.parallelize(gpt(), mesh, units=UNITS["gpt"], recipe=QAT(*schemes), **options)
    x, _ = batch(0, 2)
    job.model(x)
    with mesh.comm.ledger.recording() as calls, torch.no_grad():
        job.model(x)
    ranges = [(c.axis, c.unit, c.payload) for c in calls if "range" in c.unit]
    assert ranges == expected
    assert all(c.phase == "forward" for c in calls if "range" in c.unit)


@pytest.mark.ranks(2)
def test_fsdp_keeps_no_rounded_weight_between_forward_and_backward():
    """Autograd would save them all, unsharded: see transforms/saved_weights.py."""
    kept = {}
    for strategy, axes in (("ddp", {"dp": 2}), ("fsdp", {"fsdp": 2})):
        mesh = dist_lab.init_mesh(**axes)
        job = dist_lab.parallelize(gpt(), mesh, strategy, units=UNITS["gpt"], recipe=QAT(ROWS))
        rounded = []  # weak references to their memory

        def remember(module, args, rounded=rounded):
            rounded.append(StorageWeakRef(vars(module)["weight"].untyped_storage()))

        for layer in job.model.model.layers.values():
            layer.mlp.up_proj.register_forward_pre_hook(remember)
        x, y = batch(0, 2)
        with mesh.comm.ledger.recording() as calls:
            loss = cross_entropy_sum(job.model(x), y)
            kept[strategy] = sum(not reference.expired() for reference in rounded)
            loss.backward()
        gathers = [c.unit for c in calls if c.op == "all_gather" and c.unit in UNITS["gpt"]]
    assert kept == {"ddp": 2, "fsdp": 0}
    assert len(gathers) == 2 * len(UNITS["gpt"]), "as without a recipe"


# --- what is refused ------------------------------------------------------------------------------


class Traced(nn.Module):
    """Without `stages`: a pipeline cuts its graph."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(4)))

    def forward(self, x):
        return self.blocks(x)


REFUSED = {
    "no linears": ("dp", {}, resnet, "ResNet|Sequential has no nn.Linear inside of units"),
    "not a recipe": ("dp", {"recipe": "int4"}, gpt, "^recipe cannot be 'int4'; give a recipe"),
    "a glob": (
        "dp", {"recipe": QAT(Scheme(4), linears=("layers.*",))}, gpt,
        r"^'layers.\*' names no nn.Linear .*; there are model.layers.0.self_attn.q_proj, ",
    ),
    "groups": (
        "dp", {"recipe": QAT(Scheme(4, 12))}, gpt,
        "^model.layers.0.self_attn.q_proj: 32 columns do not divide into groups of 12 ",
    ),
    "torch": ("dp", {"impl": "torch"}, gpt, "^ddp@torch puts weights and gradients in tensors of"),
    "a graph": (
        "pp", {"example_inputs": torch.zeros(2, 4), "units": ("blocks.0",)}, Traced,
        "^pp has cut this model's graph, in which no unit is called",
    ),
    "a unit by itself": (
        "tp", {"units": tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")}, gpt,
        "^model.layers.0.self_attn.q_proj is a unit by itself, and under tp",
    ),
}  # fmt: skip


@pytest.mark.slow_unless(lambda case: case in ("a graph", "a unit by itself", "groups"))
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.ranks(2)
def test_what_cannot_be_rounded_is_refused_in_one_line(case):
    axis, options, build, message = REFUSED[case]
    mesh = dist_lab.init_mesh(**{axis: 2})
    with pytest.raises(UserError, match=message):
        dist_lab.parallelize(build(), mesh, **{"recipe": QAT(Scheme(4)), **options})
