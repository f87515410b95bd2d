"""One rank's page: what the rank does now, its last calls, and the fingerprints of its calls.

A page is a part of a file in memory. Its rank alone writes it, at every call; the other ranks of
this machine, and `launch/where.py`, read it at any time without asking. All fields have a fixed
place and size, so one write takes less than a microsecond:

    header    who the rank is, the step, phase and unit that it is in, the call that it waits for
    ring      its last RING calls: call n is in slot n % RING
    lanes     fingerprints of its calls, one lane for each process group: see lanes.py

A reader may meet a slot that is being written. A slot begins with the number of its call, which is
0 in the meantime, and a reader reads the number before and after the rest.
"""

import time
from dataclasses import dataclass
from mmap import mmap
from struct import Struct
from typing import Any

from dist_lab.comm.ledger import Call

MAGIC = b"dl-board"
IDENTITY = Struct("<8s16sqiiq64s64s")  # magic, token, process, rank, size, pages, place, mesh
STACK = Struct("<q"), 192  # the file that faulthandler writes stacks to; 0: there is none
LAST = Struct("<q"), 200  # the number of the last call
WAITING = Struct("<q"), 208  # the number of the call that blocks the rank now; 0: none does
CHECKING = Struct("<q"), 216  # the number of the call that it compares with its peers; 0: none
FAILED = Struct("<d"), 224  # when a collective failed here; 0.0: none has
LEFT = Struct("<d"), 232  # when the rank dropped its mesh; 0.0: it has not
LANES_USED = Struct("<q"), 240
NOW = Struct("<q24s96s"), 256  # step, phase, unit

RING, SLOT, RING_AT = 256, 384, 512
NUMBER = Struct("<q")
FINISHED = Struct("<d"), 8  # its place in a slot
BODY = Struct("<dd8sqqiiq16s12s40s96s24s64s48s"), 8
LANES, LANE_HEADER, FINGERPRINTS, FINGERPRINT = 1024, 64, 256, 64
LANE = LANE_HEADER + FINGERPRINTS * FINGERPRINT
LANES_AT = 100 << 10
PAGE = LANES_AT + LANES * LANE  # most of it is never touched, and takes no memory


@dataclass(frozen=True)
class Entry:
    """One call of a rank, as its page has it. `key` and `on` name the group, `seq` counts on it."""

    number: int
    finished: float  # time.monotonic(), one clock for all processes; 0.0: it has not
    started: float
    key: bytes
    seq: int
    step: int
    channel: int
    size: int
    payload: int
    op: str
    algorithm: str
    on: str
    about: str
    phase: str
    unit: str
    where: str

    @property
    def call(self) -> str:
        """The call in words, without its number."""
        by = "" if self.algorithm == "backend" else f" by {self.algorithm}"
        return f"{self.op}({self.about}){by}"

    @property
    def same(self) -> tuple[bytes, int, str]:
        """Equal on all ranks that make the same call."""
        is_message = self.op in ("send", "recv")
        return self.key, self.seq, self.about.partition(", peer")[0] if is_message else self.call

    @property
    def short(self) -> str:
        return f"{self.call} #{self.number} on {self.on}"

    def __str__(self) -> str:
        return f"{self.short}, {self.payload:,} B, at {self.where}"


@dataclass(frozen=True)
class Identity:
    """Who writes a page. `place` has the rank's coordinates, such as dp=0,tp=1."""

    process: int
    rank: int
    size: int
    pages: int
    place: str
    mesh: str


class Page:
    """A page in mapped memory. Only its own rank calls the methods of the first part."""

    def __init__(self, memory: mmap, position: int) -> None:
        self.memory, self.at = memory, position * PAGE

    # --- the rank writes ------------------------------------------------------------------------

    def claim(self, token: bytes, who: Identity) -> None:
        IDENTITY.pack_into(
            self.memory, self.at, MAGIC, token, who.process, who.rank, who.size, who.pages,
            who.place.encode(), who.mesh.encode(),
        )  # fmt: skip

    def now(self, step: int, phase: str, unit: str) -> None:
        layout, offset = NOW
        layout.pack_into(self.memory, self.at + offset, step, phase.encode(), unit.encode())

    def write(
        self, call: Call, started: float, key: bytes, seq: int, step: int, channel: int, on: str
    ) -> None:
        """Write a call that starts: see Entry."""
        memory, at = self.memory, self.at + RING_AT + call.number % RING * SLOT
        NUMBER.pack_into(memory, at, 0)
        BODY[0].pack_into(
            memory, at + BODY[1], 0.0, started, key, seq, step, channel, call.size, call.payload,
            call.op.encode(), call.algorithm.encode(), on.encode(), call.about.encode(),
            call.phase.encode(), call.unit.encode(), call.where.encode(),
        )  # fmt: skip
        NUMBER.pack_into(memory, at, call.number)
        LAST[0].pack_into(memory, self.at + LAST[1], call.number)

    def finish(self, number: int) -> None:
        """The call has finished, and blocks the rank no more."""
        at = self.at + RING_AT + number % RING * SLOT
        if NUMBER.unpack_from(self.memory, at)[0] == number:
            FINISHED[0].pack_into(self.memory, at + FINISHED[1], time.monotonic())
        self.set(WAITING, 0)

    def set(self, field: tuple[Struct, int], value: float) -> None:
        field[0].pack_into(self.memory, self.at + field[1], value)

    # --- anybody reads --------------------------------------------------------------------------

    def get(self, field: tuple[Struct, int]) -> Any:
        return field[0].unpack_from(self.memory, self.at + field[1])[0]

    def identity(self, token: bytes | None = None) -> Identity | None:
        """Who writes this page; None if nobody does, or somebody with another token."""
        magic, its_token, process, rank, size, pages, place, mesh = IDENTITY.unpack_from(
            self.memory, self.at
        )
        if magic != MAGIC or not process or token not in (None, its_token):
            return None
        return Identity(process, rank, size, pages, text(place), text(mesh))

    def doing(self) -> tuple[int, str, str]:
        """The step, phase and unit that the rank is in."""
        step, phase, unit = NOW[0].unpack_from(self.memory, self.at + NOW[1])
        return step, text(phase), text(unit)

    def entry(self, number: int) -> Entry | None:
        """The call of this number; None if it is too long ago, or being written."""
        at = self.at + RING_AT + number % RING * SLOT
        if number < 1 or NUMBER.unpack_from(self.memory, at)[0] != number:
            return None
        finished, started, key, seq, step, channel, size, payload, *words = BODY[0].unpack_from(
            self.memory, at + BODY[1]
        )
        if NUMBER.unpack_from(self.memory, at)[0] != number:
            return None
        numbers = finished, started, key, seq, step, channel, size, payload
        return Entry(number, *numbers, *map(text, words))

    def entries(self) -> list[Entry]:
        """The calls that the ring still has, oldest first."""
        last = self.get(LAST)
        found = [self.entry(number) for number in range(max(1, last - RING + 1), last + 1)]
        return [entry for entry in found if entry is not None]


def text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
