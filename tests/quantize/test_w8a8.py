"""Products of 8-bit codes are those of exact integers, and smoothed models compute the same."""

import itertools
import warnings

import pytest
import torch
from models import VOCAB, gpt, mlp
from torch import Tensor, nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.quantize import smoothquant, w8a8
from dist_lab.quantize.activations import WIDEST, ActivationGrid, check_width, integer_linear
from dist_lab.quantize.calibrate import Calibration, observe, shards_of_rows, walk
from dist_lab.quantize.folding import Fed, read_plan
from dist_lab.quantize.formula import Quantized, Scheme, grid_of, round_to_nearest
from dist_lab.quantize.linear import FEW_ROWS, QuantizedLinear, replace_linears
from dist_lab.quantize.observers import MinMax, Percentile
from dist_lab.quantize.smoothquant import smooth, smoothing_scale
from dist_lab.torch_private import int8_matmul

METHODS = {"w8a8": w8a8.quantize, "smoothquant": smoothquant.quantize}
ROWS = Scheme(8, symmetric=True)  # of weights
KINDS = list(itertools.product((-1, None), (True, False)))  # of inputs: group, symmetric


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(rows: int = 8, length: int = 12) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def alone() -> Calibration:
    return shards_of_rows(tokens(), dist_lab.init_mesh()["dp"])


