"""Blocks of a matrix that share a scale: so few codes can cover the range of each block's values.

    x[R, C] ~ element * scale[block] * outer         element = rounded(x / outer / scale)

A 4-bit element is one of 15 numbers. A scale moves them to where the values of its block are: the
largest value becomes the largest number of the format, or nearly. The smaller the blocks, the more
of the 15 numbers are used, and the more scales there are.

    codec      element   block                  scale             outer      bits a value
    fp8        e4m3      the matrix             -                 float32    8
    fp8-block  e4m3      1 x 128; 128 x 128     float32           -          8.25; 8.002
    mxfp8      e4m3      1 x 32                 power of two      -          8.25
    mxfp4      e2m1      1 x 32                 power of two      -          4.25
    nvfp4      e2m1      1 x 16                 e4m3              float32    4.5

fp8: Micikevicius et al. 2022 (arXiv:2209.05433). fp8-block: DeepSeek-V3 (arXiv:2412.19437), section
3.3.2. MX: the OCP's "Microscaling Formats" v1.0, section 6.3; the scale is 2^(floor(log2 largest) -
exponent of the format's largest number), so the largest value may saturate: 1.99 x 2^8 becomes 448.
nvfp4: NVIDIA 2025 (arXiv:2509.25149), section 2.

[Note: powers of two] A scale that is a power of two changes the exponent of a number and not its
digits. So scaling is exact, and a sum of products of short numbers stays exact, in any order, as
long as it fits the digits of the dtype. MX has such scales; the others have them as an option.

[Note: not finite] If a value is not finite, its block's scale is NaN, and so are all values of the
block, and the loss. If infinity saturated, it would become an ordinary number, unseen.

Letters: R rows, C columns of a matrix; r, c of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lab.quantize.lowp.formats import E4M3, Format, encode_e8m0, power_below


@dataclass(frozen=True)
class Scale:
    """A kind of scale.

    of: (largest value of each block, largest number of the format) -> scale of each block
    stored: scales -> codes, or float32
    bits: of a stored scale
    top: the largest scale, where that is a limit; 1 otherwise
    """

    of: Callable[[Tensor, float], Tensor]
    stored: Callable[[Tensor], Tensor]
    bits: int
    top: float = 1.0


@dataclass(frozen=True)
class Codec:
    """How a matrix becomes elements and scales.

    element: the format of the elements
    block: (r, c), the values that share a scale; None: there is only `outer`
    scale: of a block
    outer: of the whole matrix, so that the scales of blocks fit their own format
    """

    element: Format
    block: tuple[int, int] | None = None
    scale: Scale | None = None
    outer: Scale | None = None

    def __call__(self, x: Tensor, largest: Tensor | None = None) -> "Coded":
        """x (R, C) -> its elements and scales.

        Args:
            x: float64, or anything else, which is taken as float32.
            largest: the largest magnitude in the whole matrix, if x is a part of it.
        """
        x = wide(x)
        outer = x.new_ones(())
        if self.outer is not None:
            outer = self.outer_of(magnitude(x) if largest is None else largest)
            x = x / outer
        if self.block is None or self.scale is None:
            return Coded(self, self.element.rounded(x), x.new_ones(1, 1), outer)
        tiles = as_tiles(x, self.block)
        scale = self.scale.of(tiles.abs().amax((1, 3)), self.element.max)
        divisor = torch.where(scale == 0, 1, scale)[:, None, :, None]
        elements = self.element.rounded(as_matrix(tiles / divisor, x.shape))
        return Coded(self, elements, scale, outer)

    def outer_of(self, largest: Tensor) -> Tensor:
        """The scale of the matrix, from its largest magnitude; 1 if the codec has none."""
        top = self.element.max * (self.scale.top if self.scale else 1)
        return torch.ones_like(largest) if self.outer is None else self.outer.of(largest, top)

    @property
    def bits(self) -> float:
        """Bits per value, with the scales of blocks."""
        r, c = self.block or (1, 1)
        return self.element.bits + (self.scale.bits / (r * c) if self.scale else 0)


@dataclass(frozen=True)
class Coded:
    """A coded matrix (R, C).

    elements: (R, C), numbers of the codec's element format, in float32 or float64
    scale: (blocks along R, blocks along C)
    outer: 0-dim
    """

    codec: Codec
    elements: Tensor
    scale: Tensor
    outer: Tensor

    def operand(self) -> Tensor:
        """(R, C): elements x scale, for a matrix product; `outer` may be multiplied afterwards."""
        if self.codec.block is None:
            return self.elements
        tiles = as_tiles(self.elements, self.codec.block) * self.scale[:, None, :, None]
        return as_matrix(tiles, self.elements.shape)

    def values(self) -> Tensor:
        """(R, C): the numbers that the codes stand for."""
        return self.operand() * self.outer

    def codes(self) -> Tensor:
        """(R, C) uint8; a code of 4 bits has a byte of its own."""
        return self.codec.element.encode(self.elements)

    def stored_scale(self) -> Tensor:
        """The scales of blocks as they are stored: codes, or float32."""
        return self.scale if self.codec.scale is None else self.codec.scale.stored(self.scale)


def magnitude(x: Tensor) -> Tensor:
    """The largest |x|, 0-dim, in float32 or float64; 0 of no values, NaN if one is NaN."""
    x = wide(x.detach())
    return x.abs().amax() if x.numel() else x.new_zeros(())


def wide(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# --- scales ---------------------------------------------------------------------------------------


def divided(largest: Tensor, top: float) -> Tensor:
    """largest / top in float32, so that the largest value becomes the largest number."""
    return finite_or_nan(largest, (largest / top).float().to(largest.dtype))


def power_above(largest: Tensor, top: float) -> Tensor:
    """The smallest power of two with which no value is beyond the largest number."""
    scale = (largest / top).float()
    power = power_below(scale)
    return finite_or_nan(largest, torch.where(power == scale, power, 2 * power).to(largest.dtype))


def microscale(largest: Tensor, top: float) -> Tensor:
    """2^(floor(log2 largest) - floor(log2 top)), within the range of e8m0; 2^-127 of zeros."""
    exponent = torch.frexp(largest)[1] - torch.frexp(torch.tensor(top))[1]
    exponent = torch.where(largest == 0, -127, exponent.clamp(-127, 127))
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest.isfinite(), scale, torch.nan)


def small_float(largest: Tensor, top: float) -> Tensor:
    """largest / top, rounded to e4m3. It is 0 for blocks of much smaller values than the others."""
    return torch.where(largest.isfinite(), E4M3.rounded(largest / top), torch.nan)


def finite_or_nan(largest: Tensor, scale: Tensor) -> Tensor:
    """The scale; 1 where all values are 0, or too small to divide by; see [Note: not finite]."""
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1)
    return torch.where(largest.isfinite(), scale, torch.nan)


FLOAT32 = Scale(divided, Tensor.float, 32)
POWER_OF_TWO = Scale(power_above, Tensor.float, 32)
E8M0 = Scale(microscale, encode_e8m0, 8)
E4M3_SCALE = Scale(small_float, E4M3.encode, 8, E4M3.max)


# --- tiles ----------------------------------------------------------------------------------------


def as_tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """x (R, C) -> (blocks along R, r, blocks along C, c), with zeros beyond the last values."""
    (rows, columns), (r, c) = x.shape, block
    if rows % r or columns % c:
        x = F.pad(x, (0, -columns % c, 0, -rows % r))
    return x.reshape(x.size(0) // r, r, x.size(1) // c, c)


def as_matrix(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_tiles`."""
    x = tiles.reshape(tiles.size(0) * tiles.size(1), tiles.size(2) * tiles.size(3))
    return x[: shape[0], : shape[1]]
