"""Do all ranks make the same call? Each call leaves 64 bytes where its peers can read them.

[Note: the order check] Collectives have no names on the network: ranks that call different ones
hang, misread each other's bytes, or abort. So each rank writes a fingerprint of every call to a
lane of its page before it launches the call: a hash of the operation, dtype, shape, reduction and
algorithm, and its count in the process group. Then it reads its peers' fingerprints of that count.

By default it compares only those that are there already. Of two ranks whose calls differ, the later
one sees the difference, and launches nothing: the earlier one has sent something, but is sent
nothing that it could misread. It fails when its peer ends, or at the time limit.

With `check` a rank waits for its peers' fingerprints before it launches. So a difference is an
error on all ranks at once. It also notices ranks that wait for each other in different groups.

A lane has room for the last FINGERPRINTS calls. A rank on a channel may be further ahead than that
of a peer, which then finds no fingerprint to compare: the rank itself still compares, as it waits.
A message from rank a to rank b uses the lane a>b, in which b writes what it expects.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct

from dist_lab.comm.board.page import (
    CHECKING,
    FINGERPRINT,
    FINGERPRINTS,
    LANE,
    LANE_HEADER,
    LANES,
    LANES_AT,
    LANES_USED,
    LEFT,
    Page,
)
from dist_lab.comm.board.proc import alive, wait_until
from dist_lab.errors import MachineError

MOST = 8 * (LANE_HEADER - 8)  # ranks of one machine
KEY = Struct(f"<8s{MOST // 8}s")  # the group; its ranks on this machine, as a bit for each page
PRINT = Struct("<q16sq")  # the call's number, the hash, the count in the group: written last
COUNT, COUNT_AT = Struct("<q"), 24  # the last field: read first, see `print_at`


class Differ(Exception):
    """A peer's fingerprint differs. `numbers`: page -> the number of its call."""

    def __init__(self, numbers: dict[int, int]) -> None:
        self.numbers = numbers


class Stuck(Exception):
    """Ranks wait for each other in a circle. `numbers`: page -> the number of its call."""

    def __init__(self, numbers: dict[int, int]) -> None:
        self.numbers = numbers


