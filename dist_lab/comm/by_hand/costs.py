"""The cost of each algorithm by hand: the table in `algorithms` as code, exact for every length."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_lab.comm.by_hand.algorithms import (
    Steps,
    children,
    direct_all_gather,
    direct_all_reduce,
    direct_all_to_all,
    direct_reduce_scatter,
    halvings,
    lengths,
    power_in,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    tree_all_reduce,
    tree_broadcast,
)


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        steps: the generator function.
        rounds: of N ranks.
        sent: elements that one rank sends, of (N ranks, its position, elements of the payload);
            the position counts from the source of a broadcast.
    """

    steps: Callable[..., Steps]
    rounds: Callable[[int], int]
    sent: Callable[[int, int, int], int]


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
        "ring": Algorithm(ring_all_reduce, lambda n: 2 * (n - 1), _all_but(1, 2)),
        "direct": Algorithm(direct_all_reduce, lambda n: 2, _direct_sent),
        "tree": Algorithm(
            tree_all_reduce,
            lambda n: 2 * len(halvings(power_in(n))) + 2 * (n > power_in(n)),
            _tree_sent,
        ),
    },
    "all_gather": {
        "ring": Algorithm(ring_all_gather, lambda n: n - 1, _all_but(0)),
        "direct": Algorithm(direct_all_gather, lambda n: 1, _all_but(0)),
    },
    "reduce_scatter": {
        "ring": Algorithm(ring_reduce_scatter, lambda n: n - 1, _all_but(0)),
        "direct": Algorithm(direct_reduce_scatter, lambda n: 1, _all_but(0)),
    },
    "all_to_all": {"direct": Algorithm(direct_all_to_all, lambda n: 1, _all_but(0))},
    "broadcast": {
        "tree": Algorithm(
            tree_broadcast,
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
