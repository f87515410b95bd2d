"""AutoGPTQ's packing: 32 codes of b bits fill b words of 32 bits.

    qweight[D/32 * b, F]   int32   the codes of a column of W^T, one after another, low bits first
    qzeros[G, F/32 * b]    int32   the zeros, packed along the outputs in the same way
    scales[G, F]           float16 (or another dtype of floating-point numbers)
    g_idx[D]               int32   the group of each input; with act-order in any order

    value[f, d] = scales[g_idx[d], f] * (code[f, d] - zero[g_idx[d], f])

With 2, 4 or 8 bits a word has 16, 8 or 4 whole codes. With 3 bits code 10 has its low two bits in
the first word and the third in the second, and code 21 straddles the second and the third:

    word 0    code 0 | 1 | ... | 9 | low 2 bits of 10      32 = 10 x 3 + 2
    word 1    high bit of 10 | 11 | ... | 20 | low bit of 21     1 + 10 x 3 + 1
    word 2    high 2 bits of 21 | 22 | ... | 31                  2 + 10 x 3

Codes and zeros of the file are unsigned: a signed code c is stored as c + 2^(b-1), and its zero is
2^(b-1). No value changes.

[Note: zero - 1] The format "gptq" stores zero - 1. So it has no zero of 0, which a group of
positive weights needs: readers take 2^b in its place. "gptq_v2" stores the zero itself. We pack in
"gptq" unless there is a zero of 0. A group of zeros (a dead input) does not need one: `as_stored`
adds 1 to its codes and to its zero, which changes no value.

[Note: what is stored is what is evaluated] Rounding scales to 16 bits changes the weights. Choose
codes for the rounded scales: give the Scheme `scale_dtype=torch.float16` before. `as_stored` rounds
the scales of codes that were chosen for others; evaluate its result, not its argument. Scales of
float32 are stored exactly, and no kernel of AutoGPTQ's takes them: ours and its slow path do.

The source is AutoGPTQ's own layer, `QuantLinear.pack` (0.7.1), and for v2 GPTQModel's.

Letters: F outputs, D inputs, G groups, b bits.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_lab.errors import UserError, shown
from dist_lab.quantize.formula import WHOLE, WIDTHS, Grid, Quantized, Scheme, wider

BLOCK = 32  # codes that fill `bits` words
SUBTRACTED = {"gptq": 1, "gptq_v2": 0}  # format -> from each zero: [Note: zero - 1]


@dataclass(frozen=True)
class Packed:
    """A matrix W[F, D] as a file has it; see above. A last block of fewer than 32 has zeros.

    shape: (F, D)
    scheme: with scheme.symmetric all zeros are 2^(b-1)
    format: "gptq" or "gptq_v2"
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    shape: tuple[int, int]
    scheme: Scheme
    format: str = "gptq"

    def codes(self) -> Tensor:
        """(D, F) uint8, the unsigned codes."""
        return unpack_words(self.qweight, self.scheme.bits, self.shape[1])

    def zeros(self) -> Tensor:
        """(G, F) int16, of the unsigned codes."""
        stored = unpack_words(self.qzeros.t(), self.scheme.bits, self.shape[0]).t()
        return stored.to(torch.int16) + SUBTRACTED[self.format]


def pack(quantized: Quantized) -> Packed:
    """Pack a matrix.

    Raises:
        UserError: its scales are not numbers of `scheme.scale_dtype`, or there is only one for the
            whole matrix: `as_stored` changes both.
    """
    scheme, grid = quantized.grid.scheme, quantized.grid
    half = _half(scheme)
    scales = grid.scale.to(scheme.scale_dtype or grid.scale.dtype)
    if scheme.group is None or not torch.equal(scales.to(grid.scale.dtype), grid.scale):
        raise UserError(
            f"the scales are not {scheme.scale_dtype} ones of rows or groups, as a file has them; "
            "evaluate and pack as_stored(quantized)"
        )
    zeros = (grid.zero + half).to(torch.int32)
    format = "gptq_v2" if bool((zeros == 0).any()) else "gptq"
    return Packed(
        qweight=pack_words(quantized.codes.int().t() + half, scheme.bits),
        qzeros=pack_words(zeros - SUBTRACTED[format], scheme.bits).t().contiguous(),
        scales=scales.t().contiguous(),
        g_idx=grid.groups.to(torch.int32, copy=True),
        shape=(quantized.codes.size(0), quantized.codes.size(1)),
        scheme=scheme,
        format=format,
    )


def unpack(packed: Packed, dtype: torch.dtype) -> Quantized:
    """The inverse of `pack`. `dtype`: of the scales in memory, and so of the values."""
    half, scheme = _half(packed.scheme), packed.scheme
    codes = packed.codes().t().to(torch.int16) - half
    zero = (packed.zeros() - half).t().to(dtype).contiguous()
    scale = packed.scales.t().to(dtype).contiguous()
    stored = codes.to(torch.int8 if scheme.symmetric else torch.uint8).contiguous()
    return Quantized(stored, Grid(scheme, scale, zero, packed.g_idx))


