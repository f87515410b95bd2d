"""Rank processes: started warm, heard out together, and gone when their parent is.

A new Python spends seconds on importing torch. Here one process, multiprocessing's forkserver, has
imported it and forks each rank from itself in a few milliseconds; it never runs a torch operation,
because thread pools do not survive a fork. A rank talks to its parent through a pipe:

    started = [start(rank, body, ..., preload=PRELOAD) for rank in range(4)]
    heard, failed, running = failures.gather(started)   # one message of each, or how it died
    stop(started)

[Note: orphans] Under a forkserver a rank's parent in the eyes of the kernel is the forkserver,
which outlives the process that asked for the rank, so neither getppid() nor PR_SET_PDEATHSIG tells
of the asker's death. The pipe through which the rank was described does: the asker holds its other
end until it dies, however it dies. On Linux the kernel is told to send SIGKILL when that end
closes, which also ends a rank that is stopped, or in C code that holds the GIL. Elsewhere a thread
waits for it.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

# What a rank needs, torch with it. Every optimizer imports torch._dynamo, which takes it 2 seconds.
PRELOAD = ("dist_lab.mesh.mesh", "torch._dynamo")
GRACE = 2.0  # seconds for the others once one rank has failed; and from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Rank:
    """A rank process as its parent sees it."""

    number: int
    process: BaseProcess
    pipe: Connection


def start(number: int, body: Callable[..., None], *arguments: Any, preload: Sequence[str]) -> Rank:
    """Start `body(pipe, number, *arguments)` in a new rank process.

    Args:
        body, arguments: picklable; `body` is found in the child by its module and name.
        preload: modules for the forkserver to import. It starts once in the life of a process, so
            the first call decides; a module that is missing there is imported by each rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_enter, args=(body, theirs, number, *arguments), name=f"rank {number}"
    )
    process.start()
    theirs.close()  # the child holds the only copy now: its death is an end of file for us
    return Rank(number, process, ours)


def ask_for_stack(rank: Rank) -> None:
    """Send the signal at which faulthandler prints a rank's stack; it does not need the GIL."""
    assert rank.process.pid is not None
    os.kill(rank.process.pid, signal.SIGUSR1)


def stop(ranks: Sequence[Rank], *, grace: float = GRACE) -> list[int]:
    """End what still runs: SIGTERM, `grace` seconds, SIGKILL. Returns every exit code.

    An exception that arrives meanwhile, as from a second Ctrl-C, cuts the grace short.
    """
    try:
        for rank in ranks:
            if rank.process.is_alive():
                rank.process.terminate()
        join(ranks, grace)
    finally:
        for rank in ranks:
            if rank.process.is_alive():
                rank.process.kill()
        for rank in ranks:
            rank.process.join()
            rank.pipe.close()
    return [rank.process.exitcode or 0 for rank in ranks]


def join(ranks: Sequence[Rank], seconds: float) -> None:
    """Wait for all to end by themselves, together no longer than this."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.signal = number


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[None]:
    """Inside the block each of these signals raises Interrupted."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_process(status: int) -> NoReturn:
    """At once, so that no destructor of a broken process group gets the chance to hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # knows of containers and taskset; Linux alone has it
    except AttributeError:
        return os.cpu_count() or 1


# --- in the child ---------------------------------------------------------------------------------


def _enter(body: Callable[..., None], *arguments: Any) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    body(*arguments)


def _die_with_parent() -> None:
    """See [Note: orphans]."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process that multiprocessing has started"
    sentinel = parent.sentinel
    if sys.platform == "linux":
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(sentinel, fcntl.F_GETFL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
        if wait([sentinel], 0):  # it died before the kernel was told
            os._exit(1)
    else:

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
