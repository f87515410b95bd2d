"""Every code point of the small formats is torch's, and so is every rounding."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dist_lab.quantize.lowp.formats import (
    E2M1,
    E4M3,
    E5M2,
    Format,
    decode_e8m0,
    encode_e8m0,
    power_below,
)

TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
BOTH = pytest.mark.parametrize("number_format", TORCH, ids=lambda f: f.name)
ALL = pytest.mark.parametrize("number_format", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def numbers(number_format: Format, dtype: torch.dtype = torch.float64) -> Tensor:
    """All numbers of the format from 0 to its largest."""
    x = number_format.decode(torch.arange(2 ** (number_format.bits - 1)), dtype)
    return x[x.isfinite()]


def around_the_middles(number_format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every number, every middle between two, and both neighbors of each in the dtype."""
    x = numbers(number_format, dtype)
    points = torch.cat([x, (x[1:] + x[:-1]) / 2])
    inf = torch.full_like(points, torch.inf)
    points = torch.cat([points, points.nextafter(inf), points.nextafter(-inf)])
    return torch.cat([points, -points])


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, signs of zeros included; any NaN is equal to any other."""
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


@BOTH
def test_all_256_codes_stand_for_the_numbers_of_torch(number_format):
    expected = ALL_CODES.view(TORCH[number_format])
    for dtype in (torch.float32, torch.float64):
        decoded = number_format.decode(ALL_CODES, dtype)
        assert decoded.dtype == dtype
        assert same(decoded, expected.to(dtype))


def test_all_16_codes_of_e2m1_are_those_of_the_specification():
    positive = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP MX v1.0, table 5
    expected = torch.tensor([*positive, *(-x for x in positive)])
    assert same(E2M1.decode(torch.arange(16)), expected)
    assert E2M1.encode(expected).tolist() == list(range(16))


def test_all_256_codes_of_e8m0_are_those_of_torch():
    expected = ALL_CODES.view(torch.float8_e8m0fnu).float()
    assert same(decode_e8m0(ALL_CODES), expected)
    assert torch.equal(encode_e8m0(expected), ALL_CODES)
    assert torch.equal(encode_e8m0(expected.double()), ALL_CODES)


@BOTH
def test_rounding_has_the_bits_of_torchs_casts_at_every_number_and_middle(number_format):
    x = around_the_middles(number_format)
    cast = x.to(TORCH[number_format])
    assert same(number_format.rounded(x), cast.float())
    assert torch.equal(number_format.encode(x), cast.view(torch.uint8))


@BOTH
def test_rounding_has_the_bits_of_torchs_casts_on_random_numbers_of_all_sizes(number_format):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-40, 20, (20_000,), generator=generator)
    x = torch.ldexp(torch.randn(20_000, generator=generator), exponents)
    x = x[x.abs() <= number_format.max]
    cast = x.to(TORCH[number_format])
    assert same(number_format.rounded(x), cast.float())
    assert torch.equal(number_format.encode(x), cast.view(torch.uint8))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_middle_goes_to_the_even_code_and_its_neighbors_to_the_nearest(number_format, dtype):
    x = numbers(number_format, dtype)
    for code, (low, high) in enumerate(pairwise(x)):
        middle = (low + high) / 2
        near = torch.stack([middle.nextafter(low), middle, middle.nextafter(high)])
        codes = [code, code + code % 2, code + 1]
        assert number_format.encode(near).tolist() == codes
        assert torch.equal(number_format.rounded(near), x[codes])


@ALL
def test_numbers_keep_their_codes(number_format):
    codes = torch.arange(2**number_format.bits)
    x = number_format.decode(codes, torch.float64)
    finite = x.isfinite()
    assert torch.equal(number_format.encode(x)[finite], codes[finite].to(torch.uint8))
    assert same(number_format.rounded(x)[finite], x[finite])


@ALL
def test_large_numbers_saturate_and_so_does_infinity(number_format):
    x = torch.tensor([number_format.max * 1.001, 1e30, torch.inf])
    for values in (x, -x, x.double()):
        assert (number_format.rounded(values).abs() == number_format.max).all()
        decoded = number_format.decode(number_format.encode(values))
        assert torch.equal(decoded, number_format.rounded(values).float())


@BOTH
def test_nan_stays_nan(number_format):
    nan = torch.tensor([torch.nan, -torch.nan])
    assert number_format.rounded(nan).isnan().all()
    codes = number_format.encode(nan)
    assert torch.equal(codes, nan.to(TORCH[number_format]).view(torch.uint8))
    assert number_format.decode(codes).isnan().all()


def test_a_float64_is_rounded_once():
    """A little above a middle, by less than a float32 can tell: torch's cast takes it for one."""
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)  # between 1 and 1.125
    assert E4M3.rounded(x).item() == 1.125
    assert x.to(torch.float8_e4m3fn).double().item() == 1.0


def test_the_power_below_a_number_is_exact():
    x = torch.tensor([1.0, 1.999, -2.0, 3e-38, 0.0, 0.3])
    assert power_below(x).tolist() == [1, 1, 2, 2.0**-125, 0, 0.25]
    assert power_below(x.double())[5].item() == 0.25


@ALL
def test_max_exponent_and_smallest_are_those_of_the_numbers(number_format):
    x = numbers(number_format)
    assert x.max() == number_format.max
    assert x[1] == number_format.smallest
    assert (
        2.0**number_format.max_exponent
        <= number_format.max
        < 2.0 ** (number_format.max_exponent + 1)
    )
