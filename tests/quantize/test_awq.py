"""AWQ is never worse than rounding in its own error, and has the same bits on 1, 2 and 4 ranks."""

import itertools
import warnings

import pytest
import torch
from models import VOCAB, gpt, mlp
from torch import Tensor, nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.quantize import awq, smoothquant
from dist_lab.quantize.awq import (
    ALPHAS,
    Inputs,
    best_scale,
    clipped,
    inputs_of,
    scale_of,
    scaled_error,
    searched,
)
from dist_lab.quantize.blocks import blocks_of, linears_of
from dist_lab.quantize.calibrate import Calibration, shards_of_rows, walk
from dist_lab.quantize.folding import Fed, fold, read_plan
from dist_lab.quantize.formula import Scheme, bounds, grid_between, round_to_nearest
from dist_lab.quantize.hessian import output_error

PLAIN = Fed("norm", ("linear",), 32)
SCHEMES = [
    Scheme(3, 8), Scheme(3), Scheme(4, 16, symmetric=True), Scheme(3, None),
    Scheme(4, 8, scale_dtype=torch.float16),
]  # fmt: skip


def tokens(rows: int = 8, length: int = 12) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def alone(rows: Tensor | None = None) -> Calibration:
    return shards_of_rows(tokens() if rows is None else rows, dist_lab.init_mesh()["dp"])


def with_outliers(dtype: torch.dtype = torch.float64, columns: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs (N, D) of which a few are large, and a weight (F, D)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, columns, generator=generator, dtype=dtype)
    x[:, ::9] *= 20
    return x, torch.randn(24, columns, generator=generator, dtype=dtype)


def inputs(x: Tensor) -> Inputs:
    return Inputs(2 * x.T @ x, x.abs().sum(0))


def quantized(model: nn.Module, calibration: Calibration, scheme: Scheme, **options):
    result = awq.quantize(model, calibration, scheme, **options)
    return dict(model.named_parameters()), result.weights


# --- over ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "ranks"),
    [
        pytest.param(Scheme(4, symmetric=True), 2, marks=pytest.mark.ranks(2)),
        pytest.param(Scheme(3, 8), 4, marks=pytest.mark.ranks(4)),
    ],
    ids=str,
)
def test_ranks_find_the_bits_of_one_process(mesh, scheme, ranks):
    rows = tokens()
    ours, weights = quantized(gpt(torch.float32), shards_of_rows(rows, mesh["dp"]), scheme)
    whole = Calibration(list(rows.chunk(8)), mesh["tp"])  # an axis of size 1
    theirs, expected = quantized(gpt(torch.float32), whole, scheme)
    assert all(p.equal(theirs[name]) for name, p in ours.items())
    for name, w in expected.items():
        assert w.codes.equal(weights[name].codes)
        assert w.grid.scale.equal(weights[name].grid.scale)
        assert w.grid.zero.equal(weights[name].grid.zero)


@pytest.mark.ranks(2)
def test_scales_of_one_ranks_rows_are_others(mesh):
    """The trap: rank 0's inputs are not all inputs."""
    rows = tokens()
    rows[4:] %= 7
    model = gpt()
    fed = read_plan(model, None)[0]
    own = rows.chunk(2)[mesh.rank]
    scales = []
    for calibration in (shards_of_rows(rows, mesh["dp"]), Calibration([own], mesh["tp"])):
        known = inputs_of(next(walk(model, calibration)), calibration)
        scales.append(scale_of(known[fed.linears[0]].magnitude, fed, 0.5))
    assert (scales[0] / scales[1] - 1).abs().max() > 0.02


# --- what is computed -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("build", [gpt, mlp])
def test_with_its_scales_and_no_rounding_the_logits_are_the_same(build):
    model, calibration = build().eval(), alone()
    before = model(tokens())
    moved = 0
    for block in walk(model, calibration):
        feds = [f for f in read_plan(model, None) if f.linears[0].startswith(f"{block.name}.")]
        known = inputs_of(block, calibration)
        for fed, scale in searched(model, feds, known, Scheme(2, 8), calibration):
            fold(model, fed, scale)
            moved += bool((scale != 1).any())
    assert moved > 0
    assert (model(tokens()) - before).abs().max() < 1e-12 * before.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("build", [gpt, mlp])
