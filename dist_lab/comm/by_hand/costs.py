"""The cost of each algorithm by hand, exact for every length: the table in `algorithms` as code.

This file does not import torch: the command line reads the algorithms' names before torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        rounds: N ranks -> rounds.
        sent: (N ranks, a rank's position, elements of the payload) -> elements that the rank sends.
            In a broadcast the position counts from the source.
    """

    rounds: Callable[[int], int]
    sent: Callable[[int, int, int], int]


def lengths(length: int, n: int) -> list[int]:
    """Returns the lengths of n chunks. The first ones may be longer by one."""
    return [length // n + (j < length % n) for j in range(n)]


def power_in(n: int) -> int:
    """Returns the largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)


def halvings(power: int) -> list[int]:
    """Returns the distances of recursive halving.

    >>> halvings(8)
    [4, 2, 1]
    """
    return [power >> k for k in range(1, power.bit_length())]


def children(position: int, n: int) -> list[int]:
    """Returns the distances to a rank's children in a broadcast tree, the largest subtree first.

    >>> [children(position, 6) for position in range(6)]
    [[1, 2, 4], [2, 4], [], [], [], []]
    """
    steps = [1 << k for k in range(position.bit_length(), n.bit_length())]
    return list(takewhile(lambda step: position + step < n, steps))


def _all_but(*distances: int) -> Callable[[int, int, int], int]:
    """Returns a formula: for each distance, all chunks except that of the rank at that distance."""

    def sent(n: int, i: int, length: int) -> int:
        chunks = lengths(length, n)
        return sum(length - chunks[(i + distance) % n] for distance in distances)

    return sent


def _tree_sent(n: int, i: int, length: int) -> int:
    power = power_in(n)
    if i >= power:
        return length
    total = length if i + power < n else 0
    for distance in halvings(power):
        total += length  # it sends one half now, and the other half on the way back
        length = length - length // 2 if i & distance else length // 2
    return total


def _direct_sent(n: int, i: int, length: int) -> int:
    chunk = lengths(length, n)[i]
    return length - chunk + (n - 1) * chunk


ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "ring": Algorithm(lambda n: 2 * (n - 1), _all_but(1, 2)),
        "direct": Algorithm(lambda n: 2, _direct_sent),
        "tree": Algorithm(
            lambda n: 2 * len(halvings(power_in(n))) + 2 * (n > power_in(n)),
            _tree_sent,
        ),
        "pairwise": Algorithm(lambda n: 2, _direct_sent),
    },
    "all_gather": {
        "ring": Algorithm(lambda n: n - 1, _all_but(0)),
        "direct": Algorithm(lambda n: 1, _all_but(0)),
    },
    "reduce_scatter": {
        "ring": Algorithm(lambda n: n - 1, _all_but(0)),
        "direct": Algorithm(lambda n: 1, _all_but(0)),
        "pairwise": Algorithm(lambda n: 1, _all_but(0)),
    },
    "all_to_all": {"direct": Algorithm(lambda n: 1, _all_but(0))},
    "broadcast": {
        "tree": Algorithm(
            lambda n: n.bit_length() - 1,
            lambda n, i, length: length * len(children(i, n)),
        ),
    },
}

# Rounds of gloo's algorithms. All but all_to_all and broadcast are rings, and its reduce_scatter is
# an all_reduce.
BACKEND: dict[str, Callable[[int], int]] = {
    "all_reduce": lambda n: 2 * (n - 1),
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: 2 * (n - 1),
    "all_to_all": lambda n: 1,
    "broadcast": lambda n: n.bit_length() - 1,
}

FAMILIES = tuple(dict.fromkeys(name for rows in ALGORITHMS.values() for name in rows))
SETTINGS = ("auto", "backend", *FAMILIES)  # for init_mesh(collectives=)
