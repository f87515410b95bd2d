"""A pool of warm rank processes. They run one body after another: the tests, or a long table.

    pool = Pool(PRELOAD)
    results = pool.run(4, body, *arguments, timeout=60)      # body(rank, *arguments), by rank

The parent sends a Task through the pipe of each rank and gets back what the body returned. Before
each body, a rank leaves its process group and joins a new one (30 ms, most of it inside gloo). So
no message, timeout, group or thread of one body is left in the next.

[Note: closing connections] Before gloo closes a connection it waits for its own thread to release
it. That thread polls every 10 ms, and gloo waits for one connection after another, in every group.
Shutting down a connection wakes the thread, which releases it at once. So ranks shut down all
connections before they leave a group, which halves the cost of a short body. No peer misses a
message: by then the body has ended on all ranks.
"""

import contextlib
import faulthandler
import gc
import io
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dist_lab.observe.sockets import tcp_sockets
from dist_lab.processes import ranks
from dist_lab.processes.failures import (
    Failure,
    collect,
    describe,
    exit_in_words,
    heading,
    ranks_in_words,
)

AT_START = 120.0  # seconds for ranks to import torch and report that they are ready
AT_EXIT = 10.0  # seconds for ranks to end after the last body


@dataclass(frozen=True)
class Task:
    """A body as it is sent to a rank.

    Attributes:
        size, timeout: the number of ranks that run it, and the seconds they have.
        body, arguments: picklable. The rank finds `body` by its module and name.
    """

    size: int
    timeout: float
    body: Callable[..., Any]
    arguments: Sequence[Any]


class RanksFailed(Exception):
    """A body failed on some ranks, or hung. The message is the report, with every traceback."""


class Pool:
    """As many ranks as the largest body so far has needed. A body of n ranks runs on the first n.

    After a failure all ranks are ended, because their state is unknown. The next body starts new
    ones.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = preload
        self._ranks: list[ranks.Rank] = []

    def run(
        self, size: int, body: Callable[..., Any], *arguments: Any, timeout: float
    ) -> list[Any]:
        """Run `body(rank, *arguments)` on `size` ranks, and print what they printed.

        A body fails by raising, or by returning a Failure.

        Returns:
            What the bodies returned, by rank.

        Raises:
            RanksFailed: a rank failed or died, or had not ended after `timeout` seconds.
        """
        try:
            return self._run(Task(size, timeout, body, arguments))
        except BaseException:  # a failure, Ctrl-C, the time limit of another plugin
            self._end()
            raise

    def processes(self) -> set[int]:
        """The ids of the processes of its ranks."""
        return {rank.process.pid or 0 for rank in self._ranks}

    def close(self) -> list[str]:
        """Let every rank end by itself. Returns a line for each that ended with an error."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send(None)
        ranks.join(self._ranks, AT_EXIT)
        return [
            f"rank {number} of the pool: {exit_in_words(code)} after the last body"
            for number, code in enumerate(self._end())
            if code
        ]

    def _run(self, task: Task) -> list[Any]:
        self._grow_to(task.size)
        working = self._ranks[: task.size]
        rendezvous = str(self._path("rendezvous", time.monotonic_ns()))  # a new one for each body
        for rank in working:
            os.truncate(self._path("printed", rank.number), 0)
            with contextlib.suppress(OSError):  # a rank that has just died: `_collect` reports it
                rank.pipe.send((rendezvous, task))
        try:
            return self._collect(working, task.timeout)
        finally:
            for rank in working:
                if printed := self._path("printed", rank.number).read_text(errors="replace"):
                    print(heading(f"rank {rank.number} printed") + printed, end="")

    def _grow_to(self, size: int) -> None:
        """Start the ranks that are missing, and report a rank that died between two bodies."""
        for rank in self._ranks:
            if not rank.process.is_alive():
                end = exit_in_words(rank.process.exitcode or 0)
                text = f"rank {rank.number}: {end}, after the body before this one had ended"
                raise RanksFailed(text)
        if not self._ranks:  # the folder exists as long as the ranks do
            self._folder = tempfile.TemporaryDirectory(prefix="dist_lab-")
        new = [
            ranks.start(number, serve, self._folder.name, preload=self._preload)
            for number in range(len(self._ranks), size)
        ]
        self._ranks += new
        self._collect(new, AT_START)

    def _collect(self, working: Sequence[ranks.Rank], timeout: float) -> list[Any]:
        """Wait for every rank's result, and raise RanksFailed if one has failed."""
        results, failures, running = collect(working, timeout)
        failures = [f if f.details else replace(f, details=self._stack(f.rank)) for f in failures]
        text, size = describe(failures, len(working)), len(working)
        why = "was still running" if failures else f"had not ended after {timeout:g} s"
        for rank in running:
            ranks.ask_for_stack(rank)
        if running:
            time.sleep(0.5)  # until the stacks are written
        for rank in running:
            stack = self._stack(rank.number)
            stack = stack or "It prints no stack: it is stopped, or still starting.\n"
            text += heading(f"rank {rank.number} of {size}: {why}") + stack
        if text:
            if results:
                text += heading(f"{ranks_in_words(list(results))} of {size}: no failure")
            raise RanksFailed(text)
        return [results[rank.number] for rank in working]

    def _stack(self, number: int) -> str:
        return self._path("stack", number).read_text()

    def _path(self, kind: str, number: int) -> Path:
        return Path(self._folder.name, f"{kind}-{number}")

    def _end(self) -> list[int]:
        codes = ranks.stop(self._ranks, grace=0.5)  # ranks have nothing to save
        if self._ranks:
            self._folder.cleanup()
        self._ranks = []
        return codes