def test_the_model_computes_with_the_values_of_the_codes(build):
    model = build(torch.float32)
    parameters, weights = quantized(model, alone(), Scheme(3, 8))
    names = {f"{b}.{n}" for b, module in blocks_of(model) for n in linears_of(module)}
    assert set(weights) == names
    assert all(parameters[f"{n}.weight"].equal(w.values()) for n, w in weights.items())


def test_the_first_alpha_is_rounding():
    assert ALPHAS[0] == 0
    x, weight = with_outliers()
    scale = scale_of(inputs(x).magnitude, PLAIN, 0.0)
    assert scale.equal(torch.ones_like(scale))
    for scheme in SCHEMES:
        error = scaled_error(weight, scale, inputs(x).hessian, scheme)
        change = round_to_nearest(weight, scheme).values() - weight
        assert error == output_error(change, inputs(x).hessian)


@torch.no_grad()
def test_without_alphas_and_ranges_it_is_rounding(monkeypatch):
    monkeypatch.setattr(awq, "ALPHAS", [0.0])
    model, rounded = gpt(torch.float32), gpt(torch.float32)
    _, weights = quantized(model, alone(), Scheme(3, 8), clip=False)
    for name, w in weights.items():
        expected = round_to_nearest(rounded.get_parameter(f"{name}.weight"), Scheme(3, 8))
        assert w.codes.equal(expected.codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_its_error_is_that_of_the_outputs_and_the_least_of_its_alphas(scheme):
    x, weight = with_outliers()
    scale, alpha = best_scale([weight, weight[:5] * 3], inputs(x), PLAIN, scheme)

    def error(alpha: float) -> float:  # of the outputs themselves
        s = scale_of(inputs(x).magnitude, PLAIN, alpha)
        return sum(
            float(((x / s) @ round_to_nearest(w * s, scheme).values().T - x @ w.T).square().sum())
            for w in (weight, weight[:5] * 3)
        )

    errors = {alpha: error(alpha) for alpha in ALPHAS}
    assert errors[alpha] == pytest.approx(min(errors.values()))
    assert 0 < alpha < 1
    assert errors[alpha] < 0.7 * errors[0]  # a few inputs are large
    own = sum(scaled_error(w, scale, inputs(x).hessian, scheme) for w in (weight, weight[:5] * 3))
    assert own == pytest.approx(errors[alpha])


@pytest.mark.slow
@torch.no_grad()
def test_ranges_are_chosen_for_the_inputs_after_folding():
    """Which are those of before, divided by the scale: the block does not run again."""
    scheme, calibration = Scheme(3, 8), alone()
    _, weights = quantized(gpt(), calibration, scheme)
    model = gpt()
    feds = [f for f in read_plan(model, None) if "layers.0." in f.source]
    block = next(walk(model, calibration))
    for fed, scale in searched(model, feds, inputs_of(block, calibration), scheme, calibration):
        fold(model, fed, scale)
    again = inputs_of(block, calibration)
    for name, linear in linears_of(block.module).items():
        name = f"{block.name}.{name}"
        expected = clipped(linear.weight, again[name].hessian, scheme)
        assert (expected.codes == weights[name].codes).double().mean() > 0.999


# --- the range ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_narrower_ranges_are_never_worse_in_any_row(scheme):
    x, weight = with_outliers()
    hessian = inputs(x).hessian
    rows = zip(
        clipped(weight, hessian, scheme).values() - weight,
        round_to_nearest(weight, scheme).values() - weight,
        strict=True,
    )
    errors = torch.tensor(
        [[output_error(change[None], hessian) for change in pair] for pair in rows]
    )
    if scheme.group is None:  # the range is that of all rows
        errors = errors.sum(0, keepdim=True)
    assert (errors[:, 0] <= errors[:, 1] * (1 + 1e-12)).all()
    assert errors[:, 0].sum() < 0.95 * errors[:, 1].sum()


def test_the_range_of_a_row_is_the_best_of_all_tried():
    x, weight = with_outliers()
    hessian, scheme = inputs(x).hessian, Scheme(3)
    low, high = bounds(weight, scheme)

    def errors(ratio: float) -> Tensor:
        change = grid_between(low * ratio, high * ratio, scheme, 32).rounded(weight) - weight
        return ((change @ hessian) * change).sum(1) / 2

    tried = torch.stack([errors(ratio) for ratio in [1.0, *awq.SHRINKS]])
    change = clipped(weight, hessian, scheme).values() - weight
    torch.testing.assert_close(((change @ hessian) * change).sum(1) / 2, tried.min(0).values)


def test_groups_see_each_others_errors():
    """With ranges chosen for each group alone, the error of two groups together can be larger."""
    x = with_outliers()[0][:, :1].repeat(1, 16) + 0.1 * with_outliers(columns=16)[0]
    weight, hessian = with_outliers(columns=16)[1], inputs(x).hessian
    alone = torch.block_diag(hessian[:8, :8], hessian[8:, 8:])
    errors = [
        output_error(clipped(weight, h, Scheme(3, 8)).values() - weight, hessian)
        for h in (hessian, alone)
    ]
    assert errors[0] < errors[1]


# --- what may come --------------------------------------------------------------------------------


@torch.no_grad()
def test_dead_channels_and_zero_weights_have_no_nan():
    model = gpt(torch.float32)
    layer = model.model.layers["0"]
    layer.input_layernorm.weight[::3] = 0  # inputs of q, k and v that are always 0
    layer.self_attn.v_proj.weight.zero_()  # so are all inputs of o
    layer.mlp.down_proj.weight.zero_()
    result = awq.quantize(model, alone(), Scheme(3, 8))
    weights, parameters = result.weights, dict(model.named_parameters())
    assert "model.layers.0.self_attn.k_proj: 11 inputs are 0 in all samples" in result.notes
    assert all(p.isfinite().all() for p in parameters.values())
    assert all(w.grid.scale.isfinite().all() for w in weights.values())
    assert model(tokens()).isfinite().all()


@pytest.mark.slow
def test_one_row_is_enough():
    quantized(
        gpt(torch.float32), shards_of_rows(tokens(1), dist_lab.init_mesh()["dp"], 1), Scheme(4)
    )


def test_models_that_cannot_be_scaled_are_refused():
    class Plain(nn.Sequential):
        units = (nn.Linear,)

    model = Plain(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"^Plain has no scale_plan\(\), which says what feeds"):
        awq.quantize(model, alone(), Scheme(4))


@torch.no_grad()
def test_inputs_that_are_not_finite_are_refused():
    model = gpt(torch.float32)
    model.model.layers["0"].input_layernorm.weight[3] = 3e38
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj are not finite on the cal"):
        awq.quantize(model, alone(), Scheme(4), plan={})


@pytest.mark.parametrize("name", ["layers.0.input_layernorm", "layers.1.mlp.up_proj"])
@pytest.mark.parametrize("method", [awq, smoothquant], ids=["awq", "smoothquant"])
@torch.no_grad()
def test_a_weight_that_is_not_finite_is_named_and_not_the_calibration_data(method, name):
    model = gpt(torch.float32)
    model.get_parameter(f"model.{name}.weight").view(-1)[3] = torch.nan
    with pytest.raises(UserError, match=rf"^model\.{name}\.weight: 1 of \d+ values are not finite"):
        method.quantize(model, alone(), Scheme(8, symmetric=True))


@pytest.mark.slow
@torch.no_grad()
def test_an_empty_plan_chooses_ranges_only():
    model = gpt(torch.float32)
    norm = model.model.layers["0"].input_layernorm.weight.clone()
    quantized(model, alone(), Scheme(3, 8), plan={})
    assert model.model.layers["0"].input_layernorm.weight.equal(norm)


@pytest.mark.parametrize(("bits", "seed"), [*itertools.product((3, 4, 8), (0, 1))])
def test_scales_are_those_of_torchao(bits: int, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        core = pytest.importorskip("torchao.prototype.awq.core")
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 64, generator=generator) * torch.logspace(-1, 1, 64)
        weight = torch.randn(48, 64, generator=generator)
        config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32))
        observer = core.AWQObserver(weight, None, config)
        observer(x, None)
        theirs = observer.calculate_qparams()
    fed = Fed("norm", ("linear",), 64)
    ours, _ = best_scale([weight], inputs(x), fed, Scheme(bits, 32, symmetric=True))
    torch.testing.assert_close(ours, theirs)
