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
import stat
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
from typing import Any, Literal

import pytest

from dist_lab.processes import ranks
from dist_lab.processes.failures import Failure, by_cause, heading, how_it_ended, named, tell

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
    axes: Mapping[str, int] | None
    module: str
    path: str
    name: str
    search: Sequence[str]
    values: Mapping[str, bytes]
    filters: bytes


@dataclass(frozen=True)
class Ended:
    """The word of a rank on which nothing failed: its body returned, or called skip or xfail."""

    how: Literal["passed", "skipped", "xfailed"] = "passed"
    reason: str = ""


class Pool:
    """As many ranks as the largest test so far has asked for; a test of n runs on the first n.

    After a failure all are ended, since nobody knows what state they are in, and the next test
    starts new ones.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = preload
        self._ranks: list[ranks.Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tests = 0

    def run(self, task: Task) -> None:
        """Run a test, print what its ranks printed, and fail or skip as they did."""
        try:
            words = self._run(task)
        except BaseException:  # a failed test, Ctrl-C, the time limit of another plugin
            self._end()
            raise
        for word in words:
            if word.how == "skipped":
                pytest.skip(word.reason)
            if word.how == "xfailed":
                pytest.xfail(word.reason)

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
        self._tests += 1
        working = self._ranks[: task.size]
        for rank in working:
            os.truncate(self._path("printed", rank.number), 0)
            with contextlib.suppress(OSError):  # of one that has just died: it will not be heard
                rank.pipe.send((str(self._path("rendezvous", self._tests)), task))
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
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dist_lab-")
        new = [
            ranks.start(n, serve, self._folder.name, threads=1, preload=self._preload)
            for n in range(len(self._ranks), size)
        ]
        self._ranks += new
        self._hear(new, AT_START)

    def _hear(self, working: Sequence[ranks.Rank], timeout: float) -> list[Ended]:
        """The word of every rank, or the failure of the test."""
        heard: dict[int, Failure | Ended]
        heard, dead = ranks.gather(
            working, failed=lambda word: isinstance(word, Failure), timeout=timeout
        )
        ended = {n: word for n, word in heard.items() if isinstance(word, Ended)}
        failures = [word for word in heard.values() if isinstance(word, Failure)]
        for number, code in dead.items():
            failures.append(Failure.died(number, code, self._path("stack", number).read_text()))
        text, size = tell(by_cause(failures), len(working)), len(working)
        why = "was still running" if failures else f"had not ended after {timeout:g} s"
        for rank in working:
            if rank.number not in heard | dead:
                text += heading(f"rank {rank.number} of {size}: {why}") + self._stack_of(rank)
        if text:
            if ended:
                text += heading(f"{named(list(ended))} of {size}: no failure")
            pytest.fail(text, pytrace=False)
        return list(ended.values())

    def _stack_of(self, rank: ranks.Rank) -> str:
        """Where a rank is that does not answer. Its handler of SIGUSR1 does not need the GIL."""
        assert rank.process.pid is not None
        os.kill(rank.process.pid, signal.SIGUSR1)
        stack, before, deadline = "", None, time.monotonic() + 0.5
        while stack != before or not stack:  # until it has written, and writes no more
            if time.monotonic() > deadline:
                return stack or "It does not even say where: it is stopped, or starting.\n"
            time.sleep(0.05)
            stack, before = self._path("stack", rank.number).read_text(), stack
        return stack

    def _path(self, kind: str, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name, f"{kind}-{number}")

    def _end(self) -> list[int]:
        codes = ranks.stop(self._ranks, grace=0.5)  # they have nothing to save
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return codes


# --- in a rank ------------------------------------------------------------------------------------


def serve(pipe: Connection, rank: int, folder: str) -> None:
    """Run one task after another, until told None."""
    from dist_lab.mesh import groups

    write_into(f"{folder}/printed-{rank}")
    stack = os.open(f"{folder}/stack-{rank}", os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, stack)
    faulthandler.enable(stack)
    kept = open_sockets()
    settled: set[str] = set()
    pipe.send(Ended())
    while (order := pipe.recv()) is not None:
        rendezvous, task = order
        hang_up(open_sockets() - kept)
        word = run_one(task, rank, rendezvous, settled)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(word)
        if isinstance(word, Failure):
            ranks.end_process(1)  # so that peers which wait for this rank fail now
    groups.disconnect()


def open_sockets() -> set[int]:
    """The file descriptors of this process that are sockets."""
    found = set()
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found


def hang_up(numbers: set[int]) -> None:
    """End every connection to another process by TCP among them. See [Note: hanging up]."""
    for number in numbers:
        # A duplicate: closing it leaves the descriptor to its owner. One that only listens, or is
        # not connected any more, cannot be shut down.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as found:
            tcp = found.family in (socket.AF_INET, socket.AF_INET6)
            if tcp and not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.shutdown(socket.SHUT_RDWR)


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
                axes: dict[str, Any] = dict(task.axes)
                arguments["mesh"] = mesh.init_mesh(**axes)
            function(**arguments)
    except pytest.skip.Exception as outcome:
        return Ended("skipped", str(outcome))
    except pytest.xfail.Exception as outcome:
        return Ended("xfailed", str(outcome))
    except BaseException as error:
        shown = pytest.ExceptionInfo.from_exception(error).getrepr(style="short")
        return replace(Failure.of(rank, error), story=f"{shown}\n")
    return Ended()


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
    try:
        exec(compile(tree, path, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