def codes(x: Tensor, group: int | None, symmetric: bool) -> Quantized:
    scheme = Scheme(8, group, symmetric)
    grid = grid_of(x, scheme)
    static = ActivationGrid(scheme, grid.scale, grid.zero) if group is None else None
    return (static or ActivationGrid(scheme)).quantized(x)


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "symmetric"), KINDS)
@pytest.mark.parametrize("shape", [(1, 7, 5), (40, 129, 33), (3, 4096, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_the_scaled_sums_of_exact_integers(shape, group, symmetric, dtype):
    rows, columns, outputs = shape
    x = codes(random(rows, columns, dtype=dtype) + 0.7, group, symmetric)
    weight = round_to_nearest(random(outputs, columns, seed=1, dtype=dtype), ROWS)
    q, p = x.codes.long() - x.grid.zero.long(), weight.codes.long()
    sums = q @ p.T  # int64
    assert sums.abs().max() < 2**31
    expected = sums.to(dtype) * (x.grid.scale * weight.grid.scale.T)
    assert integer_linear(x, weight).equal(expected)
    in_floats = x.values().double() @ weight.values().double().T
    assert (expected.double() - in_floats).abs().max() < 1e-5 * in_floats.abs().max()


def test_the_order_of_the_inputs_does_not_matter():
    x, weight = codes(random(9, 300), -1, False), round_to_nearest(random(17, 300, seed=1), ROWS)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    shuffled = integer_linear(
        Quantized(x.codes[:, order], x.grid), Quantized(weight.codes[:, order], weight.grid)
    )
    assert shuffled.equal(integer_linear(x, weight))


@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_widest_layer_does_not_overflow(extreme):
    check_width(WIDEST)
    assert WIDEST * 255 * 128 < 2**31 <= (WIDEST + 1) * 255 * 128
    with pytest.raises(UserError, match=f"^{WIDEST + 1} inputs x 255 x 128 is more than a sum"):
        check_width(WIDEST + 1)
    grid = grid_of(random(2, WIDEST), ROWS)
    p = torch.full((2, WIDEST), extreme, dtype=torch.int8)
    inputs = grid_of(torch.cat([random(2, WIDEST - 1).abs(), torch.ones(2, 1)], 1), Scheme(8))
    assert not inputs.zero.any()  # all are positive: q - z reaches 255
    q = torch.full((2, WIDEST), 255, dtype=torch.uint8)
    result = integer_linear(Quantized(q, inputs), Quantized(p, grid))
    exact = torch.full((2, 2), WIDEST * 255 * extreme).double()
    assert result.equal(exact * (inputs.scale * grid.scale.T))


def test_sums_are_those_of_the_int8_kernel():
    a, b = (torch.randint(-128, 128, (20, 64), dtype=torch.int8) for _ in range(2))
    assert int8_matmul(a, b.t()).dtype == torch.int32
    assert int8_matmul(a, b.t()).equal(a.int() @ b.int().T)


@pytest.mark.parametrize(("group", "symmetric"), KINDS)
def test_rows_and_columns_of_zeros_give_zeros(group, symmetric):
    x, w = random(6, 40), random(8, 40, seed=1)
    x[2], x[:, 5], w[3], w[:, 7] = 0, 0, 0, 0
    y = integer_linear(codes(x, group, symmetric), round_to_nearest(w, ROWS))
    assert y.isfinite().all()
    assert not y[2].any()
    assert not y[:, 3].any()


@pytest.mark.parametrize(("group", "symmetric"), KINDS)
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 9])
def test_a_layer_with_8_bit_inputs_multiplies_integers(rows, group, symmetric):
    x, bias = random(rows, 64, dtype=torch.float32), random(32, dtype=torch.float32)
    weight = round_to_nearest(random(32, 64, seed=1, dtype=torch.float32), ROWS)
    scheme = Scheme(8, group, symmetric)
    grid = grid_of(x, scheme)
    inputs = ActivationGrid(scheme, *((grid.scale, grid.zero) if group is None else ()))
    layer = QuantizedLinear.from_quantized(weight, bias, inputs)
    expected = integer_linear(Quantized(grid.codes(x), grid), weight) + bias
    assert layer(x).equal(expected)
    assert layer(x[:, None])[:, 0].equal(expected)


# --- methods --------------------------------------------------------------------------------------


@torch.no_grad()
def logits(method: str, inputs: str, calibration: Calibration, build=gpt, **options) -> Tensor:
    model = build(torch.float32).eval()
    result = METHODS[method](model, calibration, ROWS, inputs=inputs, **options)
    replace_linears(model, result.weights, result.inputs)
    return model(tokens())


@pytest.mark.slow_unless(lambda build: build is mlp)
@pytest.mark.parametrize("build", [gpt, mlp])
@pytest.mark.parametrize("inputs", w8a8.KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_logits_stay_near(method, inputs, build):
    with torch.no_grad():
        before = build(torch.float32).eval()(tokens())
    after = logits(method, inputs, alone(), build)
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_choose_the_ranges_of_one_process(mesh, method):
    rows = tokens()
    rows[2:] %= 5  # rank 0 sees other tokens
    one = Calibration(list(rows.chunk(8)), mesh["tp"])  # an axis of size 1

    def percentile(dtype: torch.dtype) -> Percentile:
        return Percentile(99, dtype)  # MinError takes longer

    ours = logits(method, "static", shards_of_rows(rows, mesh["dp"]), observer=percentile)
    assert ours.equal(logits(method, "static", one, observer=percentile))


@torch.no_grad()
def test_smoothing_leaves_the_logits_and_shares_out_the_ranges():
    model, calibration = gpt().eval(), alone()
    layer = model.model.layers["0"]
    layer.input_layernorm.weight[3] = 40  # one input is much larger than the others
    before, spread = model(tokens()), {}

    def largest(block) -> Tensor:
        seen = observe(block, lambda name: MinMax(32, torch.float64))["self_attn.q_proj"]
        return seen.largest()

    for block in walk(model, calibration):
        feds = [f for f in read_plan(model, None) if "norm" in f.source and block.name in f.source]
        spread[block.name] = [largest(block)]
        smooth(model, block, feds, calibration, 0.5)
        spread[block.name].append(largest(block))
    assert (model(tokens()) - before).abs().max() < 1e-12 * before.abs().max()
    old, new = spread["model.layers.0"]
    attention = layer.self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    torch.testing.assert_close(new, torch.cat(weights).abs().amax(0))  # equally large
    assert old.max() / old.median() > 5 * new.max() / new.median()


@torch.no_grad()
@pytest.mark.parametrize("inputs", w8a8.KINDS)
def test_smoothing_helps_if_one_input_is_much_larger(inputs):
    def build(dtype: torch.dtype) -> nn.Module:
        model = gpt(dtype)
        for layer in model.model.layers.values():
            layer.input_layernorm.weight[3] = layer.post_attention_layernorm.weight[3] = 100
            for name in ("q_proj", "k_proj", "v_proj"):
                layer.self_attn.get_parameter(f"{name}.weight")[:, 3] /= 100
            for name in ("gate_proj", "up_proj"):
                layer.mlp.get_parameter(f"{name}.weight")[:, 3] /= 100
        return model

    before = build(torch.float32).eval()(tokens())
    plain, smoothed = (
        (logits(method, inputs, alone(), build) - before).square().mean() for method in METHODS
    )
    assert smoothed < plain / 10


def test_scales_of_dead_channels_are_1():
    fed = Fed("norm", ("linear",), 4)
    weights = [torch.tensor([[0.0, 2.0, 4.0, 1.0]]), torch.tensor([[0.0, -8.0, 1.0, 1.0]])]
    scale = smoothing_scale(torch.tensor([3.0, 2.0, 0.0, 9.0]), weights, fed, 0.5)
    assert scale.tolist() == [1, 0.5, 1, 3]  # sqrt(2 / 8), sqrt(9 / 1)


@pytest.mark.parametrize(
    ("scheme", "options", "line"),
    [
        (Scheme(8, 32), {}, "^weights of bits=8 group=32 symmetric=false have no product of integ"),
        (Scheme(4, symmetric=True), {}, "^weights of bits=4 group=-1 symmetric=true have no prod"),
        (ROWS, {"inputs": "statc"}, r"^inputs='statc' are no ranges; .*\(did you mean static\?\)$"),
    ],
)
def test_what_has_no_integer_product_is_refused(scheme, options, line):
    for quantize in METHODS.values():
        with pytest.raises(UserError, match=line):
            quantize(gpt(torch.float32), alone(), scheme, **options)


def test_smoothing_has_bounds():
    with pytest.raises(UserError, match=r"^alpha=2 is no share; give 0 to 1, such as 0\.5$"):
        smoothquant.quantize(gpt(torch.float32), alone(), ROWS, alpha=2)


def test_layers_are_near_those_of_torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        x, weight = random(20, 64, dtype=torch.float32), random(32, 64, seed=1, dtype=torch.float32)
        theirs = nn.Sequential(nn.Linear(64, 32, bias=False))
        theirs[0].weight = nn.Parameter(weight)
        config = quantization.Int8DynamicActivationInt8WeightConfig(version=2)
        quantization.quantize_(theirs, config)
        expected = theirs(x)
    layer = QuantizedLinear.from_quantized(
        round_to_nearest(weight, ROWS), inputs=ActivationGrid(w8a8.TOKEN)
    )
    # Their scale is max / 127.5 too, but codes are rounded from x / scale, not x * (1 / scale).
    assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()
