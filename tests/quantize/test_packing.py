"""AutoGPTQ's packing: words computed by hand, an unpacker from the formulas, and round trips."""

import itertools
from dataclasses import replace

import pytest
import torch
from quantized import stored_matrix

from dist_lab.errors import UserError
from dist_lab.quantize.formula import WIDTHS, Grid, Quantized, Scheme, round_to_nearest
from dist_lab.quantize.packing import (
    as_stored,
    check_storable,
    pack,
    pack_words,
    unpack,
    unpack_words,
)


def quantized(bits, symmetric=False, group=8, act_order=False, dtype=torch.float32, shape=(96, 64)):
    """A random matrix as it is stored; `act_order`: its columns are shuffled, with their groups."""
    scheme = Scheme(bits, group, symmetric)
    return stored_matrix(scheme, shape, dtype, act_order=act_order, dead=8)


def equal(a: Quantized, b: Quantized) -> bool:
    pairs = [
        (a.codes, b.codes), (a.grid.scale, b.grid.scale), (a.grid.zero, b.grid.zero),
        (a.grid.groups, b.grid.groups),
    ]  # fmt: skip
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    return same and a.grid.scheme == b.grid.scheme


# Codes 0, 1, 2, 3, ... modulo 2^b, one column. Each word by hand, from its last code to its first.
BY_HAND = {
    2: [0b_11_10_01_00_11_10_01_00_11_10_01_00_11_10_01_00] * 2,
    3: [
        # 10 = 2 has bits 010: its low two, and then codes 9 to 0
        0b_10_001_000_111_110_101_100_011_010_001_000,
        # the low bit of 21 = 5 (101), codes 20 = 4 to 11 = 3, and the high bit of 10, which is 0
        0b_1_100_011_010_001_000_111_110_101_100_011_0,
        # codes 31 = 7 to 22 = 6, and the high two bits of 21
        0b_111_110_101_100_011_010_001_000_111_110_10,
    ],
    4: [0x76543210, 0xFEDCBA98] * 2,
    8: [0x03020100 + 0x04040404 * word for word in range(8)],
}


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_computed_by_hand(bits):
    codes = (torch.arange(32) % 2**bits)[:, None].to(torch.uint8)
    words = pack_words(codes, bits)
    assert [word & 0xFFFFFFFF for word in words.flatten().tolist()] == BY_HAND[bits]
    assert torch.equal(unpack_words(words, bits, 32), codes)


def from_the_formulas(words: torch.Tensor, bits: int) -> list[list[int]]:
    """Read the codes of each column from its words as one number of 32 x words bits."""
    columns = []
    for column in words.t().tolist():
        number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(column))
        columns.append([number >> bits * k & 2**bits - 1 for k in range(32 * len(column) // bits)])
    return columns


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_an_unpacker_from_the_published_formulas_reads_the_values(bits, symmetric, act_order):
    stored = quantized(bits, symmetric, 32, act_order)
    packed = pack(stored)
    assert packed.format == "gptq"
    assert packed.scales.dtype == torch.float16
    codes = torch.tensor(from_the_formulas(packed.qweight, bits)).t()  # (D, F)
    zeros = torch.tensor(from_the_formulas(packed.qzeros.t(), bits)) + 1  # (G, F)
    groups = packed.g_idx.long()
    values = packed.scales.float()[groups] * (codes - zeros[groups])
    assert torch.equal(values.t(), stored.values())
    if symmetric:
        assert (zeros == 2 ** (bits - 1)).all()


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "act_order"),
    list(itertools.product(WIDTHS, (False, True), (None, -1, 8, 32), (False, True))),
)
def test_a_packed_matrix_is_unpacked_with_the_same_bits(bits, symmetric, group, act_order):
    for shape in ((96, 64), (7, 24)):  # the second fills no block
        stored = quantized(
            bits, symmetric, group if group != 32 else shape[1], act_order, shape=shape
        )
        assert equal(unpack(pack(stored), torch.float32), stored)


def test_as_stored_rounds_scales_once_and_moves_no_other_value():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    exact = round_to_nearest(weight, Scheme(4, 8))
    stored = as_stored(exact)
    assert not torch.equal(stored.values(), exact.values())
    assert torch.equal(stored.grid.scale, exact.grid.scale.half().float())
    assert equal(as_stored(stored), stored)
    in_32_bits = as_stored(exact, torch.float32)
    assert torch.equal(in_32_bits.values(), exact.values())
    assert pack(in_32_bits).scales.dtype == torch.float32


def test_scales_that_are_rounded_before_the_codes_are_chosen_stay_as_they_are():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    before = round_to_nearest(weight, Scheme(4, 8, scale_dtype=torch.float16))
    assert torch.equal(as_stored(before).values(), before.values())
    after = as_stored(round_to_nearest(weight, Scheme(4, 8)))
    errors = [float((each.values() - weight).pow(2).sum()) for each in (before, after)]
    assert errors[0] < errors[1]


def test_a_group_of_zeros_needs_no_zero_of_0_and_one_of_positive_weights_does():
    weight = torch.zeros(32, 64)
    stored = as_stored(round_to_nearest(weight, Scheme(4, 8)))
    assert (stored.grid.zero == 1).all()
    assert torch.equal(stored.values(), weight)
    assert pack(stored).format == "gptq"
    weight[:, 8:16] = 1 + torch.rand(32, 8)
    stored = as_stored(round_to_nearest(weight, Scheme(4, 8)))
    assert pack(stored).format == "gptq_v2"
    assert equal(unpack(pack(stored), torch.float32), stored)
    # What a reader of the format "gptq" would make of such a zero.
    misread = replace(pack(stored), format="gptq", qzeros=pack_words(
        (stored.grid.zero - 1).int() & 15, 4).t())  # fmt: skip
    assert (misread.zeros()[1] == 16).all()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: check_storable((64, 100), "mlp.up"),
            "mlp.up has 100 inputs, and AutoGPTQ's format packs 32 at a time; train a model whose "
            "widths are multiples of 32, such as 96",
        ),
        (lambda: check_storable((33, 64), "q"), "q has 33 outputs, and AutoGPTQ's format packs 32"),
        (
            lambda: pack_words(torch.full((32, 1), 9), 3),
            "codes from 9 to 9 do not fit into 3 bits without a sign; give codes from 0 to 7",
        ),
        (lambda: pack_words(torch.full((32, 1), -1), 4), "codes from -1 to -1 do not fit into 4"),
        (lambda: pack_words(torch.ones(32, 1), 9), "bits=9 is no width of a code; give 2, 3, 4"),
        (
            lambda: pack(round_to_nearest(torch.randn(32, 32), Scheme(4, None))),
            "evaluate and pack as_stored(quantized)",
        ),
        (
            lambda: pack(
                Quantized(
                    torch.zeros(1, 1, dtype=torch.uint8),
                    Grid(
                        Scheme(4, scale_dtype=torch.float16), torch.tensor([[0.1]]),
                        torch.tensor([[1.0]]), torch.zeros(1, dtype=torch.int32),
                    ),
                )
            ),
            "the scales are not torch.float16 ones",
        ),
        (
            lambda: as_stored(round_to_nearest(torch.full((2, 4), 1e-9), Scheme(4))),
            "2 of 2 scales, from 6.7e-11 to 6.7e-11, have no nearest number in torch.float16",
        ),
        (
            lambda: as_stored(round_to_nearest(torch.full((2, 4), 1e9), Scheme(4))),
            "have no nearest number in torch.float16",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_one_line(make, line):
    with pytest.raises(UserError) as refusal:
        make()
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)
