"""A warm pool of rank processes, each of which runs the body of one test after another.

The parent sends a Task down the pipe of each rank and hears how its body ended. Before a body runs,
its rank is made as good as new: it leaves the process group and joins another one (30 ms, most of
it inside gloo), so that no message, timeout, group or thread of one test is there in the next.

[Note: hanging up] Before gloo closes a connection it waits until its own thread, which looks up
every 10 ms, has let go of it: one after another, of every group. A connection that has ended wakes
that thread, which then lets go of it by itself. So the ranks end all of them before they leave,
which halves what a test costs. No peer misses anything: the body has ended on all ranks by then.
"""

import ast
import contextlib
import faulthandler
import gc
import importlib.util
import io
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import loads
from types import ModuleType
from typing import Any

import pytest

from dist_lab.observe.sockets import tcp_sockets
from dist_lab.processes import ranks
from dist_lab.processes.failures import Failure, gather, heading, how_it_ended, named, tell

AT_START = 120.0  # seconds for ranks to import torch and say that they are there
AT_EXIT = 10.0  # seconds for ranks to end after the last test


@dataclass(frozen=True)
class Task:
    """One test, as it is sent to a rank.

    Attributes:
        size, timeout: the ranks that run it, and the seconds they have.
        axes: of the mesh that the body gets; None if it asks for none.
        module, path: of the file that the test is in.
        name: of the function in there, `TestClass.test_name` for a method.
        search: sys.path.
        values: the other arguments of the body, each pickled.
        filters: warnings.filters, pickled.
    """

    size: int
    timeout: float
    axes: Mapping[str, Any] | None
    module: str
    path: str
    name: str
    search: Sequence[str]
    values: Mapping[str, bytes]
    filters: bytes


Ended = tuple[str, str] | None  # a rank's message if nothing failed: (skip or xfail, the reason)


class Pool:
    """As many ranks as the largest test so far has asked for; a test of n runs on the first n.

    After a failure all are ended, since nobody knows what state they are in, and the next test
    starts new ones.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = preload
        self._ranks: list[ranks.Rank] = []

    def run(self, task: Task) -> None:
        """Run a test, print what its ranks printed, and fail or skip as they did."""
        try:
            outcomes = self._run(task)
        except BaseException:  # a failed test, Ctrl-C, the time limit of another plugin
            self._end()
            raise
        for outcome in outcomes:
            if outcome is not None:
                how, reason = outcome
                getattr(pytest, how)(reason)

    def close(self) -> list[str]:
        """Let every rank end by itself. Returns a complaint for each that did not end well."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send(None)
        ranks.join(self._ranks, AT_EXIT)
        return [
            f"rank {number} of the pool: {how_it_ended(code)} after the last test"
            for number, code in enumerate(self._end())
            if code
        ]

    def _run(self, task: Task) -> list[Ended]:
        self._grow_to(task.size)
        working = self._ranks[: task.size]
        rendezvous = str(self._path("rendezvous", time.monotonic_ns()))  # a new one for each test
        for rank in working:
            os.truncate(self._path("printed", rank.number), 0)
            with contextlib.suppress(OSError):  # of one that has just died: it will not be heard
                rank.pipe.send((rendezvous, task))
        try:
            return self._hear(working, task.timeout)
        finally:
            for rank in working:
                if printed := self._path("printed", rank.number).read_text(errors="replace"):
                    print(heading(f"rank {rank.number} printed") + printed, end="")

    def _grow_to(self, size: int) -> None:
        """Start the ranks that are missing. One that died between two tests is told of now."""
        for rank in self._ranks:
            if not rank.process.is_alive():
                how = how_it_ended(rank.process.exitcode or 0)
                text = f"rank {rank.number}: {how}, after the test before this one had passed"
                pytest.fail(text, pytrace=False)
        if not self._ranks:  # the folder is there as long as they are
            self._folder = tempfile.TemporaryDirectory(prefix="dist_lab-")
        new = [
            ranks.start(number, serve, self._folder.name, preload=self._preload)
            for number in range(len(self._ranks), size)
        ]
        self._ranks += new
        self._hear(new, AT_START)

    def _hear(self, working: Sequence[ranks.Rank], timeout: float) -> list[Ended]:
        """Wait for every rank's outcome; raise the failure of the test, if there is one."""
        ended, failures, running = gather(working, timeout)
        failures = [f if f.story else replace(f, story=self._stack(f.rank)) for f in failures]
        text, size = tell(failures, len(working)), len(working)
        why = "was still running" if failures else f"had not ended after {timeout:g} s"
        for rank in running:
            ranks.ask_for_stack(rank)
        if running:
            time.sleep(0.5)  # until they have written
        for rank in running:
            stack = self._stack(rank.number)
            stack = stack or "It does not even say where: it is stopped, or starting.\n"
            text += heading(f"rank {rank.number} of {size}: {why}") + stack
        if text:
            if ended:
                text += heading(f"{named(list(ended))} of {size}: no failure")
            pytest.fail(text, pytrace=False)
        return list(ended.values())

    def _stack(self, number: int) -> str:
        return self._path("stack", number).read_text()

    def _path(self, kind: str, number: int) -> Path:
        return Path(self._folder.name, f"{kind}-{number}")

    def _end(self) -> list[int]:
        codes = ranks.stop(self._ranks, grace=0.5)  # they have nothing to save
        if self._ranks:
            self._folder.cleanup()
        self._ranks = []
        return codes


