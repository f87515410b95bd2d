"""From the times of alternating rounds to a ratio, how certain it is, and a word for it.

A machine is slower for a while and then faster again, by more than the difference that is looked
for. So strategies are compared within a round, where the same minute was everybody's, and a round's
ratio is of medians of steps, which a single interrupted step does not move. What is left of noise
is anything but normal: hence the median of the rounds' ratios, with an interval that holds for
every distribution.

[Note: the interval] Each of n independent rounds is as likely above the median as below it, like a
coin. The k-th smallest and the k-th largest of n values miss the median between them only if fewer
than k values fall on one side of it: with probability 2 P(B < k), B ~ Binomial(n, 1/2). The largest
k for which this is at most 1% gives the narrowest such interval that is right 99 times in 100
whatever the noise looks like. W. R. Thompson 1936, "On confidence ranges for the median and other
expectation distributions for populations of unknown distribution form", Annals of Mathematical
Statistics 7(3); it is the sign test turned round.

[Note: the order of a round] Whoever runs first, or after a greedy neighbour, may be slower by it.
Every second round runs the order of the one before backwards, so that nobody is early or late on
the average of two, and a steady drift cancels; the order itself is drawn anew for each such pair.
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
    """The median of some numbers and their quartiles."""

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
    """How many times as fast as the reference, over paired rounds.

    low, high: the interval that holds the true median with `confidence`.
    quartiles: of the rounds' own ratios.
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


def ratio(mine: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare seconds a step, round by round: above 1 is faster than the reference.

    Raises ValueError if there are fewer rounds than `fewest_rounds()`.
    """
    ratios = sorted(theirs / ours for ours, theirs in zip(mine, reference, strict=True))
    k = depth(len(ratios))
    if k == 0:
        raise ValueError(f"{len(ratios)} rounds give no interval of {CONFIDENCE:.0%}")
    return Ratio(
        statistics.median(ratios), ratios[k - 1], ratios[-k], 1 - missed(len(ratios), k),
        Quartiles.of(ratios),
    )  # fmt: skip


def missed(n: int, k: int) -> float:
    """How often the k-th smallest and the k-th largest of n miss the median between them.

    >>> missed(8, 1)  # all eight on one side: 2 / 256
    0.0078125
    """
    return 2 * sum(comb(n, below) for below in range(k)) / 2**n


def depth(n: int) -> int:
    """The largest k whose interval is right with `CONFIDENCE`; 0 if none of n values is.

    >>> [depth(n) for n in (7, 8, 16, 24)]
    [0, 1, 3, 6]
    """
    k = 0
    while 2 * k + 2 <= n and missed(n, k + 1) <= 1 - CONFIDENCE:
        k += 1
    return k


def fewest_rounds() -> int:
    """Rounds without which no interval has `CONFIDENCE`.

    >>> fewest_rounds()
    8
    """
    n = 1
    while depth(n) == 0:
        n += 1
    return n


def orders(contenders: int, rounds: int, seed: int) -> list[list[int]]:
    """Who runs when in each round; see [Note: the order of a round]. The same on every rank.

    >>> orders(3, 4, seed=1)
    [[0, 2, 1], [1, 2, 0], [0, 1, 2], [2, 1, 0]]
    """
    draw, made = random.Random(seed), list[list[int]]()
    for _ in range(0, rounds, 2):
        order = draw.sample(range(contenders), contenders)
        made += [order, order[::-1]]
    return made[:rounds]