class Lanes:
    """The lanes of one page. Each belongs to a group, and is found by the group's key."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._offsets: dict[bytes, int] = {}
        self._members: dict[bytes, int] = {}

    def find(self, key: bytes) -> int | None:
        """Returns where the lane is; None if the rank has not called anything in this group."""
        if key not in self._offsets:
            self._look()
        return self._offsets.get(key)

    def shared_with(self, position: int) -> set[bytes]:
        """The keys of the groups that the rank of another page is in too."""
        self._look()
        return {key for key, members in self._members.items() if members >> position & 1}

    def _look(self) -> None:
        """Find lanes that are new since the last look."""
        for i in range(len(self._offsets), self.page.get(LANES_USED)):
            at = self.page.at + LANES_AT + i * LANE
            name, members = KEY.unpack_from(self.page.memory, at)
            self._offsets[name] = at + LANE_HEADER
            self._members[name] = int.from_bytes(members, "little")

    def make(self, key: bytes, members: Sequence[int]) -> int:
        """Returns this rank's own lane of a group, a new one at its first call."""
        if (found := self.find(key)) is not None:
            return found
        count = len(self._offsets)
        if count == LANES:
            raise MachineError(
                f"one mesh has more than {LANES} process groups; make a new mesh: init_mesh(...)"
            )
        if max(members) >= MOST:
            raise MachineError(
                f"{max(members) + 1} ranks on one machine are more than {MOST}; start fewer"
            )
        at = self.page.at + LANES_AT + count * LANE
        bits = sum(1 << i for i in members)
        KEY.pack_into(self.page.memory, at, key, bits.to_bytes(MOST // 8, "little"))
        self.page.set(LANES_USED, count + 1)
        made = self.find(key)
        assert made is not None
        return made

    def print_at(self, key: bytes, seq: int) -> tuple[int, bytes, int]:
        """The number, hash and count in the slot of call `seq`; the count is smaller if late."""
        lane = self._offsets.get(key)
        if lane is None:
            lane = self.find(key)
            if lane is None:
                return 0, b"", 0
        memory, at = self.page.memory, lane + seq % FINGERPRINTS * FINGERPRINT
        # The rank may be writing. If the count is there before we read the hash, and still after
        # that, the hash is that of this count.
        while True:
            (count,) = COUNT.unpack_from(memory, at + COUNT_AT)
            found: tuple[int, bytes, int] = PRINT.unpack_from(memory, at)
            if found[2] == count:
                return found

    def missing(self, key: bytes, seq: int, all_lanes: Sequence["Lanes"]) -> list[int]:
        """The pages of the group's ranks that have not made its call `seq`."""
        self.find(key)
        members = self._members.get(key, 0)
        return [
            i for i, lanes in enumerate(all_lanes)
            if members >> i & 1 and lanes.print_at(key, seq)[2] < seq
        ]  # fmt: skip


class Lane:
    """This rank's view of one group: its own lane, and those of its peers.

    Args:
        lanes: of all pages of this machine; `own` is this rank's page among them.
        members: the pages of the group's ranks.
    """

    def __init__(
        self, key: bytes, lanes: Sequence[Lanes], own: int, members: Sequence[int]
    ) -> None:
        self.key, self.lanes, self.own = key, lanes, own
        self.seq = 0
        self.peers = [i for i in members if i != own]
        self._memory, self._at = lanes[own].page.memory, lanes[own].make(key, members)
        self._lock = threading.Lock()
        self._last = 0, b""  # the number and hash of the last call

    def post(self, number: int, text: str) -> None:
        """Write the fingerprint of a call. Raises Differ if a peer's is there, and differs."""
        self.seq += 1
        self._last = number, blake2b(text.encode(), digest_size=16).digest()
        at = self._at + self.seq % FINGERPRINTS * FINGERPRINT
        PRINT.pack_into(self._memory, at, *self._last, self.seq)
        lock = self._lock
        with lock:  # a fence: of two ranks that write and then read, one sees the other's
            pass
        with lock:
            pass
        self.late(self.seq, *self._last)

    def agreement(self) -> "Agreement":
        """The comparison of the last call with all peers."""
        return Agreement(self, self.seq, *self._last)

    def late(self, seq: int, number: int, print_: bytes) -> list[int]:
        """Returns the pages of ranks that have not made call `seq`. Raises Differ."""
        late, differing = [], {}
        for i in self.peers:
            its_number, its_print, its_seq = self.lanes[i].print_at(self.key, seq)
            if its_seq < seq:
                late.append(i)
            elif its_seq == seq and its_print != print_:
                differing[i] = its_number
        if differing:
            raise Differ({self.own: number, **differing})
        return late


@dataclass(frozen=True)
class Agreement:
    """One call's comparison with its peers."""

    lane: Lane
    seq: int
    number: int
    print_: bytes

    def late(self) -> list[int]:
        return self.lane.late(self.seq, self.number, self.print_)

    def wait(self, timeout: float, fail: Callable[[Sequence[int], str], None]) -> None:
        """Wait for all peers. Raises Differ and Stuck; calls fail(pages, why) for late ones."""
        page = self.lane.lanes[self.lane.own].page

        def look(late: Sequence[int]) -> None:
            if circle := find_circle(self.lane.lanes, self.lane.own):
                raise Stuck(circle)
            pages = [self.lane.lanes[i].page for i in late]
            gone = [
                i for i, page in zip(late, pages, strict=True)
                if page.get(LEFT) or not alive(process_of(page))
            ]  # fmt: skip
            if still := [i for i in gone if i in self.late()]:
                fail(still, "its process has ended")

        page.set(CHECKING, self.number)
        if late := wait_until(self.late, timeout, look):
            fail(late, f"timed out after {timeout:g} s")
        page.set(CHECKING, 0)


def process_of(page: Page) -> int:
    who = page.identity()
    return 0 if who is None else who.process


def find_circle(lanes: Sequence[Lanes], own: int) -> dict[int, int]:
    """Returns page -> call number of ranks that wait for each other in a circle with `own`.

    One look at all pages is not one moment: a rank may go on while we read the next. A wait cannot
    end and begin again with the same number, so a circle that is there twice was there in between.
    """
    first = _circle(lanes, own)
    return first if first and _circle(lanes, own) == first else {}


def _circle(lanes: Sequence[Lanes], own: int) -> dict[int, int]:
    paths: list[dict[int, int]] = [{own: lanes[own].page.get(CHECKING)}]
    seen = {own}
    while paths:
        path = paths.pop()
        last = next(reversed(path))
        for i in _waits_for(lanes, last):
            if i == own:
                return path
            if i not in seen and (number := lanes[i].page.get(CHECKING)):
                seen.add(i)
                paths.append({**path, i: number})
    return {}


def _waits_for(lanes: Sequence[Lanes], i: int) -> Iterator[int]:
    page = lanes[i].page
    entry = page.entry(page.get(CHECKING))
    if entry is not None:
        yield from lanes[i].missing(entry.key, entry.seq, lanes)