# --- in a rank ------------------------------------------------------------------------------------


def serve(pipe: Connection, rank: int, folder: str) -> None:
    """Run one task after another, until None arrives."""
    from dist_lab.mesh import groups

    redirect_output(f"{folder}/printed-{rank}")
    stack = os.open(f"{folder}/stack-{rank}", os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, stack)
    faulthandler.enable(stack)
    kept = {number for number, _ in tcp_sockets()}
    frozen: set[str] = set()
    pipe.send(None)
    while (message := pipe.recv()) is not None:
        rendezvous, task = message
        close_connections(kept)
        result = run_one(task, rank, rendezvous, frozen)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(result)
        if isinstance(result, Failure):
            ranks.end_process(1)  # so that peers that wait for this rank fail now
    groups.disconnect()


def close_connections(kept: set[int]) -> None:
    """Shut down all TCP connections not in `kept`. See [Note: closing connections]."""
    for number, connection in tcp_sockets():
        is_listening = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if number not in kept and not is_listening:
            with contextlib.suppress(OSError):  # it is no longer connected
                connection.shutdown(socket.SHUT_RDWR)


def redirect_output(path: str) -> None:
    """Write everything that this process prints, also from C++, to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    os.close(file)


def run_one(task: Task, rank: int, rendezvous: str, frozen: set[str]) -> Any:
    """Returns the result of the body, or the Failure of this rank."""
    try:
        reset_process(task, rank, rendezvous, frozen)
        return task.body(rank, *task.arguments)
    except BaseException as error:
        return Failure.of(rank, error)


def reset_process(task: Task, rank: int, rendezvous: str, frozen: set[str]) -> None:
    """Undo the last body's changes to this process, and join the ranks of the next one.

    Args:
        frozen: modules whose objects the garbage collector no longer visits.
    """
    import torch

    from dist_lab.mesh import groups

    groups.disconnect()
    gc.collect()
    if new := sys.modules.keys() - frozen:
        gc.freeze()  # modules stay loaded: the next collection then takes 1 ms, not 100
        frozen |= new
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    # Twice the body's time: the pool times out first, and can report where each rank hangs.
    store = groups.file_store(rendezvous, task.size)
    groups.connect(store, rank, task.size, timeout=2 * task.timeout)
