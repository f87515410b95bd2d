"""A quantised Linear: products of packed words, replaced Linears, and rounded inputs."""

import copy
import itertools

import pytest
import torch
from quantized import stored_matrix
from torch import nn

from dist_lab.errors import UserError
from dist_lab.observe.memory import LiveBytes
from dist_lab.quantize.formula import WIDTHS, Scheme, grid_of, round_to_nearest
from dist_lab.quantize.linear import FEW_ROWS, ActivationGrid, QuantizedLinear, replace_linears
from dist_lab.quantize.packed_matmul import dequantize, packed_matmul, sorted_by_group
from dist_lab.quantize.packing import as_stored, pack
from dist_lab.zoo import build


def quantized(bits=4, group=32, symmetric=False, act_order=False, shape=(96, 128),
              dtype=torch.float64):  # fmt: skip
    scheme = Scheme(bits, group, symmetric)
    return stored_matrix(scheme, shape, dtype, act_order=act_order)


def inputs(rows, columns=128, dtype=torch.float64):
    return torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("bits", "group", "act_order"),
    list(itertools.product(WIDTHS, (-1, 8, 32, 64), (False, True))),
)
def test_a_product_of_packed_words_is_that_of_the_values(bits, group, act_order):
    for symmetric, shape in itertools.product((False, True), ((96, 128), (7, 64))):
        matrix = quantized(bits, group, symmetric, act_order, shape)
        assert torch.equal(dequantize(pack(matrix), torch.float64), matrix.values())
        weight = sorted_by_group(pack(matrix), tile=64)
        for rows in (1, 5):
            x = inputs(rows, shape[1])
            expected = x @ matrix.values().t()
            assert (packed_matmul(x, weight) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("group", [24, 48, 96, 192])
def test_tiles_fit_groups_of_any_size_or_have_several(group):
    matrix = quantized(4, group, shape=(32, 192))
    weight = sorted_by_group(pack(matrix), tile=64)
    whole_groups = all(tile.groups is not None for tile in weight.tiles)
    assert whole_groups == (group in (96, 192))  # tiles of 32 and of 64
    x = inputs(3, 192)
    expected = x @ matrix.values().t()
    assert (packed_matmul(x, weight) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_short_numbers_are_at_least_float32(dtype):
    matrix = quantized(8, -1, dtype=torch.float32)
    x = inputs(3, dtype=dtype)
    expected = x.double() @ matrix.values().double().t()
    y = packed_matmul(x, sorted_by_group(pack(matrix)))
    assert y.dtype == dtype
    # a tile's product is rounded to dtype once, and so is y
    bound = 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (y - expected).abs().max() <= max(float(bound), 1e-5)


@pytest.mark.parametrize(("group", "act_order"), [(32, False), (128, True), (-1, False), (8, True)])
def test_no_more_than_one_tile_is_unpacked_at_a_time(group, act_order):
    matrix = quantized(4, group, False, act_order, (256, 2048), torch.float32)
    weight = sorted_by_group(pack(matrix), tile=32)
    x = inputs(2, 2048, torch.float32)
    packed_matmul(x, weight)
    with LiveBytes(label=lambda: ("", "")) as live:
        peak_before = live.peak
        packed_matmul(x, weight)
    whole, tile = 4 * 256 * 2048, 4 * 256 * 32
    kept = sum(t.nbytes for t in (weight.words, weight.scales, weight.zeros, x, weight.groups))
    kept += weight.groups.nbytes + 4 * weight.scales.numel()  # the order; scales in float32
    used = live.peak - peak_before - kept
    assert used <= 6 * tile + 3 * x.nbytes
    assert 6 * tile + 3 * x.nbytes < whole / 4


def test_without_act_order_the_words_are_shared_and_with_it_they_are_sorted_once():
    plain = QuantizedLinear.from_quantized(quantized())
    assert plain.sorted_weight().words is plain.qweight
    shuffled = QuantizedLinear.from_quantized(quantized(act_order=True))
    first = shuffled.sorted_weight()
    assert first.order is not None
    assert shuffled.sorted_weight() is first
    assert all(tile.groups is not None for tile in first.tiles)


def test_new_values_of_the_words_are_seen():
    for change in ("load", "assign", "in place"):
        linear = QuantizedLinear.from_quantized(quantized(act_order=True))
        other = QuantizedLinear.from_quantized(quantized(act_order=True, shape=(96, 128)))
        other.qweight = other.qweight.flip(1)
        x = inputs(1)
        linear(x)
        if change == "in place":
            linear.qweight.copy_(other.qweight)
        else:
            linear.load_state_dict(other.state_dict(), assign=change == "assign")
        assert torch.equal(linear(x), copy.deepcopy(other)(x))


def test_many_rows_have_the_bits_of_a_linear_and_few_rows_its_values():
    matrix = quantized(dtype=torch.float32)
    linear = nn.Linear(128, 96)
    linear.weight.data = matrix.values()
    ours = QuantizedLinear.from_quantized(matrix, linear.bias)
    many, few = inputs(FEW_ROWS + 1, dtype=torch.float32), inputs(FEW_ROWS, dtype=torch.float32)
    assert torch.equal(ours(many), linear(many))
    assert torch.equal(ours(many[None]), linear(many[None]))
    trained = few.clone().requires_grad_()  # autograd would keep every tile
    assert torch.equal(ours(trained), linear(trained))
    with torch.no_grad():
        assert (ours(few) - linear(few)).abs().max() < 1e-4
        assert ours(few.view(2, -1, 128)).shape == (2, FEW_ROWS // 2, 96)
        assert ours(few[0]).shape == (96,)


def test_gradients_flow_to_the_input():
    matrix = quantized()
    linear = QuantizedLinear.from_quantized(matrix)
    x = inputs(2).requires_grad_()
    linear(x).sum().backward()
    assert torch.allclose(x.grad, matrix.values().sum(0).expand(2, -1), rtol=0, atol=1e-12)
    assert not list(linear.parameters())


def test_on_the_meta_device_it_has_shapes():
    linear = QuantizedLinear.from_quantized(quantized(act_order=True)).to("meta")
    for rows in (1, FEW_ROWS + 1):
        assert linear(inputs(rows).to("meta")).shape == (rows, 96)


def test_its_dtype_follows_the_module_and_its_words_do_not():
    linear = QuantizedLinear.from_quantized(quantized(dtype=torch.float32), torch.zeros(96))
    values = linear.weight
    linear.double()
    assert linear.dtype == linear.bias.dtype == linear(inputs(1)).dtype == torch.float64
    assert linear.qweight.dtype == torch.int32
    # The product of a code and a scale of 16 bits is exact in float32.
    assert torch.equal(linear.weight, values.double())
    assert "like" not in linear.state_dict()


def test_the_linears_of_a_model_are_replaced_and_its_logits_are_those_of_the_values():
    model = build("gpt", "tiny", vocab=64, layers=1, seed=0, dtype=torch.float64)
    by_values = copy.deepcopy(model)
    weights = {}
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            stored = as_stored(round_to_nearest(linear.weight.detach(), Scheme(4, 32)))
            weights[f"model.layers.{name}"] = stored
            by_values.get_submodule(f"model.layers.{name}").weight.data = stored.values()
    replace_linears(model, weights)
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), QuantizedLinear)
    tokens = torch.randint(64, (2, 33))
    assert torch.equal(model(tokens), by_values(tokens))
    with torch.no_grad():
        assert (model(tokens[:1, :3]) - by_values(tokens[:1, :3])).abs().max() < 1e-12


def test_a_weight_that_does_not_fit_is_refused_in_one_line():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    matrix = as_stored(round_to_nearest(torch.randn(32, 32), Scheme(4)))
    for name, line in [
        ("0", r"0 is no Linear with a weight of shape \(32, 32\)"),
        ("1", "1 is no Linear"),
        ("9", "9 is no Linear"),
    ]:
        with pytest.raises(UserError, match=line):
            replace_linears(model, {name: matrix})
    in_float64 = as_stored(round_to_nearest(torch.randn(32, 64).double(), Scheme(4)))
    with pytest.raises(UserError, match=r"0 computes in torch.float32, and .* are torch.float64"):
        replace_linears(model, {"0": in_float64})


@pytest.mark.parametrize("symmetric", [False, True])
def test_inputs_are_rounded_for_each_row_or_by_a_fixed_range(symmetric):
    matrix, x = quantized(8, -1, True), inputs(FEW_ROWS + 4)
    rows = Scheme(8, -1, symmetric)
    dynamic = QuantizedLinear.from_quantized(matrix, inputs=ActivationGrid(rows))
    assert dynamic.input_scale is None
    rounded = grid_of(x, rows).rounded(x)
    expected = nn.functional.linear(rounded, matrix.values())
    torch.testing.assert_close(dynamic(x), expected, rtol=1e-12, atol=1e-12)  # sums of integers
    one = Scheme(8, None, symmetric)
    grid = grid_of(x, one)
    static = QuantizedLinear.from_quantized(
        matrix, inputs=ActivationGrid(one, grid.scale, grid.zero)
    )
    assert {"input_scale", "input_zero"} <= static.state_dict().keys()
    expected = nn.functional.linear(grid.rounded(x), matrix.values())
    torch.testing.assert_close(static(x[None])[0], expected, rtol=1e-12, atol=1e-12)


def test_going_to_16_bits_and_back_changes_no_weight():
    matrix = round_to_nearest(torch.randn(96, 128), Scheme(4, 32))  # scales of float32
    linear, x = QuantizedLinear.from_quantized(matrix), inputs(1, dtype=torch.float32)
    before = linear(x)
    assert linear.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(linear.float().weight, matrix.values())
    assert torch.equal(linear(x), before)
    linear.scales.mul_(2)
    assert torch.equal(linear(x), 2 * before)


@pytest.mark.parametrize("rounded", [None, Scheme(8, -1, True)])
def test_inputs_of_no_rows_or_of_one_dim_are_those_of_a_linear(rounded):
    grid = rounded and ActivationGrid(rounded)
    for bits in (4, 8):
        matrix = quantized(bits, 32 if bits == 4 else -1, bits == 8, dtype=torch.float32)
        linear = QuantizedLinear.from_quantized(matrix, torch.zeros(96), grid)
        for shape in ((0, 128), (2, 0, 128), (128,)):
            assert linear(torch.ones(shape)).shape == (*shape[:-1], 96)
