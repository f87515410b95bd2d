"""The formula has the bits of PyTorch's own quantisers, in every scheme."""

import itertools

import pytest
import torch

from dist_lab.errors import UserError
from dist_lab.quantize import formula
from dist_lab.quantize.formula import (
    Grid,
    Scheme,
    bounds,
    check_groups,
    grid_of,
    round_to_nearest,
)

# torch is about to remove its quantised tensors; what they compute is still the reference.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
WIDTHS_AND_SIGNS = list(itertools.product(formula.WIDTHS, (False, True)))


def with_ties(rows: int, columns: int, scale: float, seed: int = 0) -> torch.Tensor:
    """Random values, a third of them exactly between two multiples of the scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 40 * scale
    halves = (torch.randint(-200, 200, x.shape, generator=generator) + 0.5) * scale
    return torch.where(torch.rand(x.shape, generator=generator) < 1 / 3, halves, x)


def one_grid(scheme: Scheme, scale: float, zero: int, columns: int) -> Grid:
    return Grid(
        scheme, torch.full((1, 1), scale), torch.full((1, 1), float(zero)),
        scheme.groups_of(columns),
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS_AND_SIGNS)
@pytest.mark.parametrize("scale", [2.0**-4, 0.0371])
def test_rounding_has_the_bits_of_fake_quantize(bits: int, symmetric: bool, scale: float) -> None:
    scheme = Scheme(bits, None, symmetric)
    zero = 0 if symmetric else scheme.high // 2
    x = with_ties(40, 33, scale)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero, scheme.low, scheme.high)
    assert torch.equal(one_grid(scheme, scale, zero, 33).rounded(x), expected)


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS_AND_SIGNS)
def test_rows_have_the_bits_of_fake_quantize_per_channel(bits: int, symmetric: bool) -> None:
    x, scheme = with_ties(40, 33, 0.05), Scheme(bits, symmetric=symmetric)
    grid = grid_of(x, scheme)
    expected = torch.fake_quantize_per_channel_affine(
        x, grid.scale.flatten(), grid.zero.flatten().int(), 0, scheme.low, scheme.high
    )
    assert torch.equal(grid.rounded(x), expected)


@pytest.mark.parametrize("scale", [2.0**-4, 0.0371])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_have_the_bits_of_quantize_per_tensor(scale: float, symmetric: bool) -> None:
    x, scheme = with_ties(40, 64, scale), Scheme(8, None, symmetric)
    zero = 0 if symmetric else 121
    dtype = torch.qint8 if symmetric else torch.quint8
    expected = torch.quantize_per_tensor(x, scale, zero, dtype).int_repr()
    assert torch.equal(one_grid(scheme, scale, zero, 64).codes_added_first(x), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_have_the_bits_of_quantize_per_channel(symmetric: bool) -> None:
    x, scheme = with_ties(40, 33, 0.05), Scheme(8, symmetric=symmetric)
    grid = grid_of(x, scheme)
    dtype = torch.qint8 if symmetric else torch.quint8
    scale, zero = grid.scale.flatten(), grid.zero.flatten().long()
    by_torch = torch.quantize_per_channel(x, scale, zero, 0, dtype)
    # It adds first, too, but in two roundings: it differs from a fused multiply-add there alone.
    differ = by_torch.int_repr() != grid.codes_added_first(x)
    sums = x * (1 / grid.scale) + grid.zero
    assert (((sums - sums.floor()) == 0.5) | ~differ).all()
    assert torch.equal(by_torch.int_repr().float(), sums.round().clamp(scheme.low, scheme.high))
    assert torch.equal(by_torch.dequantize(), grid.values(by_torch.int_repr()))


def test_the_two_roundings_of_torch_differ_on_ties_with_an_odd_zero() -> None:
    grid = one_grid(Scheme(8, None), 1.0, 1, 1)
    x = torch.tensor([[0.5]])
    assert int(grid.codes(x)) == 1 + 0  # round(0.5) = 0
    assert int(grid.codes_added_first(x)) == 2  # round(1.5) = 2


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS_AND_SIGNS)
@pytest.mark.parametrize("group", [None, -1, 1, 8, 32])
def test_errors_are_half_a_step_and_a_whole_one_at_the_ends(
    bits: int, symmetric: bool, group: int | None
) -> None:
    x = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quantized = round_to_nearest(x, Scheme(bits, group, symmetric))
    scale = quantized.grid.column(0).scale if group is None else quantized.grid.scale
    wide = scale.repeat_interleave(32 // scale.size(1), 1)
    error = (quantized.values() - x).abs() / wide
    at_an_end = (quantized.codes == quantized.codes.min()) | (
        quantized.codes == quantized.grid.scheme.high
    )
    assert error[~at_an_end].numel() == 0 or error[~at_an_end].max() <= 0.5 + 1e-9
    assert error.max() <= 1 + 1e-9
    assert quantized.codes.min() >= quantized.grid.scheme.low


def test_more_groups_are_never_worse() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    errors = [
        float((round_to_nearest(x, Scheme(4, group)).values() - x).pow(2).sum())
        for group in (None, -1, 32, 8, 2)
    ]
    assert errors == sorted(errors, reverse=True)


def test_zero_stays_zero_and_zeros_have_no_nan() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    x[0], x[1, :4], x[2] = 0, 0, 1e-42  # a dead row, a dead group, and numbers of no precision
    for scheme in (Scheme(4, 4), Scheme(4), Scheme(4, 4, symmetric=True), Scheme(8, None)):
        values = round_to_nearest(x, scheme).values()
        assert values.isfinite().all()
        assert torch.equal(values[0], torch.zeros(8))
        assert (values[x == 0] == 0).all()


def test_a_scale_that_is_stored_in_16_bits_is_rounded_before_the_codes_are_chosen() -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(5))
    x[0] = 1e-9  # less than half of the smallest float16: its codes are 0
    grid = grid_of(x, Scheme(4, 8, scale_dtype=torch.float16))
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert not torch.equal(grid.scale[1:], grid_of(x, Scheme(4, 8)).scale[1:])
    assert torch.equal(grid.rounded(x)[0], torch.zeros(32))


@pytest.mark.parametrize("factor", [1e-3, 1e-7, 1e-8])
def test_small_weights_are_as_exact_as_scales_of_16_bits_allow(factor: float) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(5)) * factor
    grid = grid_of(x, Scheme(4, 8, scale_dtype=torch.float16))
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert (grid.scale < 1e-3).all()  # none became 1
    within = grid.scale.repeat_interleave(8, 1) * (1 if factor == 1e-3 else 0.5001)
    assert ((grid.rounded(x) - x).abs() <= within).all()


def test_bounds_are_those_of_each_group() -> None:
    x = torch.arange(12.0).view(2, 6)
    low, high = bounds(x, Scheme(4, 3))
    assert low.tolist() == [[0, 3], [6, 9]]
    assert high.tolist() == [[2, 5], [8, 11]]


def test_a_range_that_is_wider_than_float16_has_values() -> None:
    x = torch.tensor([[4e4, -4e4, 1.0, 2.0]])
    for scheme in (Scheme(4), Scheme(2), Scheme(8, symmetric=True)):
        of_half = round_to_nearest(x.half(), scheme)
        assert ((of_half.values().float() - x).abs() <= 0.51 * of_half.grid.scale.float()).all()


def test_a_column_and_some_rows_have_the_grid_of_the_whole() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    for scheme in (Scheme(3, 4), Scheme(3), Scheme(3, None)):
        grid = grid_of(x, scheme)
        columns = [grid.column(d).rounded(x[:, d : d + 1]) for d in range(12)]
        assert torch.equal(torch.cat(columns, 1), grid.rounded(x))
        assert torch.equal(grid.rows(slice(1, 3)).rounded(x[1:3]), grid.rounded(x)[1:3])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Scheme(5), "bits=5 is no width of a code; give 2, 3, 4 or 8"),
        (lambda: Scheme(True), "bits=true is no width of a code; give 2, 3, 4 or 8"),
        (lambda: Scheme(4, 0), "group=0 is no number of columns; give 1 or more, or -1"),
        (
            lambda: grid_of(torch.ones(2, 480), Scheme(4, 100)),
            "480 columns do not divide into groups of 100 (group=100); give 96, or -1",
        ),
        (
            lambda: grid_of(torch.tensor([[1.0, float("nan")]]), Scheme(4)),
            "1 of 2 values are not finite, and have no codes",
        ),
        (
            lambda: grid_of(torch.full((2, 4), 1e6), Scheme(4, scale_dtype=torch.float16)),
            "the largest scale, 6.7e+04, is more than torch.float16 holds, 6.6e+04; give smaller "
            "weights, or in Python scale_dtype=torch.float32",
        ),
        (
            lambda: round_to_nearest(torch.ones(2, 3, 4), Scheme(4)),
            "torch.float32 numbers of shape (2, 3, 4) are no matrix of weights; give one",
        ),
        (lambda: round_to_nearest(torch.ones(8), Scheme(4, 4)), "of shape (8,) are no matrix"),
        (
            lambda: round_to_nearest(torch.arange(8).view(2, 4), Scheme(4)),
            "torch.int64 numbers of shape (2, 4) are no matrix",
        ),
        (
            lambda: round_to_nearest(torch.tensor([[65504.0, -65504.0]]).half(), Scheme(4)),
            "values from -65504 to 65504 have neighbors in 4 bits that float16 does not hold; "
            "quantise in float32: x.float()",
        ),
        (
            lambda: check_groups({"a.q": 128, "a.down": 480}, Scheme(4, 64)),
            "a.down: 480 columns do not divide into groups of 64 (group=64); give 32, which "
            "divides the 128 and 480 columns of all layers, or -1",
        ),
    ],
)
def test_bad_input_is_one_line(make: object, line: str) -> None:
    with pytest.raises(UserError) as error:
        make()  # type: ignore[operator]
    assert line in str(error.value)
