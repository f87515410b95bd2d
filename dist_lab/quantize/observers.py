"""Observers choose the range of activations: from which number to which number do codes reach?

Weights are there to be looked at. Activations are not: they are observed on calibration data, and
what lies outside the range later is clamped. A wider range clamps less, and rounds more coarsely.

    MinMax        the smallest and the largest value: nothing is clamped, one outlier costs everyone
    Percentile    without the outermost values, such as 0.1 % of them
    MinError      the range with the least squared error: clamped and rounded values together

Over ranks: each rank observes its own rows, `merge` combines them, and `bounds` is then that of one
process that has seen all rows, to the bit.

    low{MIN_X}, high{MAX_X}, counts{U_X}    over the data axis X: O(D + bins) numbers, once

The mean of the ranks' ranges is not the range, and neither is rank 0's: a value that one rank has
seen would be clamped. [Note: aligned bins] says how histograms add up.

Krishnamoorthi 2018 (arXiv:1806.08342), section 2; Wu et al. 2020 (arXiv:2004.09602), section 3.3.

Letters: D features, B bins on each side of 0.
"""

from typing import Protocol

import torch
from torch import Tensor

from dist_lab.comm.into import Reduce
from dist_lab.comm.ops import all_reduce
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.formula import Scheme, grid_between

BINS = 2048  # on each side of 0
SHRINKS = 20  # MinError tries 1/20, 2/20, ... of the range


