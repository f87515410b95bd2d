"""The board in words: what every rank does, who is to blame, and where two ranks part."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dist_lab.comm.board.page import FAILED, LAST, LEFT, RING, WAITING, Entry, Page
from dist_lab.comm.board.proc import alive, stopped

SHOWN = 5  # calls in the comparison of two ranks
WIDTH = 64


@dataclass(frozen=True)
class Status:
    """What one rank does at one moment.

    Attributes:
        state: "", or one of "ended", "stopped", "has left".
        waiting: the call that blocks it; last: the call that it finished last.
        failed: when a collective failed on it; 0.0: none has.
    """

    rank: int
    place: str
    step: int
    phase: str
    unit: str
    state: str
    failed: float
    waiting: Entry | None
    last: Entry | None
    now: float

    @staticmethod
    def of(rank: int, page: Page) -> "Status | None":
        """Returns None if the rank has not begun its page yet."""
        who = page.identity()
        if who is None:
            return None
        state = ""
        if not alive(who.process):
            state = "ended"
        elif page.get(LEFT):
            state = "has left"
        elif stopped(who.process):
            state = "stopped"
        waiting = page.entry(page.get(WAITING))
        return Status(
            rank, who.place, *page.doing(), state, page.get(FAILED), waiting, last_finished(page),
            time.monotonic(),
        )  # fmt: skip

    @property
    def what(self) -> str:
        """The rank's state and call, in words."""
        states = {"ended": "its process has ended", "stopped": "is stopped (SIGSTOP)"}
        words = [states.get(self.state, self.state)] if self.state else []
        if self.failed:
            words.append(f"failed {self.now - self.failed:.1f} s ago")
        if self.waiting is not None:
            words.append(f"in {self.waiting}, for {self.now - self.waiting.started:.1f} s")
        elif self.last is not None:
            ago = self.now - self.last.finished
            words.append(f"in no collective; last finished {self.last}, {ago:.1f} s ago")
        else:
            words.append("has made no collective yet")
        return "; ".join(words)

    def line(self, python: str) -> str:
        where = " ".join(filter(None, [self.phase, self.unit]))
        place = f" [{self.place}]" if self.place else ""
        now = f"; now at {python}" if python else ""
        return f"rank {self.rank}{place} step {self.step}, {where}: {self.what}{now}"


def last_finished(page: Page) -> Entry | None:
    """The call that finished last. It is among the last ones, so we look there first."""
    last = page.get(LAST)
    for number in range(last, max(0, last - RING), -1):
        entry = page.entry(number)
        if entry is not None and entry.finished:
            return entry
    return None


def by_blame(statuses: Iterable[Status], awaited: Sequence[int]) -> list[Status]:
    """Sorts: ranks that ended by themselves, stopped, awaited, failed, all others.

    Within each group the first comes first. A rank that ended after it failed in a wait did not end
    by itself. One that ended without an error has no time, and comes before all.
    """

    def key(s: Status) -> tuple[int, float, int]:
        gone = s.state in ("ended", "has left")
        if gone and (s.waiting is None or not s.failed):
            return 0, s.failed, s.rank
        if s.state == "stopped":
            return 1, 0.0, s.rank
        if s.rank in awaited and not s.failed:
            return 2, s.last.finished if s.last else 0.0, s.rank
        return (3, s.failed, s.rank) if s.failed else (4, 0.0, s.rank)

    return sorted(statuses, key=key)


def table(statuses: Sequence[Status], python: Mapping[int, str], elsewhere: str) -> str:
    """One line for each rank, in this order."""
    lines = [f"  {status.line(python.get(status.rank, ''))}" for status in statuses]
    return "\n".join(["what every rank was doing:", *lines, *filter(None, [elsewhere])])


def parting(ours: Sequence[Entry], theirs: Sequence[Entry], ranks: tuple[int, int]) -> str:
    """The last calls of two ranks side by side; the first that differs is marked.

    Both sequences must be calls of the same groups.
    """
    left, right = _aligned(ours, theirs)
    pairs = list(zip_longest(left, right))
    first = next(
        (i for i, (a, b) in enumerate(pairs) if a is None or b is None or a.same != b.same),
        len(pairs),
    )
    start = max(0, min(first - SHOWN + 2, len(pairs) - SHOWN))
    rows = [f"where ranks {ranks[0]} and {ranks[1]} part, in their common groups:"]
    rows.append(f"    {f'rank {ranks[0]}':<{WIDTH}} | rank {ranks[1]}")
    for i, (a, b) in enumerate(pairs[start : start + SHOWN], start):
        mark = ">" if i == first else " "
        rows.append(f"  {mark} {_cell(a):<{WIDTH}} | {_cell(b)}".rstrip())
    return "\n".join(rows)


def _aligned(
    ours: Sequence[Entry], theirs: Sequence[Entry]
) -> tuple[Sequence[Entry], Sequence[Entry]]:
    """Drops the oldest calls of each that the other has no record of."""
    known = {(e.key, e.seq): i for i, e in enumerate(theirs)}
    for i, entry in enumerate(ours):
        if (entry.key, entry.seq) in known:
            return ours[i:], theirs[known[entry.key, entry.seq] :]
    return ours[-SHOWN:], theirs[-SHOWN:]


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    words = f"{entry.call} on {entry.on} at {entry.where}"
    return words if len(words) <= WIDTH else f"{words[: WIDTH - 3]}..."
