"""A rank's view of the board: it writes its own page, and reads those of the other local ranks.

The board is one file in memory without a name (`memfd_create`): the first rank of the machine makes
it, and the others open it through /proc/PID/fd. So there is nothing to remove after a run, however
it ends. Its pages stay readable for the ranks that live, also when the rank that made it is dead.
"""

import mmap
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from dist_lab.comm.board.lanes import Lane, Lanes
from dist_lab.comm.board.page import (
    FAILED,
    LEFT,
    PAGE,
    WAITING,
    Entry,
    Identity,
    Page,
)
from dist_lab.comm.board.words import Status
from dist_lab.comm.ledger import Call

JUST_NOW = 2.0  # seconds
NAME = "dist_lab-board"  # in the link of /proc/PID/fd


class Line(Protocol):
    """The part of `mesh.Axis` that the board reads."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def channel(self) -> int: ...


@dataclass(frozen=True)
class Group:
    """A process group, or the messages between two of its ranks, as the board knows it."""

    key: bytes
    on: str  # such as dp{1,3}; dp{1,3}/2 on channel 2
    channel: int
    lane: Lane
    is_local: bool  # all of its ranks are on this machine


class Board:
    """The pages of this machine's ranks.

    Args:
        file: the open file, which this object closes.
        ranks: the global rank of each page.
        rank: this one.
    """

    def __init__(self, file: int, token: bytes, ranks: Sequence[int], rank: int) -> None:
        self.memory = mmap.mmap(file, len(ranks) * PAGE)
        self.file, self.token, self.ranks, self.rank = file, token, tuple(ranks), rank
        self.position = self.ranks.index(rank)
        self.pages = [Page(self.memory, i) for i in range(len(ranks))]
        self.page = self.pages[self.position]
        self._lanes = [Lanes(page) for page in self.pages]
        self._groups: dict[tuple[object, ...], Group] = {}
        weakref.finalize(self, _leave, self.page, file, os.getpid())

    def claim(self, size: int, place: str, mesh: str) -> None:
        """Begin this rank's page. Before that, nobody believes what is in it."""
        who = Identity(os.getpid(), self.rank, size, len(self.pages), place, mesh)
        self.page.claim(self.token, who)

    # --- what this rank does --------------------------------------------------------------------

    def enter(self, call: Call, step: int, group: Group, fingerprint: str) -> None:
        """Write a call that is about to start. Raises lanes.Differ."""
        lane = group.lane
        self.page.write(
            call, time.monotonic(), group.key, lane.seq + 1, step, group.channel, group.on
        )
        lane.post(call.number, fingerprint)

    def wait_begins(self, number: int) -> None:
        self.page.set(WAITING, number)

    def wait_ends(self, number: int) -> None:
        self.page.finish(number)

    def failed(self) -> None:
        """A collective has failed on this rank; the first time counts."""
        if not self.page.get(FAILED):
            self.page.set(FAILED, time.monotonic())

    def failed_before(self) -> bool:
        """Whether a collective failed on this rank a moment ago, and its error is on its way."""
        return 0 < time.monotonic() - self.page.get(FAILED) < JUST_NOW

    @property
    def is_first(self) -> bool:
        """This rank has failed, and no other of this machine before it."""
        times = [time for page in self.pages if (time := page.get(FAILED))]
        return bool(times) and min(times) == self.page.get(FAILED)

    # --- groups ---------------------------------------------------------------------------------

    def group(self, axis: Line) -> Group:
        return self._group(axis, axis.ranks, "")

    def messages(self, axis: Line, sender: int, receiver: int) -> Group:
        """The messages from one position on an axis to another."""
        ranks = axis.ranks[sender], axis.ranks[receiver]
        return self._group(axis, ranks, f"{ranks[0]}>{ranks[1]}")

    def _group(self, axis: Line, ranks: tuple[int, ...], between: str) -> Group:
        short = axis.name, axis.channel, axis.ranks, between
        if short not in self._groups:
            key = blake2b(repr(short).encode(), digest_size=8).digest()
            members = [i for i, rank in enumerate(self.ranks) if rank in ranks]
            lane = Lane(key, self._lanes, self.position, members)
            channel = f"/{axis.channel}" if axis.channel else ""
            on = f"{axis.name}{{{between or numbers_in_words(ranks)}}}{channel}"
            self._groups[short] = Group(
                key, on, axis.channel, lane, len(members) == len(set(ranks))
            )
        return self._groups[short]

    # --- what the other ranks do ----------------------------------------------------------------

    def others(self) -> Iterator[tuple[int, Page]]:
        """Each other rank of this machine, and its page."""
        for rank, page in zip(self.ranks, self.pages, strict=True):
            if rank != self.rank:
                yield rank, page

    def statuses(self) -> list[Status]:
        """What every rank of this machine does now."""
        found = (Status.of(*pair) for pair in zip(self.ranks, self.pages, strict=True))
        return [status for status in found if status is not None]

    def missing(self, entry: Entry, position: int | None = None) -> list[int]:
        """The ranks of this machine that have not made this call, of ours or another page."""
        lanes = self._lanes[self.position if position is None else position]
        return [self.ranks[i] for i in lanes.missing(entry.key, entry.seq, self._lanes)]

    def differing(self, number: int) -> dict[int, int]:
        """Page -> number of the call, if ranks differ about this call of ours; else empty."""
        if (entry := self.page.entry(number)) is None:
            return {}
        prints = {i: lanes.print_at(entry.key, entry.seq) for i, lanes in enumerate(self._lanes)}
        made = {i: found for i, found in prints.items() if found[2] == entry.seq}
        differ = len({print_ for _, print_, _ in made.values()}) > 1 and self.position in made
        return {i: number for i, (number, _, _) in made.items()} if differ else {}

    def awaited(self) -> list[int]:
        """The ranks that others wait for, and that wait for nobody."""
        waiting = [page.entry(page.get(WAITING)) for page in self.pages]
        late = {rank for i, entry in enumerate(waiting) if entry for rank in self.missing(entry, i)}
        busy = {rank for rank, entry in zip(self.ranks, waiting, strict=True) if entry}
        return sorted(late - busy)

    def common(self, rank: int) -> set[bytes]:
        """The keys of the groups that this rank and another one are in."""
        other = self.ranks.index(rank)
        ours, theirs = self._lanes[self.position], self._lanes[other]
        return ours.shared_with(other) | theirs.shared_with(self.position)


def new_file(pages: int) -> int:
    """Returns a new file in memory with room for so many pages; none of it is used yet."""
    file = os.memfd_create(NAME)
    os.ftruncate(file, pages * PAGE)
    return file


def boards_of(process: int) -> Iterator[str]:
    """Yields the paths of the boards that a process has made. Raises OSError."""
    folder = f"/proc/{process}/fd"
    for name in sorted(os.listdir(folder), key=int):
        path = f"{folder}/{name}"
        try:
            if os.readlink(path).startswith(f"/memfd:{NAME}"):
                yield path
        except OSError:
            continue  # closed in the meantime


def numbers_in_words(numbers: Sequence[int], separator: str = ",") -> str:
    """Returns numbers as ranges, where three or more follow each other.

    >>> numbers_in_words([0, 1, 2, 3, 6, 8, 9]), numbers_in_words([0, 1, 2, 5, 8, 9], " ")
    ('0-3,6,8,9', '0-2 5 8 9')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return separator.join(text for part in texts for text in part)


def _leave(page: Page, file: int, process: int) -> None:
    os.close(file)
    if os.getpid() == process:  # not in a fork, such as a worker that loads data
        page.set(LEFT, time.monotonic())
