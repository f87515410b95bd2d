"""The formula of quantisation: a number becomes a small integer, and two numbers bring it back.

    code = clamp(round(x / scale) + zero, low, high)          x ~ scale * (code - zero)

Everything else in this folder chooses `scale` and `zero`, or moves the rounding errors elsewhere.
A matrix has one scale, one per row, or one per group of neighboring columns of a row. The more
scales, the smaller the error, and the more bytes: a group of 32 columns with a 16-bit scale costs
half a bit a weight.

    W[F, D]    scale, zero [F, G]    column d has the scale of group `groups[d]`

`symmetric` codes are signed, and their zero is 0: products of such codes need no correction.
Affine codes are unsigned, and use the whole range of values that are mostly positive. Jacob et al.
2018 (arXiv:1712.05877), section 2.1.

[Note: ties] x / scale is computed as x * (1 / scale), which is what PyTorch does. A number exactly
between two codes is rounded to the even one; but before or after the zero is added? With an odd
zero the results differ by one code. `fake_quantize_*` rounds first, and so do we.
`quantize_per_tensor` adds first, in a fused multiply-add; `codes_added_first` does the same.

Letters: F rows (outputs), D columns (inputs), G groups of columns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.errors import UserError, shown

WIDTHS = (2, 3, 4, 8)  # bits
WHOLE = -1  # as a group: all columns of a row


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised.

    bits: of a code: 2, 3, 4 or 8
    group: the number of columns that share a scale; WHOLE (-1): one scale per row; None: one for
        the matrix
    symmetric: codes are signed, and zero is 0
    scale_dtype: scales are numbers of this dtype, in which a file will have them; None: any
    """

    bits: int
    group: int | None = WHOLE
    symmetric: bool = False
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise UserError(f"bits={shown(self.bits)} is no width of a code; give 2, 3, 4 or 8")
        good = self.group is None or (type(self.group) is int and self.group >= 1)
        if not good and self.group != WHOLE:
            raise UserError(
                f"group={shown(self.group)} is no number of columns; give 1 or more, or -1 for one "
                "scale per row"
            )

    @property
    def steps(self) -> int:
        """The largest code minus the smallest."""
        return 2**self.bits - 1

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + self.steps

    def groups_of(self, columns: int) -> Tensor:
        """(D,) int32: the group of each column. All are 0 with one scale per row or matrix.

        Raises:
            UserError: the columns do not divide into groups.
        """
        size = self.size_of_group(columns)
        if columns and columns % size:
            raise UserError(
                f"{columns} columns do not divide into groups of {size} (group={size}); give "
                f"{nearest_divisor(columns, size)}, or -1 for one scale per row"
            )
        return torch.arange(columns, dtype=torch.int32) // max(size, 1)

    def size_of_group(self, columns: int) -> int:
        """The number of columns that share a scale, of so many."""
        return columns if self.group is None or self.group == WHOLE else self.group


def check_groups(columns: Mapping[str, int], scheme: Scheme) -> None:
    """Raise UserError, with a group for all of them, unless the columns of all layers divide.

    Args:
        columns: the name of each layer -> its number of columns.
    """
    for name, number in columns.items():
        size = scheme.size_of_group(number)
        if number and number % size:
            fits_all = nearest_divisor(math.gcd(*columns.values()), size)
            widths = " and ".join(map(str, sorted(set(columns.values()))))
            raise UserError(
                f"{name}: {number} columns do not divide into groups of {size} (group={size}); "
                f"give {fits_all}, which divides the {widths} columns of all layers, or -1 for one "
                "scale per row"
            )


@dataclass(frozen=True)
class Grid:
    """The real numbers that codes stand for: `scale * (code - zero)`.

    scheme: the range of codes
    scale: (F, G), or (1, 1) for the whole matrix
    zero: the same shape and dtype, of whole numbers; 0 if the scheme is symmetric
    groups: (D,) int32, the group of each column
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor
    groups: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """x (F, D) -> codes (F, D), int8 if symmetric, else uint8. See [Note: ties]."""
        return self._stored(self._codes(x))

    def codes_added_first(self, x: Tensor) -> Tensor:
        """The codes of `torch.quantize_per_tensor`, which differ on ties: see [Note: ties].

        A product of two float32 is exact in float64, so this rounds once, like a fused
        multiply-add.
        """
        scale, zero = self._by_column()
        summed = (x.double() * (1 / scale).double() + zero).to(x.dtype)
        return self._stored(summed.round().clamp(self.scheme.low, self.scheme.high))

    def values(self, codes: Tensor) -> Tensor:
        """codes (F, D) -> the numbers that they stand for, in the dtype of the scale."""
        scale, zero = self._by_column()
        return (codes.to(scale.dtype) - zero) * scale

    def rounded(self, x: Tensor) -> Tensor:
        """x (F, D) -> the nearest numbers of the grid: `values(codes(x))`."""
        return self.values(self._codes(x))

    def column(self, d: int) -> "Grid":
        """The grid of one column, for x (F, 1)."""
        group = int(self.groups[d])
        part = slice(group, group + 1)
        return Grid(self.scheme, self.scale[:, part], self.zero[:, part], self.groups.new_zeros(1))

    def rows(self, rows: slice) -> "Grid":
        """The grid of some rows."""
        if self.scheme.group is None:
            return self
        return Grid(self.scheme, self.scale[rows], self.zero[rows], self.groups)

    def contains(self, x: Tensor) -> Tensor:
        """Whether the code of each number of x (F, D) is on the grid without clamping."""
        codes = self._unclamped(x)
        return (self.scheme.low <= codes) & (codes <= self.scheme.high)

    def _codes(self, x: Tensor) -> Tensor:
        return self._unclamped(x).clamp(self.scheme.low, self.scheme.high)

    def _unclamped(self, x: Tensor) -> Tensor:
        scale, zero = self._by_column()
        return (x * (1 / scale)).round() + zero

    def _by_column(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of each column: (F, D), or (F, 1) if all columns share them."""
        if self.scale.size(1) == 1:
            return self.scale, self.zero
        groups = self.groups.to(self.scale.device, torch.int64)
        return self.scale[:, groups], self.zero[:, groups]

    def _stored(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8 if self.scheme.symmetric else torch.uint8)


