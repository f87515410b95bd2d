"""Rank processes: they fork from a warm process, report to their parent, and end when it ends.

A new Python spends seconds on importing torch. So one process, multiprocessing's forkserver,
imports it once and forks each rank from itself in a few milliseconds. It never runs a torch
operation, because thread pools do not survive a fork. A rank talks to its parent through a pipe:

    started = [start(rank, body, ..., preload=PRELOAD) for rank in range(4)]
    messages, failed, running = failures.collect(started)   # one message of each, or how it died
    stop(started)

[Note: orphans] A rank must end when the process that started it dies. For the kernel a rank's
parent is the forkserver, which lives longer, so neither getppid() nor PR_SET_PDEATHSIG notices that
death. The pipe that brought the rank's arguments notices it: the starter holds the other end until
it dies, for whatever reason. On Linux the kernel sends SIGKILL to the rank when that end closes.
This also ends a rank that is stopped, or that runs C code which holds the GIL. On other systems a
thread waits until that end closes.
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
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

# Modules that every rank needs, torch among them. Every optimizer imports torch._dynamo: 2 seconds.
PRELOAD = ("dist_lab.mesh.mesh", "torch._dynamo")
GRACE = 2.0  # seconds for the other ranks after a failure, and from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Rank:
    """A rank process as its parent sees it."""

    number: int
    process: BaseProcess
    pipe: Connection


def start(number: int, body: Callable[..., None], *arguments: Any, preload: Sequence[str]) -> Rank:
    """Start `body(pipe, number, *arguments)` in a new rank process.

    Args:
        body, arguments: picklable. The child finds `body` by its module and name.
        preload: modules for the forkserver to import. The forkserver starts once per
            process, so only the first call counts. Each rank imports what was not preloaded.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    start_forkserver()
    parent_end, child_end = context.Pipe()
    process = context.Process(
        target=_enter, args=(body, child_end, number, *arguments), name=f"rank {number}"
    )
    process.start()
    child_end.close()  # the child holds the only copy now: its death is an end of file for us
    return Rank(number, process, parent_end)


def start_forkserver() -> None:
    """Start it if it does not run. It blocks SIGINT, and so do the ranks, which inherit that.

    A terminal sends Ctrl-C to it, too. It would print a traceback while it imports torch.
    """
    resource_tracker.ensure_running()  # its start would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ask_for_stack(rank: Rank) -> None:
    """Send the signal on which faulthandler prints the rank's stack. This needs no GIL."""
    assert rank.process.pid is not None
    os.kill(rank.process.pid, signal.SIGUSR1)


def stop(ranks: Sequence[Rank], *, grace: float = GRACE) -> list[int]:
    """End the ranks that still run: SIGTERM, `grace` seconds, SIGKILL. Returns all exit codes.

    An exception in between, such as a second Ctrl-C, ends the grace period.
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
    """Wait until all ranks have ended by themselves, for at most this many seconds in total."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.signal = number


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[None]:
    """Make each of these signals raise Interrupted inside the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    handlers = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_process(status: int) -> NoReturn:
    """End this process at once, so that no destructor of a broken process group can hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def cores() -> int:
    """Returns the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # respects containers and taskset; only on Linux
    except AttributeError:
        return os.cpu_count() or 1


# --- in the child ---------------------------------------------------------------------------------


def _enter(body: Callable[..., None], *arguments: Any) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all ranks; the parent ends them
    body(*arguments)


def _die_with_parent() -> None:
    """End this process when the one that started it dies; see [Note: orphans]."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"
    sentinel = parent.sentinel
    if sys.platform == "linux":
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(sentinel, fcntl.F_GETFL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
        if wait([sentinel], 0):  # the starter died before this setup
            os._exit(1)
    else:

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
