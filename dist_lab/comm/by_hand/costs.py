"""The cost of each algorithm by hand, exact for every length: the table in `algorithms` as code. No
torch here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        rounds: of N ranks.
        sent: elements that one rank sends, of (N ranks, its position, elements of the payload);
            the position counts from the source of a broadcast.
    """

    rounds: Callable[[int], int]
    sent: Callable[[int, int, int], int]


def lengths(length: int, n: int) -> list[int]:
    return [length // n + (j < length % n) for j in range(n)]


def power_in(n: int) -> int:
    """The largest power of two in n."""
    return 1 << (n.bit_length() - 1)


def halvings(power: int) -> list[int]:
    """
    >>> halvings(8)
    [4, 2, 1]
    """
    return [power >> k for k in range(1, power.bit_length())]


def children(place: int, n: int) -> list[int]:
    """How far from it the ranks stand to whom it gives a broadcast; the largest subtree first.

    >>> [children(place, 6) for place in range(6)]
    [[1, 2, 4], [2, 4], [], [], [], []]
    """
    steps = [1 << k for k in range(place.bit_length(), n.bit_length())]
    return list(takewhile(lambda step: place + step < n, steps))


def _all_but(*away: int) -> Callable[[int, int, int], int]:
    """Bytes of all pieces but one, for each of `away`: but the piece of the rank that far away."""

    def sent(n: int, i: int, length: int) -> int:
        pieces = lengths(length, n)
        return sum(length - pieces[(i + far) % n] for far in away)

    return sent


def _tree_sent(n: int, i: int, length: int) -> int:
    power = power_in(n)
    if i >= power:
        return length
    total = length if i + power < n else 0
    for distance in halvings(power):
        total += length  # the half that it gives away now, and later the half that it keeps
        length = length - length // 2 if i & distance else length // 2
    return total


def _direct_sent(n: int, i: int, length: int) -> int:
    mine = lengths(length, n)[i]
    return length - mine + (n - 1) * mine


ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "ring": Algorithm(lambda n: 2 * (n - 1), _all_but(1, 2)),
        "direct": Algorithm(lambda n: 2, _direct_sent),
        "tree": Algorithm(
            lambda n: 2 * len(halvings(power_in(n))) + 2 * (n > power_in(n)),
            _tree_sent,
        ),
    },
    "all_gather": {
        "ring": Algorithm(lambda n: n - 1, _all_but(0)),
        "direct": Algorithm(lambda n: 1, _all_but(0)),
    },
    "reduce_scatter": {
        "ring": Algorithm(lambda n: n - 1, _all_but(0)),
        "direct": Algorithm(lambda n: 1, _all_but(0)),
    },
    "all_to_all": {"direct": Algorithm(lambda n: 1, _all_but(0))},
    "broadcast": {
        "tree": Algorithm(
            lambda n: n.bit_length() - 1,
            lambda n, i, length: length * len(children(i, n)),
        ),
    },
}

# Rounds of gloo's algorithms: rings, but for all_to_all; its reduce_scatter is an all_reduce.
BACKEND: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda n: 2 * (n - 1),
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: 2 * (n - 1),
    "all_to_all": lambda n: 1,
    "broadcast": lambda n: n.bit_length() - 1,
}

FAMILIES = tuple(dict.fromkeys(name for rows in ALGORITHMS.values() for name in rows))
SETTINGS = ("auto", "backend", *FAMILIES)  # of a mesh's `collectives`
