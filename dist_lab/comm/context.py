"""The state that all axes of one mesh share on one rank.

It numbers the calls, keeps the ledger, labels each call with the phase of the step and the unit of
the model, and turns an error of the transport into a sentence that names the rank, the call and the
line that made it. There is no other state behind the collectives.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dist_lab.comm.choice import check_setting, effective
from dist_lab.comm.ledger import Call, Ledger

LAST_TAG = 2**31 - 1  # tags are 32-bit integers
PACKAGE = str(Path(__file__).parent)


# What gloo and shared/memory.py say of a rank that was waited for in vain.
LATE = ("Timed out", "timed out", "not so far after")


class CollectiveError(RuntimeError):
    """A collective that failed in the transport: a peer died, or did not arrive in time."""


class CollectiveMismatch(CollectiveError):
    """The ranks of an axis were about to run different collectives. Nothing was sent."""


class CommContext:
    """Shared by every axis of a mesh on one rank.

    Args:
        rank, size: of the whole mesh.
        backend: gloo or nccl; it decides on which device tensors must be to be sent.
        check: before each collective the ranks compare what they are about to call, and a
            difference is an error naming both calls instead of a hang or a wrong number.
            Costs one small all_gather a call.
        collectives: whose algorithms: auto, backend, or a family by hand, which is then used by
            the operations that have it. See `choice`.

    Attributes:
        timeout: seconds that a message may take; the mesh sets it.
        dry_run: the other ranks do not exist; see `mesh.dry_run`.
        shared: shared buffer -> the memory of all ranks; see `ops.shared_buffer`.

    Raises:
        UserError: no such setting of `collectives`, or not on this backend.
    """

    def __init__(
        self, rank: int, size: int, *, backend: str = "gloo", check: bool = False,
        collectives: str = "auto",
    ) -> None:  # fmt: skip
        check_setting(collectives, backend)
        self.rank, self.size, self.backend, self.check = rank, size, backend, check
        self.collectives, self.timeout = collectives, 60.0
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        self.ledger = Ledger()
        self.phase, self.unit = "start", ""
        self.dry_run = False
        self.shared = WeakTensorKeyDictionary()
        self._calls = 0
        self._tags: dict[str, int] = {}

    @contextmanager
    def label(self, phase: str | None = None, unit: str | None = None) -> Iterator[None]:
        """Label all calls inside the block with this phase and unit."""
        before = self.phase, self.unit
        self.phase = self.phase if phase is None else phase
        self.unit = self.unit if unit is None else unit
        try:
            yield
        finally:
            self.phase, self.unit = before

    def call(
        self, op: str, axis: str, size: int, about: str, payload: int, due: int,
        algorithm: str = "backend",
    ) -> Call:  # fmt: skip
        """Number and label the collective that is about to start."""
        self._calls += 1
        return Call(
            self._calls, op, axis, size, about, payload, due, self.phase, self.unit, _caller(),
            algorithm, sent=due if algorithm == "backend" else 0,
        )  # fmt: skip

    def tag(self, axis: str) -> int:
        """The tag of the next collective by hand on an axis; see [Note: tags]."""
        self._tags[axis] = self._tags.get(axis, 0) % LAST_TAG + 1
        return self._tags[axis]

    def describe(self, call: Call) -> str:
        unit = f" unit={call.unit}" if call.unit else ""
        return (
            f"rank {self.rank}/{self.size} phase={call.phase}{unit}: "
            f"{call.op} #{call.number} on {call.axis} ({call.about}) at {call.where}"
        )

    def failure(self, call: Call, error: Exception) -> CollectiveError:
        """The transport's error, preceded by the rank, the call and the line that made it."""
        advice = ""
        if any(mark in str(error) for mark in LATE):
            advice = (
                f"; if another rank was only slow, allow more than {self.timeout:g} s: "
                "init_mesh(timeout=), --timeout"
            )
        return CollectiveError(f"{self.describe(call)}: {error}{advice}")

    def log(self, write: Callable[[str], object]) -> None:
        """Write one line for each collective as it fires: the answer to "when do ranks talk?".

        `write` gets a whole line with its newline, so that the lines of several ranks do not mix.
        Rank 0 first writes which algorithms are used.
        """
        if self.rank == 0:
            means = effective(self.collectives, self.backend)
            write(f"collectives {self.collectives}: {means}\n")

        def line(call: Call) -> None:
            write(
                f"rank {self.rank} | {call.phase:<10} | {call.op:<14} {call.algorithm:<7} "
                f"{call.axis:<4} {call.payload:>11,} B, {call.due:>11,} B sent | "
                f"{call.unit or '-'} {call.about}\n"
            )

        self.ledger.listeners.append(line)


def _caller() -> str:
    """file:line of the first frame outside this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
