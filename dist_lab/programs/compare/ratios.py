"""From the times of alternating rounds to a speed ratio, its confidence interval and a verdict.

A machine gets slower for a while and then faster again, often by more than the difference between
two strategies. So strategies are compared within a round, where all run in the same minute. A
round's ratio divides medians over steps, which one interrupted step does not change. The remaining
noise is not normally distributed, so the result is the median of the rounds' ratios, with an
interval that holds for every distribution.

[Note: the interval] Each of n independent rounds is as likely above the median as below it, like a
coin toss. The interval from the k-th smallest to the k-th largest of n values misses the median
only if fewer than k values fall on one side of it. That has probability 2 P(B < k) for
B ~ Binomial(n, 1/2). The largest k for which this is at most 1% gives the narrowest such interval
that is right 99 times in 100, whatever the distribution. W. R. Thompson 1936, "On confidence ranges
for the median and other expectation distributions for populations of unknown distribution form",
Annals of Mathematical Statistics 7(3). It is the inverse of the sign test.

[Note: the order of a round] A strategy may be slower because it runs first, or right after a
certain other one. So every second round runs in the reverse order of the round before: over
both, each strategy has the same average position, and a steady drift cancels. Each such pair of
rounds has a new random order.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Self

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Quartiles:
    """The median of some numbers, and their lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """
        >>> Quartiles.of([4, 1, 3, 2, 5])
        Quartiles(median=3.0, low=2.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Ratio:
    """The speed relative to the reference, over paired rounds: 2 is twice as fast.

    low, high: the interval that contains the true median with probability `confidence`.
    quartiles: those of the rounds' ratios.
    """

    median: float
    low: float
    high: float
    confidence: float
    quartiles: Quartiles

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "too noisy to tell"


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare seconds per step, round by round: a ratio above 1 is faster than the reference.

    Raises ValueError if there are fewer rounds than `fewest_rounds()`.
    """
    ratios = sorted(theirs / ours for ours, theirs in zip(seconds, reference, strict=True))
    k = depth(len(ratios))
    if k == 0:
        raise ValueError(f"{len(ratios)} rounds give no interval of {CONFIDENCE:.0%}")
    return Ratio(
        statistics.median(ratios), ratios[k - 1], ratios[-k], 1 - missed(len(ratios), k),
        Quartiles.of(ratios),
    )  # fmt: skip


def missed(n: int, k: int) -> float:
    """The probability that the median is outside [k-th smallest, k-th largest] of n values.

    >>> missed(8, 1)  # all eight on one side: 2 / 256
    0.0078125
    """
    return 2 * sum(comb(n, below) for below in range(k)) / 2**n


def depth(n: int) -> int:
    """The largest k whose interval has `CONFIDENCE`; 0 if n is too small for any.

    >>> [depth(n) for n in (7, 8, 16, 24)]
    [0, 1, 3, 6]
    """
    k = 0
    while 2 * k + 2 <= n and missed(n, k + 1) <= 1 - CONFIDENCE:
        k += 1
    return k


def fewest_rounds() -> int:
    """The smallest number of rounds for which an interval has `CONFIDENCE`.

    >>> fewest_rounds()
    8
    """
    n = 1
    while depth(n) == 0:
        n += 1
    return n


def orders(contenders: int, rounds: int, seed: int) -> list[list[int]]:
    """Returns the order of contenders in each round: [Note: the order of a round].

    It is the same on every rank.

    >>> orders(3, 4, seed=1)
    [[0, 2, 1], [1, 2, 0], [0, 1, 2], [2, 1, 0]]
    """
    rng, rounds_in_order = random.Random(seed), list[list[int]]()
    for _ in range(0, rounds, 2):
        order = rng.sample(range(contenders), contenders)
        rounds_in_order += [order, order[::-1]]
    return rounds_in_order[:rounds]