class RangeObserver(Protocol):
    """Sees activations on each rank, and then knows the range of all of them."""

    def see(self, x: Tensor) -> None:
        """x (..., D): activations of this rank."""

    def merge(self, axis: Axis) -> None:
        """Combine what the ranks of the axis have seen. Collective, once, after all `see`."""

    def bounds(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The range for all activations: (low, high), each (1, 1), as `grid_between` takes them.

        Raises:
            UserError: no rank has seen a row, or some value was not finite.
        """


class MinMax:
    """The smallest and the largest value of each feature.

    Attributes:
        low, high: (D,) each; inf and -inf before the first row.
    """

    def __init__(self, features: int, dtype: torch.dtype = torch.float32) -> None:
        self.low = torch.full((features,), torch.inf, dtype=dtype)
        self.high = torch.full((features,), -torch.inf, dtype=dtype)
        self._seen = Seen()

    def see(self, x: Tensor) -> None:
        x = self._seen.finite(x).reshape(-1, self.low.numel())
        if len(x):
            low, high = x.aminmax(dim=0)
            self.low = torch.minimum(self.low, low.to(self.low))
            self.high = torch.maximum(self.high, high.to(self.high))

    def merge(self, axis: Axis) -> None:
        self._seen.merge(axis)
        self.low = -combined(-self.low, axis, "max")  # low{MIN_X} -> low
        self.high = combined(self.high, axis, "max")  # high{MAX_X} -> high

    def largest(self) -> Tensor:
        """(D,): the largest magnitude of each feature. Raises UserError like `bounds`."""
        self._seen.check()
        return torch.maximum(-self.low, self.high)

    def bounds(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        self._seen.check()
        return self.low.min().view(1, 1), self.high.max().view(1, 1)


class Percentile:
    """The range that holds `percent` of all values: equal shares below and above are clamped.

    100 is MinMax. The ends are ends of bins, so up to one bin wider than the exact percentile.
    """

    def __init__(self, percent: float = 99.9, dtype: torch.dtype = torch.float32) -> None:
        if not 50 <= percent <= 100:
            raise UserError(f"percent={percent} of all values is no range; give 50 to 100")
        self.percent, self.histogram = percent, Histogram(dtype)

    def see(self, x: Tensor) -> None:
        self.histogram.see(x)

    def merge(self, axis: Axis) -> None:
        self.histogram.merge(axis)

    def bounds(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = self.histogram.bounds()
        below = self.histogram.counts.cumsum(0)  # int64: values up to the end of each bin
        total = int(below[-1])
        clamped = int(total * (100 - self.percent) / 200)  # values at each end
        first = int((below <= clamped).sum())  # the bin of the first value that is kept
        last = int((below < total - clamped).sum())
        edges = self.histogram.edges().to(low.dtype)
        return low.clamp(min=edges[first]), high.clamp(max=edges[last + 1])


class MinError:
    """The range whose grid is nearest to all values, in the sum of squares.

    It tries 1/20, 2/20, ... 20/20 of the largest and of the smallest value. If the scheme is
    symmetric, both ends have the larger magnitude of the two, so it tries only that.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.histogram = Histogram(dtype)

    def see(self, x: Tensor) -> None:
        self.histogram.see(x)

    def merge(self, axis: Axis) -> None:
        self.histogram.merge(axis)

    def bounds(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        lows, highs = candidates(*self.histogram.bounds(), scheme)
        filled = self.histogram.counts > 0
        edges = self.histogram.edges()
        values = ((edges[:-1] + edges[1:]) / 2)[filled][None]  # (1, bins): the middle of each
        grid = grid_between(lows[:, None], highs[:, None], scheme, values.size(1))  # N of them
        errors = grid.rounded(values.to(lows.dtype)).double() - values  # (N, bins)
        best = int((self.histogram.counts[filled] * errors.square()).sum(1).argmin())
        return lows[best].view(1, 1), highs[best].view(1, 1)


def candidates(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The ranges that MinError tries: lows (N,) and highs (N,). The last is the whole range."""
    low, high = low.view(()).clamp(max=0), high.view(()).clamp(min=0)
    parts = torch.arange(1, SHRINKS + 1, dtype=low.dtype, device=low.device) / SHRINKS
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        return -high * parts, high * parts
    lows, highs = (end * parts if end else end.view(1) for end in (low, high))  # 0 stays 0
    pairs = torch.cartesian_prod(lows, highs)
    return pairs[:, 0], pairs[:, 1]


class Histogram:
    """Counts of values in 2 B bins from -2^e to 2^e, which grow with the values.

    [Note: aligned bins] Two histograms can be added if bins have the same ends. So the range is a
    power of two. When a larger value comes, it doubles: two neighboring bins become one, and no
    value has to be seen again. Bin ends are then multiples of a power of two, and products with
    powers of two are exact, so the bin of a value depends on nothing but the value and e. And e
    depends on the largest value only: whatever the order of the rows and however they are spread
    over ranks, the counts are the same integers. No rank waits for another before `merge`.

    Attributes:
        counts: (2 B,) int64.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.counts = torch.zeros(2 * BINS, dtype=torch.int64)
        self._exponent = LOWEST  # e
        self._ends = MinMax(1, dtype)

    def see(self, x: Tensor) -> None:
        self._ends.see(x.reshape(-1, 1))
        x = x.detach().double().flatten()
        x = x[x.isfinite()]
        if x.numel():
            self._grow(exponent_above(float(x.abs().max())))
            bins = (x * BINS * 2.0**-self._exponent).floor().long() + BINS
            self.counts += bins.bincount(minlength=2 * BINS).to(self.counts.device)

    def merge(self, axis: Axis) -> None:
        self._ends.merge(axis)
        exponent = torch.tensor(self._exponent)
        self._grow(int(combined(exponent, axis, "max")))  # e{MAX_X} -> e
        self.counts = combined(self.counts, axis, "sum")  # counts{U_X} -> counts

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value, exactly: (1, 1) each."""
        return self._ends.bounds(Scheme(8, None))

    def edges(self) -> Tensor:
        """(2 B + 1,) float64: the ends of the bins."""
        return torch.arange(-BINS, BINS + 1, dtype=torch.float64) / BINS * 2.0**self._exponent

    def _grow(self, exponent: int) -> None:
        doublings = max(exponent - self._exponent, 0)
        self._exponent += doublings
        bins = torch.arange(-BINS, BINS) >> min(doublings, 62)  # floor(bin / 2^doublings)
        self.counts = torch.zeros_like(self.counts).index_add_(0, bins + BINS, self.counts)


LOWEST = -900  # of e: 2^-e and the widths of bins are normal numbers in float64


def exponent_above(value: float) -> int:
    """The smallest e >= LOWEST with 2^e > value.

    >>> exponent_above(3.0), exponent_above(4.0), exponent_above(0.0)
    (2, 3, -900)
    """
    if value == 0:
        return LOWEST
    return max(int(torch.frexp(torch.tensor(value, dtype=torch.float64)).exponent), LOWEST)


class Seen:
    """Counts values, and those that are not finite. Complaints wait until all ranks know of them:
    a rank that raised in `see` would leave the others waiting in `merge`."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64)  # all, not finite

    def finite(self, x: Tensor) -> Tensor:
        """Count x, and return it with 0 in place of what is not finite."""
        x = x.detach()
        bad = ~x.isfinite()
        self._counts += torch.tensor([x.numel(), int(bad.sum())])
        return x.masked_fill(bad, 0)

    def merge(self, axis: Axis) -> None:
        self._counts = combined(self._counts, axis, "sum")

    def check(self) -> None:
        values, bad = self._counts.tolist()
        if bad:
            raise UserError(
                f"{bad} of {values} activations are not finite, and have no range; does the model "
                "diverge on the calibration data?"
            )
        if not values:
            raise UserError("no activation was observed; calibrate with one row or more")


def combined(x: Tensor, axis: Axis, reduce: Reduce) -> Tensor:
    """x{U_X} or x{MAX_X} -> x. Observers keep what they know in the CPU's memory."""
    return all_reduce(x.to(axis.device), axis, reduce).to(x.device)
