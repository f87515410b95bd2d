"""What was sent: one line per collective, and running totals.

Two numbers are kept apart because they answer different questions. S is `payload`:

    payload   the size of the tensor that the collective is about: what all_reduce reduces, what
              all_gather ends up with, what reduce_scatter starts from, what broadcast spreads
    sent      the bytes this rank really hands to the transport for it: counted at the send where
              the algorithm is ours, and by the backend's own algorithm where it is the backend's
              (`ops.backend_bytes`), which a test holds against the network interface's counters

The published cost formulas relate the two (N ranks, bandwidth-optimal, per rank; Chan et al. 2007,
"Collective communication: theory, practice, and experience", section 6):

    all_reduce                              2 (N-1)/N S
    all_gather, reduce_scatter, all_to_all    (N-1)/N S
    broadcast                                 (N-1)/N S on average: N-1 copies, N ranks

`formula_bytes` is that table as code. A transport may send more: gloo's own reduce_scatter runs a
whole all_reduce and so sends twice what it needs.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from fractions import Fraction

SHARE_SENT = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "broadcast": 1,
}


def formula_bytes(op: str, size: int, payload: int) -> Fraction:
    """Bytes one of `size` ranks sends for a `payload` of bytes, by the table above.

    >>> formula_bytes("all_reduce", 4, 1000), formula_bytes("all_gather", 4, 1000)
    (Fraction(1500, 1), Fraction(750, 1))
    """
    return SHARE_SENT[op] * Fraction(size - 1, size) * payload


@dataclass
class Call:
    """One collective as one rank saw it. Bytes; `blocked` is seconds spent waiting for it."""

    number: int  # counts the calls of this rank over all axes
    op: str
    axis: str
    size: int  # ranks on that axis
    about: str  # dtype, shape and what else the ranks must agree on
    payload: int
    sent: int
    phase: str
    unit: str
    where: str  # file:line of the caller
    blocked: float = 0.0


@dataclass(frozen=True)
class Tally:
    """A running sum over calls. Subtract two of them to get what happened in between."""

    calls: int = 0
    payload: int = 0
    sent: int = 0
    blocked: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, before: "Tally") -> "Tally":
        return Tally(*map(operator.sub, astuple(self), astuple(before)))


class Ledger:
    """Counts every call, in `total` and `by` (phase, op, axis), and tells listeners of each."""

    def __init__(self) -> None:
        self.total = Tally()
        self.by: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
        self.listeners: list[Callable[[Call], None]] = []

    def enter(self, call: Call) -> None:
        """Count a call at the moment its bytes are handed over; listeners hear of it then."""
        self._add(call, Tally(1, call.payload, call.sent, 0.0))
        for listen in self.listeners:
            listen(call)

    def waited(self, call: Call, seconds: float) -> None:
        """Charge time that this rank spent blocked on a call."""
        call.blocked += seconds
        self._add(call, Tally(blocked=seconds))

    def _add(self, call: Call, part: Tally) -> None:
        key = (call.phase, call.op, call.axis)
        self.total += part
        self.by[key] += part

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Collect every call made inside the block, in order."""
        calls: list[Call] = []
        self.listeners.append(calls.append)
        try:
            yield calls
        finally:
            self.listeners.remove(calls.append)
