"""The record of all collectives: one entry for each, and running totals.

Each entry has two sizes, because they answer different questions. In formulas, S is `payload`:

    payload   the size of the full tensor: the input of all_reduce, reduce_scatter, all_to_all and
              broadcast, the output of all_gather
    sent      the bytes that this rank hands to the transport. Our own algorithms count them at
              each send. For the backend's algorithms they come from a formula (`backend_bytes`),
              which a test compares with the counters of the network interface

The published cost formulas relate the two (N ranks, bandwidth-optimal, per rank; Chan et al. 2007,
"Collective communication: theory, practice, and experience", section 6):

    all_reduce                              2 (N-1)/N S
    all_gather, reduce_scatter, all_to_all    (N-1)/N S
    broadcast                                 (N-1)/N S on average: N-1 copies, N ranks

`formula_bytes` is that table as code. A transport may send more: gloo's reduce_scatter runs an
all_reduce inside, and so sends twice the bytes it needs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

SHARE_SENT = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "broadcast": 1,
}


def formula_bytes(op: str, size: int, payload: int) -> Fraction:
    """Returns the bytes that one of `size` ranks sends for this payload, as in the table. Those of
    a message are its payload.

    >>> formula_bytes("all_reduce", 4, 1000), formula_bytes("all_gather", 4, 1000)
    (Fraction(1500, 1), Fraction(750, 1))
    """
    if op not in SHARE_SENT:
        return Fraction(payload)
    return SHARE_SENT[op] * Fraction(size - 1, size) * payload


def backend_bytes(op: str, size: int, position: int, payload: int, backend: str = "gloo") -> int:
    """Returns the bytes that one rank sends in the backend's own algorithm.

    all_reduce and all_gather are rings, all_to_all is direct. gloo's reduce_scatter is an
    all_reduce that throws most of the result away. Its broadcast is a binomial tree rooted at
    position 0: in round i every rank below 2^i sends everything to the rank at distance 2^i. nccl
    uses rings: in its broadcast each rank sends to the next.

    >>> [backend_bytes("broadcast", 4, i, 100) for i in range(4)]
    [200, 100, 0, 0]
    >>> [backend_bytes("broadcast", 3, i, 100) for i in range(3)]  # nobody is at distance 2 of 1
    [200, 0, 0]
    """
    if op == "broadcast" and backend == "nccl":
        return payload if position < size - 1 else 0
    if op == "broadcast":
        rounds = (1 << i for i in range((size - 1).bit_length()))
        return payload * sum(position < step and position + step < size for step in rounds)
    wasted = 2 if op == "reduce_scatter" and backend == "gloo" else 1
    return int(wasted * formula_bytes(op, size, payload))


@dataclass
class Call:
    """One collective on one rank. Sizes are in bytes."""

    number: int  # counts this rank's calls over all axes
    op: str
    axis: str
    size: int  # ranks on that axis
    about: str  # dtype, shape and other arguments that all ranks must agree on
    payload: int
    due: int  # bytes that this rank sends in this algorithm, by formula
    phase: str
    unit: str
    where: str  # file:line of the caller
    algorithm: str  # "backend": the backend's own
    sent: int = 0  # bytes counted until now
    blocked: float = 0.0  # seconds that this rank waited for it
    group: tuple[tuple[int, ...], int] = (), 0  # its ranks, and the channel of their axis


@dataclass(frozen=True)
class Tally:
    """A running sum over calls. The difference of two is the sum over the calls in between."""

    calls: int = 0
    payload: int = 0
    sent: int = 0
    blocked: float = 0.0
    due: int = 0  # bytes by formula, as in Call

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.calls + other.calls,
            self.payload + other.payload,
            self.sent + other.sent,
            self.blocked + other.blocked,
            self.due + other.due,
        )

    def __sub__(self, other: "Tally") -> "Tally":
        return self + Tally(-other.calls, -other.payload, -other.sent, -other.blocked, -other.due)


class Ledger:
    """Counts every call in `total` and in `by` (phase, op, axis).

    Attributes:
        sizes: axis -> its number of ranks.
        listeners: called with each call when it starts.
        on_wait: called after each wait, with the call and when the wait began and ended, in seconds
            of time.perf_counter.
    """

    def __init__(self) -> None:
        self.total, self.sizes = Tally(), dict[str, int]()
        self.by: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
        self.listeners: list[Callable[[Call], None]] = []
        self.on_wait: list[Callable[[Call, float, float], None]] = []

    def enter(self, call: Call) -> None:
        """Count a call when it starts, and pass it to the listeners.

        Bytes that the backend sends are counted here by formula, all others in `add_sent`.
        """
        self.sizes[call.axis] = call.size
        self._add(call, Tally(1, call.payload, call.sent, due=call.due))
        for listen in self.listeners:
            listen(call)

    def add_sent(self, call: Call, sent: int) -> None:
        """Count bytes that a collective by hand sends, or moves in shared memory."""
        call.sent += sent
        self._add(call, Tally(sent=sent))

    def add_blocked(self, call: Call, began: float, ended: float) -> None:
        """Add the time for which this call blocked this rank, and tell who listens."""
        call.blocked += ended - began
        self._add(call, Tally(blocked=ended - began))
        for listen in self.on_wait:
            listen(call, began, ended)

    def _add(self, call: Call, tally: Tally) -> None:
        self.total += tally
        self.by[call.phase, call.op, call.axis] += tally

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Collect every call that is made inside the block, in order."""
        calls: list[Call] = []
        self.listeners.append(calls.append)
        try:
            yield calls
        finally:
            self.listeners.remove(calls.append)