def bounds(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value in each group: x (F, D) -> two of (F, G).

    Raises:
        UserError: x is no matrix of floating-point numbers, has a value that is not finite, or its
            columns do not divide into groups.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise UserError(
            f"{x.dtype} numbers of shape {tuple(x.shape)} are no matrix of weights; give one of "
            "floating-point numbers, (outputs, inputs), such as x.flatten(1) of a convolution"
        )
    scheme.groups_of(x.size(1))
    if not x.isfinite().all():
        bad = int((~x.isfinite()).sum())
        raise UserError(f"{bad} of {x.numel()} values are not finite, and have no codes")
    return extremes(x, scheme)


def extremes(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The same without a check: NaN stays NaN. Of no values the smallest and largest are 0."""
    columns = x.size(1)
    if scheme.group is None:
        low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        return low.view(1, 1), high.view(1, 1)
    size = scheme.group if scheme.group != WHOLE else columns
    shape = x.size(0), columns // size if size else 1
    if not x.numel():
        return x.new_zeros(shape), x.new_zeros(shape)
    low, high = x.reshape(*shape, size).aminmax(dim=-1)
    return low, high


def grid_between(low: Tensor, high: Tensor, scheme: Scheme, columns: int) -> Grid:
    """The grid that covers the values from low to high, and has 0.

    Where all values are 0, the scale is 1: codes are 0, and so are their values.

    Args:
        low, high: (F, G).
        columns: D.

    Raises:
        UserError: a scale is too large for the scheme's dtype of scales, or a value for float16.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    wide = precise(low.dtype)  # the range of float16 numbers may be more than float16 holds
    scale = ((high.to(wide) - low.to(wide)) / scheme.steps).to(low.dtype)
    if scheme.scale_dtype is not None:
        scale = stored_scale(scale, scheme.scale_dtype)
    # Subnormal ranges, too: the inverse of their scale may be infinite.
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        zero = (scheme.low - (low / scale).round()).clamp(scheme.low, scheme.high)
    if scale.dtype == torch.float16:
        ends = torch.stack([(scheme.low - zero) * scale, (scheme.high - zero) * scale])
        if not ends.isfinite().all():
            raise UserError(
                f"values from {float(low.min()):g} to {float(high.max()):g} have neighbors in "
                f"{scheme.bits} bits that float16 does not hold; quantise in float32: x.float()"
            )
    return Grid(scheme, scale, zero, scheme.groups_of(columns))


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a dtype to each scale, in the scale's own dtype.

    Subnormal numbers have few digits, and half a scale would clamp half of a range. So a scale
    below the smallest normal number becomes the next larger number, not the nearest: 2^-24 at least
    in float16. Then no value is clamped, and each is off by half of that at most.

    Raises:
        UserError: a scale is too large for the dtype.
    """
    info = torch.finfo(dtype)
    stored = scale.to(dtype).to(scale.dtype)
    step = info.smallest_normal * info.eps  # between two subnormal numbers: a power of two
    stored = torch.where(scale < info.smallest_normal, (scale / step).ceil() * step, stored)
    if (scale.isfinite() & ~stored.isfinite()).any():
        raise UserError(
            f"the largest scale, {float(scale.max()):.1e}, is more than {dtype} holds, "
            f"{info.max:.1e}; give smaller weights, or in Python scale_dtype={wider(dtype)}"
        )
    return stored


def wider(dtype: torch.dtype) -> torch.dtype:
    """A dtype with a wider range."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def grid_of(x: Tensor, scheme: Scheme) -> Grid:
    """The grid from the smallest to the largest value of x (F, D), in each group."""
    low, high = bounds(x, scheme)
    return grid_between(low, high, scheme, x.size(1))


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix.

    codes: (F, D), int8 if the scheme is symmetric, else uint8
    grid: what they stand for
    """

    codes: Tensor
    grid: Grid

    def values(self) -> Tensor:
        """(F, D), in the dtype of the scale."""
        return self.grid.values(self.codes)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantise a matrix (F, D) by rounding each weight to the nearest code: the baseline."""
    grid = grid_of(weight, scheme)
    return Quantized(grid.codes(weight), grid)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for weights of a dtype: float32, or float64 if they are."""
    return torch.promote_types(dtype, torch.float32)


def nearest_divisor(number: int, wanted: int) -> int:
    """
    >>> nearest_divisor(480, 100), nearest_divisor(128, 96)
    (96, 64)
    """
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
