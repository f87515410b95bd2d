"""The state that all axes of one mesh share on one rank.

It numbers the calls, keeps the ledger, labels each call with the phase of the step and the unit of
the model, and adds the rank, the call and the line that made it to an error of the transport. The
collectives have no other state.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dist_lab.comm.board.board import Board
from dist_lab.comm.board.report import disagreement, report
from dist_lab.comm.board.stack import answering
from dist_lab.comm.choice import check_setting, effective
from dist_lab.comm.ledger import Call, Ledger
from dist_lab.comm.shared.memory import SharedFiles
from dist_lab.errors import CollectiveError, CollectiveMismatch, MachineError

LAST_TAG = 2**31 - 1  # tags are 32-bit integers
PACKAGE = str(Path(__file__).parent)
__all__ = ["SHARED_MEMORY", "CollectiveError", "CollectiveMismatch", "CommContext"]


# LATE: in errors of gloo and shared/memory.py, if a rank did not arrive in time.
# LOST: in errors of gloo, if a rank has ended.
LATE = ("Timed out", "timed out")
LOST = ("Connection closed by peer", "Connection reset by peer")
IN_GLOO = re.compile(r"^\[/\S+\] ")  # the line of gloo's source, before its message
LOOP = "loop"  # the phase between the calls of a job: the training loop's own code
# The unit of the calls that set up a shared buffer. There are many, and they carry no values.
SHARED_MEMORY = "shared memory"


class CommContext:
    """The communication state of one rank, shared by every axis of its mesh.

    Args:
        rank, size: this process's rank, and the number of ranks in the mesh.
        backend: gloo or nccl. It decides which device a tensor must be on to be sent.
        check: compare the calls of all ranks before each collective. A difference is an error that
            names both calls, instead of a hang or a wrong number: see [Note: the order check] in
            board/lanes.py. Between machines it costs one small all_gather per call.
        collectives: auto, backend, or an algorithm by hand: ring, direct, tree. An operation
            without that algorithm uses the backend's. See `choice`.

    Attributes:
        timeout: seconds that a message may take; set by the mesh.
        place: this rank's coordinates, such as dp=0,tp=1; set by the mesh.
        board: what this rank does, for other processes to read; None in a dry run, and where
            processes cannot see each other. See board/.
        step, phase, unit: the labels of the next call. `step` counts from 1. A validation belongs
            to the step before it.
        on_label: called with step, phase and unit when they change.
        dry_run: True if the other ranks do not exist; see `mesh.dry_run`.
        files: how the ranks share memory.
        shared: shared buffer -> its SharedWindow, the memory of all ranks; see `ops.shared_buffer`.

    Raises:
        UserError: `collectives` is unknown, or the backend does not support it.
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
        self.place = ""
        self.board: Board | None = None
        self.on_label: list[Callable[[int, str, str], None]] = []
        self._now: tuple[int, str, str] = 0, "start", ""
        self.dry_run = False
        self.files = SharedFiles()
        self.shared = WeakTensorKeyDictionary()
        self._calls = 0
        self._tags: dict[str, int] = {}

    @contextmanager
    def label(
        self, phase: str | None = None, unit: str | None = None, then: str | None = None
    ) -> Iterator[None]:
        """Label all calls inside the block with this phase and unit.

        After it calls have the labels from before it, or the phase `then`.
        """
        after = (self.phase, self.unit) if then is None else (then, "")
        self.begin(
            self.step, self.phase if phase is None else phase, self.unit if unit is None else unit
        )
        try:
            yield
        finally:
            self.begin(self.step, *after)

    @property
    def step(self) -> int:
        return self._now[0]

    @property
    def phase(self) -> str:
        return self._now[1]

    @phase.setter
    def phase(self, phase: str) -> None:
        self.begin(self._now[0], phase, self._now[2])

    @property
    def unit(self) -> str:
        return self._now[2]

    @unit.setter
    def unit(self, unit: str) -> None:
        self.begin(*self._now[:2], unit)

    def begin(self, step: int, phase: str, unit: str = "") -> None:
        """Label all further calls."""
        self._now = step, phase, unit
        if self.board is not None:
            self.board.page.now(step, phase, unit)
        for listen in self.on_label:
            listen(step, phase, unit)

    def call(
        self, op: str, axis: str, size: int, about: str, payload: int, due: int,
        algorithm: str = "backend",
    ) -> Call:  # fmt: skip
        """Returns the ledger entry of a collective that is about to start, numbered and labeled."""
        self._calls += 1
        return Call(
            self._calls, op, axis, size, about, payload, due, self.phase, self.unit, _caller(),
            algorithm, sent=due if algorithm == "backend" else 0,
        )  # fmt: skip

    def tag(self, axis: str) -> int:
        """Returns the tag of the next collective by hand on an axis; see [Note: tags]."""
        self._tags[axis] = self._tags.get(axis, 0) % LAST_TAG + 1
        return self._tags[axis]

    def describe(self, call: Call) -> str:
        """Returns the rank, the step, the call, and the line that made it, in one phrase."""
        entry = None if self.board is None else self.board.page.entry(call.number)
        place = f" [{self.place}]" if self.place else ""
        unit = f" unit={call.unit}" if call.unit else ""
        return (
            f"rank {self.rank}/{self.size}{place} step {self.step} phase={call.phase}{unit}: "
            f"{call.op} #{call.number} on {entry.on if entry else call.axis} "
            f"({call.about}; {call.payload:,} B) at {call.where}"
        )

    def failure(self, call: Call, error: Exception) -> CollectiveError:
        """Returns the transport's error with the rank, the call, its line, and what to do.

        Then follows what every rank was doing: see board/report.py.
        """
        is_late = any(phrase in str(error) for phrase in LATE)
        is_lost = any(phrase in str(error) for phrase in LOST)
        advice = ""
        if is_late:
            advice = (
                "; find out where the late rank is; if it is only slow, allow more than "
                f"{self.timeout:g} s: init_mesh(timeout=), --timeout"
            )
        elif is_lost:
            advice = "; another rank failed or ended, and its own error is the cause"
        who = all_ranks = ""
        if self.board is not None:
            if numbers := self.board.differing(call.number):
                return self.mismatch(call, *disagreement(self.board, numbers, self.size))
            who, all_ranks = report(self.board, call.number, self.size, lost=is_lost)
        text = IN_GLOO.sub("", str(error))
        said = f"{who}: {text}" if who else text
        return CollectiveError(
            f"{self.describe(call)}: {said}{advice}", all_ranks,
            is_first=self.board is not None and self.board.is_first,
        )  # fmt: skip

    def mismatch(self, call: Call, each: str, all_ranks: str = "") -> CollectiveMismatch:
        """Returns the error of ranks that differ. `each`: what each rank calls, and where."""
        return CollectiveMismatch(
            f"{self.describe(call)}: the ranks of {call.axis} disagree about their next "
            f"collective, and would hang: {each}; let all ranks make the same calls in the same "
            "order",
            all_ranks,
        )

    @contextmanager
    def visible(self) -> Iterator[None]:
        """Inside the block, other processes can ask for this rank's Python line: board/stack.py.

        Only programs do this, because it takes over a signal. Here an error of a library's own
        collective, which is on no board, also becomes a CollectiveError.
        """
        with answering(self.board):
            try:
                yield
            except (CollectiveError, MachineError):
                raise
            except RuntimeError as error:
                if not any(phrase in str(error) for phrase in LATE + LOST):
                    raise
                raise self.failure_of_library(error) from error

    def failure_of_library(self, error: Exception) -> CollectiveError:
        is_lost = any(phrase in str(error) for phrase in LOST)
        who, all_ranks = "", ""
        if self.board is not None:
            who, all_ranks = report(self.board, 0, self.size, lost=is_lost)
        text = IN_GLOO.sub("", str(error).splitlines()[0])
        unit = f" unit={self.unit}" if self.unit else ""
        return CollectiveError(
            f"rank {self.rank}/{self.size} [{self.place}] step {self.step} phase={self.phase}{unit}"
            f": a collective of a library: {f'{who}: ' if who else ''}{text}", all_ranks,
            is_first=self.board is not None and self.board.is_first,
        )  # fmt: skip

    def log(self, write: Callable[[str], object]) -> None:
        """Write one line for each collective when it starts: this shows when ranks communicate.

        `write` gets a whole line with its newline, so that the lines of several ranks do not mix.
        Rank 0 first writes which algorithms are used. The set-up of shared memory is left out.
        """
        if self.rank == 0:
            algorithms = effective(self.collectives, self.backend)
            write(f"collectives {self.collectives}: {algorithms}\n")
            write("calls that set up shared memory are counted, and not listed here\n")

        def write_line(call: Call) -> None:
            if call.unit == SHARED_MEMORY:
                return
            write(
                f"rank {self.rank} | {call.phase:<10} | {call.op:<14} {call.algorithm:<7} "
                f"{call.axis:<4} {call.payload:>11,} B, {call.due:>11,} B sent | "
                f"{call.unit or '-'} {call.about}\n"
            )

        self.ledger.listeners.append(write_line)


def _caller() -> str:
    """Returns file:line of the innermost frame outside this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
