"""Failures of ranks: when one fails, all fail. Find the cause, and report it once.

When a rank dies, its peers fail too, and their errors come first and hide the cause: gloo raises
`Connection closed by peer` on every healthy rank. So each failure has a distance from its cause,
and the nearest is reported first.
"""

import math
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from dist_lab.errors import CollectiveError, Drawn, MachineError, UserError
from dist_lab.processes.ranks import GRACE, Rank

# Errors of gloo and of comm/shared/memory.py on a healthy rank when another rank fails -> their
# distance from the cause.
DISTANCES = {
    "Timed out waiting": 1,
    "this collective: timed out": 1,
    "shared buffer: timed out": 1,
    "this collective: its process has ended": 2,
    "shared buffer: its process has ended": 2,
    "Connection closed by peer": 2,
    "Connection reset by peer": 2,
}


@dataclass(frozen=True)
class Failure:
    """A rank's failure as plain text, so that it can be sent from any process.

    Attributes:
        summary: one line, or several if the error is Drawn (a line and a drawing).
        details: the traceback, which ends in a newline; "" if the process died without one.
        refused: the error is a UserError or MachineError, and `summary` is all that a user needs.
        status: the exit status.
        board: what every rank was doing, if a collective failed.
        is_first: no other rank has failed before, as far as its board shows.
        distance: 0 for a failure of the rank itself, above 0 if another rank's failure caused it.
        when: time.monotonic(), one clock for all processes of a machine.
    """

    rank: int
    summary: str
    details: str
    refused: bool = False
    status: int = 1
    distance: int = 0
    board: str = ""
    is_first: bool = False
    when: float = field(default_factory=time.monotonic)

    @staticmethod
    def of(rank: int, error: BaseException) -> "Failure":
        """Returns the failure of a rank that raised this error."""
        details = "".join(traceback.format_exception(error))
        if isinstance(error, UserError | MachineError):
            summary = str(error) if isinstance(error, Drawn) else " ".join(str(error).split())
            return Failure(rank, summary, details, refused=True, status=error.exit_status)
        summary = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        failed = collective_error(error)
        return Failure(
            rank, summary, details, distance=distance_from_cause(error),
            board=failed.board if failed else "", is_first=failed is not None and failed.is_first,
        )  # fmt: skip


def collect(
    ranks: Sequence[Rank], timeout: float = math.inf, *, after_cause: float = math.inf
) -> tuple[dict[int, Any], list[Failure], list[Rank]]:
    """Wait for one message of every rank. Returns messages by rank, failures, ranks still running.

    A rank fails by sending a Failure, or by dying without a message. Waits for `timeout` seconds,
    but after the first failure no longer than GRACE: a rank whose peer has died may hang for
    minutes. After the first that another rank did not cause, for at most `after_cause` seconds.
    """
    messages: dict[int, Any] = {}
    failures: list[Failure] = []
    running = list(ranks)
    deadline = time.monotonic() + timeout
    while running and (left := deadline - time.monotonic()) > 0:
        sources = [end for rank in running for end in (rank.pipe, rank.process.sentinel)]
        ready = wait(sources, None if left == math.inf else left)
        for rank in [r for r in running if r.pipe in ready or r.process.sentinel in ready]:
            running.remove(rank)
            message = receive(rank)
            if isinstance(message, Failure):
                failures.append(message)
                is_cause = not (message.distance or message.refused)
                grace = min(GRACE, after_cause) if is_cause else GRACE
                deadline = min(deadline, time.monotonic() + grace)
            else:
                messages[rank.number] = message
    return messages, failures, running


def receive(rank: Rank) -> Any:
    """Returns the rank's message, or the failure of a process that died without one."""
    with suppress(EOFError, ConnectionResetError):
        if rank.pipe.poll():
            return rank.pipe.recv()
    rank.process.join()
    return Failure(rank.number, exit_in_words(rank.process.exitcode or 0), details="")


def by_cause(failures: Sequence[Failure]) -> list[Failure]:
    """Sorts by distance from the cause; then `refused` ones last, then by time."""
    return sorted(failures, key=lambda f: (f.distance, f.refused, f.when))


def causes(failures: Sequence[Failure]) -> list[Failure]:
    """Returns the failures with the least distance from the cause, sorted."""
    least = min(failure.distance for failure in failures)
    return [failure for failure in by_cause(failures) if failure.distance == least]


def describe(failures: Sequence[Failure], size: int, *, debug: bool = True) -> str:
    """Returns the tracebacks, the cause first. Equal failures of several ranks are written once.

    Without `debug`, a collective that failed has no traceback: what every rank was doing is more.
    """
    ranks_by_text: dict[tuple[str, str], list[int]] = {}
    for failure in by_cause(failures):
        summary, details = failure.summary, failure.details
        if failure.board and not debug:
            summary, details = f"{summary} (--debug shows the traceback)", f"{failure.board}\n"
        ranks_by_text.setdefault((summary, details), []).append(failure.rank)
    return "".join(
        heading(f"{ranks_in_words(numbers)} of {size}: {summary}") + details
        for (summary, details), numbers in ranks_by_text.items()
    )


def heading(text: str) -> str:
    return f"---- {text} ----\n"


def ranks_in_words(numbers: Sequence[int]) -> str:
    """
    >>> ranks_in_words([2]), ranks_in_words([3, 0, 1])
    ('rank 2', 'ranks 0, 1, 3')
    """
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"


def exit_in_words(exit_code: int) -> str:
    """
    >>> exit_in_words(3), exit_in_words(-11)
    ('exited with status 3', 'killed by SIGSEGV')
    """
    if exit_code >= 0:
        return f"exited with status {exit_code}"
    hint = ", which the kernel sends when memory runs out" if exit_code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-exit_code).name}{hint}"


def collective_error(error: BaseException | None) -> CollectiveError | None:
    """Returns the error itself, or the CollectiveError that caused it."""
    while error is not None and not isinstance(error, CollectiveError):
        error = error.__cause__ or error.__context__
    return error


def one_of_many(failures: Sequence[Failure]) -> list[Failure]:
    """Keeps one of those with a board, the first: each describes the failures of all ranks."""
    first = next((failure for failure in failures if failure.board), None)
    return [failure for failure in failures if not failure.board or failure is first]


def distance_from_cause(error: BaseException) -> int:
    """Returns 0 for an error of this rank, above 0 if it, or its cause, comes from another rank.

    >>> distance_from_cause(ValueError("3"))
    0
    >>> distance_from_cause(RuntimeError("Connection closed by peer [::1]"))
    2
    """
    text = "".join(traceback.format_exception(error, limit=0))  # no source lines, but all causes
    return max((distance for phrase, distance in DISTANCES.items() if phrase in text), default=0)
