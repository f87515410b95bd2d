"""Fits costs to measured times: the sum of cost x amount should be the time, in every row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy


@dataclass(frozen=True)
class Fitted:
    """x: the costs. error: the root mean square of (fitted - measured) / measured.

    The error is None if as many costs as rows are above 0: these fit whatever was measured.
    """

    x: list[float]
    error: float | None


def nonnegative_fit(amounts: Sequence[Sequence[float]], times: Sequence[float]) -> Fitted | None:
    """Fits by least squares of the relative errors, so that short times count as much as long ones.

    A negative cost has no meaning. So every subset of the costs is fitted alone, the others are 0,
    and the best fit without a negative cost is returned; None if there are fewer rows than costs.

    Args:
        amounts: (rows, costs).
        times: (rows,), above 0.

    >>> fitted = nonnegative_fit([[1, 0], [1, 10], [2, 0]], [2.0, 7.0, 4.0])
    >>> [round(cost, 6) for cost in fitted.x], round(fitted.error, 6)
    ([2.0, 0.5], 0.0)
    """
    if not times or len(times) < len(amounts[0]):
        return None
    a = numpy.array(amounts, dtype=float)
    a /= numpy.array(times, dtype=float)[:, None]  # a x = 1 is a perfect fit
    fits: list[tuple[float, list[float]]] = []
    for count in range(1, a.shape[1] + 1):
        for used in map(list, combinations(range(a.shape[1]), count)):
            x = numpy.zeros(a.shape[1])
            scale = numpy.abs(a[:, used]).max(0)  # amounts may be billions of FLOPs, and few calls
            if not scale.all():
                continue
            solved, _, rank, _ = numpy.linalg.lstsq(a[:, used] / scale, numpy.ones(len(times)))
            x[used] = solved / scale
            if rank == len(used) and min(x) >= 0:
                error = float(numpy.sqrt(numpy.mean((a @ x - 1) ** 2)))
                fits.append((error, x.tolist()))
    if not fits:
        return None
    error, costs = min(fits)
    return Fitted(costs, error if len(times) > numpy.count_nonzero(costs) else None)