# --- in a rank ------------------------------------------------------------------------------------


def serve(pipe: Connection, rank: int, folder: str) -> None:
    """Run one task after another, until told None."""
    from dist_lab.mesh import groups

    write_into(f"{folder}/printed-{rank}")
    stack = os.open(f"{folder}/stack-{rank}", os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, stack)
    faulthandler.enable(stack)
    kept = {number for number, _ in tcp_sockets()}
    settled: set[str] = set()
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        rendezvous, task = order
        hang_up(kept)
        word = run_one(task, rank, rendezvous, settled)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(word)
        if isinstance(word, Failure):
            ranks.end_process(1)  # so that peers which wait for this rank fail now
    groups.disconnect()


def hang_up(kept: set[int]) -> None:
    """End all TCP connections but those of these descriptors. See [Note: hanging up]."""
    for number, connection in tcp_sockets():
        listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if number not in kept and not listens:
            with contextlib.suppress(OSError):  # it is not connected any more
                connection.shutdown(socket.SHUT_RDWR)


def write_into(path: str) -> None:
    """Let everything that this process prints, in C++ too, go into a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    os.close(file)


def run_one(task: Task, rank: int, rendezvous: str, settled: set[str]) -> Failure | Ended:
    from dist_lab.mesh import mesh

    __tracebackhide__ = True
    try:
        renew(task, rank, rendezvous, settled)
        with warnings.catch_warnings():
            function = find(task)
            arguments = {name: loads(value) for name, value in task.values.items()}
            warnings.resetwarnings()
            warnings.filters = loads(task.filters)
            if task.axes is not None:
                arguments["mesh"] = mesh.init_mesh(**task.axes)
            function(**arguments)
    except pytest.skip.Exception as outcome:
        return "skip", str(outcome)
    except pytest.xfail.Exception as outcome:
        return "xfail", str(outcome)
    except BaseException as error:
        shown = pytest.ExceptionInfo.from_exception(error).getrepr(style="short")
        return replace(Failure.of(rank, error), story=f"{shown}\n")
    return None


def renew(task: Task, rank: int, rendezvous: str, settled: set[str]) -> None:
    """Undo what the last test may have left in this process, and join the ranks of this one.

    Args:
        settled: the modules that collections do not look through any more.
    """
    import torch

    from dist_lab.mesh import groups

    groups.disconnect()
    gc.collect()
    if new := sys.modules.keys() - settled:
        gc.freeze()  # they stay: the collection after the next test then takes 1 ms, not 100
        settled |= new
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    # Twice the test's time, so that the pool, which can say where each rank hangs, comes first.
    store = groups.file_store(rendezvous, task.size)
    groups.connect(store, rank, task.size, timeout=2 * task.timeout)


def find(task: Task) -> Callable[..., Any]:
    sys.path[:] = task.search
    found: Any = sys.modules.get(task.module)
    if found is None or found.__file__ != task.path:
        found = import_test(task.module, task.path)
    for name in task.name.split("."):
        found = getattr(found() if isinstance(found, type) else found, name)
    return found


def import_test(name: str, path: str) -> ModuleType:
    """Import a file as pytest does: its asserts show their values when they fail."""
    from _pytest.assertion.rewrite import rewrite_asserts  # pytest's own hook needs a session

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    module = importlib.util.module_from_spec(spec)
    source = Path(path).read_bytes()
    tree = ast.parse(source, path)
    rewrite_asserts(tree, source, path)
    sys.modules[name] = module
    exec(compile(tree, path, "exec", dont_inherit=True), module.__dict__)
    return module
