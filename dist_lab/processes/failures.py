"""Failures of ranks: when one fails, all fail; find the cause, and tell it once.

A rank that dies takes its peers with it, and theirs are the errors that come first and in number:
`Connection closed by peer` is what gloo says on every rank that is fine. So each failure carries
how far it is from its cause, and the nearest is told first.
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

from dist_lab.errors import Drawn, MachineError, UserError
from dist_lab.processes.ranks import GRACE, Rank

# What gloo says on a rank that is fine when another one is not, and how far that is from the cause.
SECOND_HAND = {
    "Timed out waiting": 1,
    "Connection closed by peer": 2,
    "Connection reset by peer": 2,
}


@dataclass(frozen=True)
class Failure:
    """How a rank failed, in plain text, so that it travels from any process.

    Attributes:
        what: the failure in one line; of one that is Drawn, in several.
        story: the traceback, which ends in a newline; "" of a process that died without one.
        refused: it is a UserError or MachineError, and `what` is all that its reader needs.
        second_hand: 0 for a failure of the rank itself, above for a trace of another's.
        when: time.monotonic(), one clock for all processes of a machine.
    """

    rank: int
    what: str
    story: str
    refused: bool = False
    status: int = 1
    second_hand: int = 0
    when: float = field(default_factory=time.monotonic)

    @staticmethod
    def of(rank: int, error: BaseException) -> "Failure":
        story = "".join(traceback.format_exception(error))
        if isinstance(error, UserError | MachineError):
            what = str(error) if isinstance(error, Drawn) else " ".join(str(error).split())
            return Failure(rank, what, story, refused=True, status=error.exit_status)
        what = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        return Failure(rank, what, story, second_hand=second_hand(error))


def gather(
    ranks: Sequence[Rank], timeout: float = math.inf
) -> tuple[dict[int, Any], list[Failure], list[Rank]]:
    """Wait for one message of every rank: (messages by rank, failures, ranks still running).

    A rank fails by sending a Failure, or by dying without a word. Waits for `timeout` seconds; once
    a rank has failed, no longer than GRACE, because a rank whose peer is gone may wait for it for
    minutes.
    """
    heard: dict[int, Any] = {}
    failures: list[Failure] = []
    running = list(ranks)
    deadline = time.monotonic() + timeout
    while running and (left := deadline - time.monotonic()) > 0:
        signs = [sign for rank in running for sign in (rank.pipe, rank.process.sentinel)]
        ready = wait(signs, None if left == math.inf else left)
        for rank in [r for r in running if r.pipe in ready or r.process.sentinel in ready]:
            running.remove(rank)
            message = receive(rank)
            if isinstance(message, Failure):
                failures.append(message)
                deadline = min(deadline, time.monotonic() + GRACE)
            else:
                heard[rank.number] = message
    return heard, failures, running


def receive(rank: Rank) -> Any:
    """The message that has come, or the failure of a process that died without one."""
    with suppress(EOFError, ConnectionResetError):
        if rank.pipe.poll():
            return rank.pipe.recv()
    rank.process.join()
    return Failure(rank.number, how_it_ended(rank.process.exitcode or 0), story="")


def by_cause(failures: Sequence[Failure]) -> list[Failure]:
    """The nearest to the cause first, a defect before a refusal, then the earliest."""
    return sorted(failures, key=lambda f: (f.second_hand, f.refused, f.when))


def causes(failures: Sequence[Failure]) -> list[Failure]:
    """Those of `by_cause` that are no more second-hand than the first."""
    least = min(failure.second_hand for failure in failures)
    return [failure for failure in by_cause(failures) if failure.second_hand == least]


def tell(failures: Sequence[Failure], size: int) -> str:
    """The stories, those by the cause first; what several ranks say in the same words, once."""
    told: dict[tuple[str, str], list[int]] = {}
    for failure in by_cause(failures):
        told.setdefault((failure.what, failure.story), []).append(failure.rank)
    return "".join(
        heading(f"{named(who)} of {size}: {what}") + story for (what, story), who in told.items()
    )


def heading(text: str) -> str:
    return f"---- {text} ----\n"


def named(numbers: Sequence[int]) -> str:
    """
    >>> named([2]), named([3, 0, 1])
    ('rank 2', 'ranks 0, 1, 3')
    """
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"


def how_it_ended(exit_code: int) -> str:
    """
    >>> how_it_ended(3), how_it_ended(-11)
    ('exited with status 3', 'killed by SIGSEGV')
    """
    if exit_code >= 0:
        return f"exited with status {exit_code}"
    hint = ", which the kernel sends when memory runs out" if exit_code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-exit_code).name}{hint}"


def second_hand(error: BaseException) -> int:
    """How far an error, or what caused it, is from the first one.

    >>> second_hand(ValueError("3")), second_hand(RuntimeError("Connection closed by peer [::1]"))
    (0, 2)
    """
    said = "".join(traceback.format_exception(error, limit=0))  # no source lines, but all causes
    return max((far for phrase, far in SECOND_HAND.items() if phrase in said), default=0)
