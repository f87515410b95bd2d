"""Blocks with a scale: elements, scales and codes are those of the specifications."""

import math

import pytest
import torch
from torch import Tensor

from dist_lab.quantize.lowp.blocks import Codec, as_matrix, as_tiles
from dist_lab.quantize.lowp.codecs import CODECS
from dist_lab.quantize.lowp.formats import E2M1, E4M3, E5M2, decode_e8m0

NAMES = {  # each codec once
    getattr(codecs, operand): f"{codecs.name} {operand}"
    for codecs in CODECS.values()
    for operand in ("weight", "dy", "x")
}
EACH = pytest.mark.parametrize("codec", NAMES, ids=NAMES.get)


def matrix(rows: int = 48, columns: int = 160, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of zeros, one of a single large value."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-5, 3, rows)[:, None]
    x[3], x[5, 1:] = 0, 0
    return x


def nearest_e2m1(x: float) -> float:
    """By search, ties to the even mantissa: 0, 1, 2 and 4."""
    numbers = [0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0]
    return math.copysign(min(numbers, key=lambda number: abs(abs(x) - number)), x)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_mx_has_the_scales_and_elements_of_the_specification(name):
    x, codec = matrix(12, 64), CODECS[name].x
    coded = codec(x)
    for row in range(x.size(0)):
        for block in range(x.size(1) // 32):
            values = x[row, 32 * block :][:32]
            largest = float(values.abs().max())
            emax = 8 if name == "mxfp8" else 2
            scale = 2.0 ** (math.floor(math.log2(largest)) - emax) if largest else 2.0**-127
            assert float(coded.scale[row, block]) == scale
            if name == "mxfp8":
                scaled = (values / scale).clamp(-448, 448)
                elements = scaled.to(torch.float8_e4m3fn).float()
            else:
                elements = torch.tensor([nearest_e2m1(float(v) / scale) for v in values])
            assert torch.equal(coded.elements[row, 32 * block :][:32], elements)
    assert torch.equal(decode_e8m0(coded.stored_scale()), coded.scale)


def test_nvfp4_has_a_scale_in_e4m3_and_one_for_the_matrix():
    x = matrix()
    coded = CODECS["nvfp4"].x(x)
    assert float(coded.outer) == float(x.abs().max() / (6 * 448))
    largest = x.view(48, 10, 16).abs().amax(-1) / coded.outer
    assert torch.equal(coded.scale, (largest / 6).to(torch.float8_e4m3fn).float())
    assert torch.equal(E4M3.decode(coded.stored_scale()), coded.scale)
    assert (coded.scale == 0).any()  # blocks that are too small: their elements are 0
    assert (coded.elements.view(48, 10, 16)[coded.scale == 0] == 0).all()


@pytest.mark.parametrize(("name", "cast"), [("x", torch.float8_e4m3fn), ("dy", torch.float8_e5m2)])
def test_one_scale_for_the_matrix_has_the_bits_of_torchs_cast(name, cast):
    x, top = matrix(), torch.finfo(cast).max
    coded = getattr(CODECS["fp8"], name)(x)
    assert float(coded.outer) == float(x.abs().max() / top)
    assert torch.equal(coded.elements, (x / coded.outer).clamp(-top, top).to(cast).float())
    assert torch.equal(coded.codes(), coded.elements.to(cast).view(torch.uint8))


def test_blocks_of_128_have_the_scale_of_their_largest_value():
    x = matrix(256, 256)
    rows, squares = (codec(x) for codec in (CODECS["fp8-block"].x, CODECS["fp8-block"].weight))
    assert torch.equal(rows.scale[7, 1], x[7, 128:].abs().max() / 448)
    assert torch.equal(squares.scale[1, 0], x[128:, :128].abs().max() / 448)


@EACH
def test_codes_and_scales_are_all_that_is_needed(codec):
    coded = codec(matrix())
    elements = codec.element.decode(coded.codes())
    assert torch.equal(elements, coded.elements)
    scale = coded.stored_scale()
    if scale.dtype == torch.uint8:
        scale = decode_e8m0(scale) if codec.outer is None else E4M3.decode(scale)
    again = type(coded)(codec, elements, scale, coded.outer)
    assert torch.equal(again.values(), coded.values())


@EACH
def test_a_coded_matrix_is_near_and_coding_it_again_changes_nothing(codec):
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))  # no multiple of a block
    coded = codec(x)
    assert coded.elements.shape == x.shape
    error = (coded.values() - x).norm() / x.norm()
    assert error < {E4M3: 0.04, E5M2: 0.08, E2M1: 0.16}[codec.element]
    if codec.block is None:  # given the same scale
        assert torch.equal(codec(coded.values(), x.abs().max()).elements, coded.elements)
    elif codec.outer is None:
        torch.testing.assert_close(
            codec(coded.values()).values(), coded.values(), rtol=3e-7, atol=0
        )


@pytest.mark.parametrize("name", [n for n in CODECS if "pow2" in n or n.startswith("mx")])
def test_scales_that_are_powers_of_two_change_no_digit(name):
    for x in (matrix(), matrix().double() / 3):
        for codec in (CODECS[name].x, CODECS[name].weight, CODECS[name].dy):
            coded = codec(x)
            scales = coded.outer if codec.outer is not None else coded.scale
            assert (torch.frexp(scales)[0] == 0.5).all()
            assert coded.values().dtype == x.dtype


def test_a_power_of_two_is_the_smallest_with_which_all_values_fit():
    codec = CODECS["fp8-pow2"].x
    for largest, scale in ((448, 1), (448.1, 2), (447, 1), (224, 0.5), (225, 1)):
        assert codec(torch.tensor([[1.0, largest]])).outer == scale


@EACH
def test_zeros_have_the_value_zero(codec):
    for x in (torch.zeros(32, 32), torch.zeros(0, 32)):
        assert torch.equal(codec(x).values(), x)


@EACH
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_makes_its_block_nan(codec, bad):
    x = matrix(256, 256)
    x[0, 0] = bad
    nan = codec(x).values().isnan()
    r, c = codec.block or (256, 256)
    assert nan[:r, :c].all()
    if codec.outer is None:
        assert nan.sum() == r * c


@EACH
def test_a_part_is_coded_like_the_whole_given_its_largest_value(codec):
    x = matrix(256, 256)
    whole = codec(x)
    for part in (slice(0, 128), slice(128, 256)):
        for index in ((part, slice(None)), (slice(None), part)):
            coded = codec(x[index], x.abs().max())
            assert torch.equal(coded.values(), whole.values()[index])


def test_tiles_are_padded_with_zeros():
    x = torch.arange(15.0).view(3, 5)
    tiles = as_tiles(x, (2, 4))
    assert tiles.shape == (2, 2, 2, 4)
    assert tiles.sum() == x.sum()
    assert torch.equal(as_matrix(tiles, x.shape), x)


def test_bits_are_those_of_elements_and_scales():
    bits = {name: CODECS[name].x.bits for name in ("fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4")}
    assert bits == {"fp8": 8, "fp8-block": 8.25, "mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5}
    assert isinstance(CODECS["nvfp4"].weight, Codec)