def as_stored(quantized: Quantized, scale_dtype: torch.dtype = torch.float16) -> Quantized:
    """The matrix that a file will have: see [Note: what is stored is what is evaluated].

    Scales are rounded to `scale_dtype`, and one for the whole matrix becomes one per row. Doing it
    twice changes nothing.

    Raises:
        UserError: a scale is too large or too small for the dtype.
    """
    grid, scheme = quantized.grid, quantized.grid.scheme
    rows = quantized.codes.size(0)
    scale, zero = (t.expand(rows, -1) if t.size(0) == 1 else t for t in (grid.scale, grid.zero))
    rounded = scale.to(scale_dtype).to(scale.dtype)
    bad = int(((rounded == 0) | ~rounded.isfinite()).sum())
    if bad:
        raise UserError(
            f"{bad} of {scale.numel()} scales, from {float(scale.min()):.1e} to "
            f"{float(scale.max()):.1e}, have no nearest number in {scale_dtype}; store them in "
            f"{wider(scale_dtype)}, as as_stored(quantized, {wider(scale_dtype)}) does"
        )
    codes, zero = _without_zero_of_zero(quantized.codes, zero, grid.groups, scheme)
    group = WHOLE if scheme.group is None else scheme.group
    scheme = replace(scheme, group=group, scale_dtype=scale_dtype)
    return Quantized(codes, Grid(scheme, rounded, zero.contiguous(), grid.groups))


def check_storable(shape: tuple[int, int], name: str) -> None:
    """Raise UserError unless AutoGPTQ's format has a place for a matrix (F, D), in one line."""
    for size, what in zip(shape, ("outputs", "inputs"), strict=True):
        if size % BLOCK or not size:
            raise UserError(
                f"{name} has {size} {what}, and AutoGPTQ's format packs {BLOCK} at a time; train a "
                f"model whose widths are multiples of {BLOCK}, such as {_multiple(size)}"
            )


# --- words ----------------------------------------------------------------------------------------


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first dim: codes (L, N) from 0 to 2^b - 1 -> words (ceil(L/32) * b, N) int32.

    Code k of a block begins at bit b * k of its words.

    Raises:
        UserError: a code has more bits, or there are no codes of so many.
    """
    if bits not in WIDTHS:
        raise UserError(f"bits={shown(bits)} is no width of a code; give 2, 3, 4 or 8")
    least, largest = (int(end) for end in codes.aminmax()) if codes.numel() else (0, 0)
    if least < 0 or largest >= 2**bits:
        raise UserError(
            f"codes from {least} to {largest} do not fit into {bits} bits without a sign; give "
            f"codes from 0 to {2**bits - 1}"
        )
    blocks = math.ceil(codes.size(0) / BLOCK)
    padded = codes.new_zeros(blocks * BLOCK, codes.size(1), dtype=torch.int32)
    padded[: codes.size(0)] = codes
    padded = padded.view(blocks, BLOCK, -1)
    words = padded.new_zeros(blocks, bits, codes.size(1))
    for k in range(BLOCK):
        word, shift = divmod(bits * k, 32)
        words[:, word] |= padded[:, k] << shift  # what is above 32 bits is dropped
        if shift + bits > 32:
            words[:, word + 1] |= padded[:, k] >> (32 - shift)
    return words.flatten(0, 1)


def unpack_words(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_words`: words (ceil(L/32) * b, N) int32 -> codes (L, N) uint8."""
    return unpack_blocks(words, bits).to(torch.uint8)[:length]


def unpack_blocks(words: Tensor, bits: int) -> Tensor:
    """The same for whole blocks: words (R * b, N) int32 -> codes (R * 32, N) int32."""
    if 32 % bits == 0:  # no code straddles
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        codes = words[:, None] >> shifts[:, None]  # (R * b, 32 / b, N)
        return codes.bitwise_and_(2**bits - 1).flatten(0, 1)
    words = words.reshape(-1, bits, words.size(1))
    codes = words.new_empty(words.size(0), BLOCK, words.size(2))
    for k in range(BLOCK):
        word, shift = divmod(bits * k, 32)
        code = words[:, word] >> shift  # copies of the sign come in from above
        if shift + bits > 32:
            code = code & (2 ** (32 - shift) - 1) | words[:, word + 1] << (32 - shift)
        codes[:, k] = code
    return codes.bitwise_and_(2**bits - 1).flatten(0, 1)


def _half(scheme: Scheme) -> int:
    """What is added to a signed code."""
    return 2 ** (scheme.bits - 1) if scheme.symmetric else 0


def _without_zero_of_zero(
    codes: Tensor, zero: Tensor, groups: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Add 1 to the codes and the zero of groups with a zero of 0, where the codes have room."""
    if scheme.symmetric or not bool((zero == 0).any()):
        return codes, zero
    by_column = groups.to(codes.device, torch.int64).expand(codes.size(0), -1)
    largest = torch.zeros_like(zero).scatter_reduce(1, by_column, codes.to(zero.dtype), "amax")
    added = ((zero == 0) & (largest < scheme.high)).to(zero.dtype)
    return codes + added.gather(1, by_column).to(codes.dtype), zero + added


def _multiple(size: int) -> int:
    return max(BLOCK, round(size / BLOCK) * BLOCK)
