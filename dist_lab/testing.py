"""A pytest plugin: a test's body runs on several ranks at once, in a warm pool of processes.

    @pytest.mark.ranks(4)                                # the same body, on 4 processes
    def test_gradients_are_summed(mesh):
        assert all_reduce(torch.tensor(1.0), mesh["dp"]) == 4

    @pytest.mark.ranks(4, mesh={"dp": 2, "tp": 2}, timeout=20)

Every test has a process group of its own, so that a message never received, a group never closed or
a timeout never reset ends with its test. Fixtures are made in pytest's process and their values are
sent to the ranks: numbers, strings, paths, tensors, anything that can be pickled. What a fixture
does to its process (monkeypatch, the current folder) does not happen on the ranks; a body does such
things itself, with `pytest.MonkeyPatch.context()`. pytest.raises, approx, skip and xfail work.

A failed test shows the traceback of every rank, the cause first and peers that only lost their
connection last, and what each rank printed. A rank that hangs is named, with the stack where it
hung. The ranks are then ended and the next test gets fresh ones; nothing is ever retried.
"""

import contextlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pickle import dumps
from typing import Any

import pytest

from dist_lab import ranks
from dist_lab.failures import Failure, by_cause, how_it_ended, named, tell

AT_START = 120.0  # seconds for a rank to import torch and say that it is there
AT_EXIT = 10.0  # seconds for a rank to end after the last test


@dataclass(frozen=True)
class Wanted:
    """The arguments of `@pytest.mark.ranks`.

    Attributes:
        size: ranks that run the body.
        timeout: seconds until a test that has not ended counts as hung.
        mesh: the axes of the fixture `mesh`; default one axis dp over all ranks.
    """

    size: int
    timeout: float = 60.0
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"needs a number of ranks, not {self.size!r}")
        if math.prod(self.axes.values()) != self.size:
            raise ValueError(f"mesh {dict(self.axes)} does not hold {self.size} ranks")

    @property
    def axes(self) -> Mapping[str, int]:
        return self.mesh or {"dp": self.size}


@dataclass(frozen=True)
class Task:
    """One test, as it is sent to a rank."""

    number: int
    wanted: Wanted
    has_mesh: bool  # whether the body asks for the fixture
    module: str
    path: str
    name: str  # of the function in its module, `TestClass.test_name` of a method
    search: Sequence[str]  # sys.path
    values: bytes  # (fixtures and parameters by name, warning filters), pickled

    @property
    def size(self) -> int:
        return self.wanted.size


@dataclass(frozen=True)
class Done:
    """The word of a rank whose body ended, or was ended by pytest.skip or pytest.xfail."""

    skipped: str | None = None
    xfailed: str | None = None


# --- what pytest calls ----------------------------------------------------------------------------

POOL = pytest.StashKey["Pool"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "modules that the ranks of @pytest.mark.ranks import once, before they fork"
    parser.addini("ranks_preload", about, type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    about = "ranks(size, timeout=60, mesh=None): run the body on so many rank processes"
    config.addinivalue_line("markers", about)
    config.stash[POOL] = Pool([*ranks.PRELOAD, *config.getini("ranks_preload")])


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> "OnEachRank":
    """In the body of a test marked `ranks`, a fresh Mesh over them; see `Wanted.mesh`."""
    if request.node.get_closest_marker("ranks") is None:
        pytest.fail("the fixture `mesh` is for tests marked @pytest.mark.ranks(n)", pytrace=False)
    return OnEachRank()


class OnEachRank:
    """Stands for the mesh in pytest's own process, where there is none."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"mesh.{name}: the mesh is for the test's body, not for fixtures")

    def __getitem__(self, name: str) -> Any:
        raise AttributeError(f"mesh[{name!r}]: the mesh is for the test's body, not for fixtures")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    __tracebackhide__ = True
    try:
        wanted = Wanted(*marker.args, **marker.kwargs)
    except (TypeError, ValueError) as error:
        pytest.fail(f"@pytest.mark.ranks: {error}", pytrace=False)
    pool = pyfuncitem.config.stash[POOL]
    pool.run(task_of(pyfuncitem, wanted, number=pool.count()))
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    pool = session.config.stash[POOL]
    pool.close()
    if pool.complaints:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for complaint in config.stash[POOL].complaints:
        terminalreporter.write_line(complaint, red=True)


def task_of(item: pytest.Function, wanted: Wanted, number: int) -> Task:
    arguments = {name: item.funcargs[name] for name in item._fixtureinfo.argnames}
    has_mesh = isinstance(arguments.get("mesh"), OnEachRank)
    if has_mesh:
        del arguments["mesh"]
    for name, value in arguments.items():
        try:
            dumps(value)
        except Exception as error:
            pytest.fail(f"the fixture `{name}` cannot travel to the ranks: {error}", pytrace=False)
    classes = [] if item.cls is None else item.cls.__qualname__.split(".")
    return Task(
        number=number,
        wanted=wanted,
        has_mesh=has_mesh,
        module=item.module.__name__,
        path=item.module.__file__,
        name=".".join([*classes, item.originalname]),
        search=sys.path,
        values=dumps((arguments, warnings.filters)),
    )


# --- the pool, in pytest's process ----------------------------------------------------------------


class Pool:
    """Rank processes that wait for tests: as many as the largest test so far has asked for.

    A test of n ranks runs on the first n. After any failure all are ended, since who knows in which
    state they are, and the next test starts new ones.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self.complaints: list[str] = []
        self._preload = preload
        self._ranks: list[ranks.Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tests = 0

    def count(self) -> int:
        self._tests += 1
        return self._tests

    def run(self, task: Task) -> None:
        """Run a test on its ranks, print what they printed, and fail or skip as they did."""
        __tracebackhide__ = True
        try:
            working = self._take(task.size)
            for rank in working:
                os.truncate(self._log(rank.number), 0)
                rank.pipe.send(task)
            text, words = self._outcome(working, task.wanted.timeout)
            for rank in working:
                if printed := self._log(rank.number).read_text(errors="replace"):
                    print(f"---- rank {rank.number} printed ----\n{printed}", end="")
        except BaseException:  # Ctrl-C, or a timeout of another plugin's
            self._end()
            raise
        if text:
            self._end()
            pytest.fail(text, pytrace=False)
        for word in words:
            if word.xfailed is not None:
                pytest.xfail(word.xfailed)
            if word.skipped is not None:
                pytest.skip(word.skipped)

    def close(self) -> None:
        """Let every rank end by itself, and see that it did."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send(None)
        ranks.join(self._ranks, AT_EXIT)
        for number, code in enumerate(self._end()):
            if code:
                self.complaints.append(
                    f"rank {number} of the pool {how_it_ended(code)} after the last test"
                )

    def _outcome(self, working: Sequence[ranks.Rank], timeout: float) -> tuple[str, list[Done]]:
        """What went wrong, "" for nothing, and the words of the ranks whose body ended."""
        heard: dict[int, Failure | Done]
        heard, dead = ranks.gather(
            working, failed=lambda word: isinstance(word, Failure), timeout=timeout
        )
        silent = [rank for rank in working if rank.number not in heard | dead]
        failures = [word for word in heard.values() if isinstance(word, Failure)]
        failures += [Failure.died(rank, code, self._stacks(rank)) for rank, code in dead.items()]
        text = tell(by_cause(failures), len(working))
        if silent:
            why = "after another had failed" if failures else f"{timeout:g} seconds"
            text += f"---- {named([r.number for r in silent])} of {len(working)} hung {why} ----\n"
        for rank in silent:
            text += f"rank {rank.number} is here:\n{self._stack_of(rank)}"
        if text and (ended := [n for n, word in heard.items() if isinstance(word, Done)]):
            text += f"---- {named(ended)} of {len(working)} ended without a failure ----\n"
        return text, [word for word in heard.values() if isinstance(word, Done)]

    def _take(self, size: int) -> list[ranks.Rank]:
        if gone := [r for r in self._ranks if not r.process.is_alive()]:
            how = how_it_ended(gone[0].process.exitcode or 0)
            pytest.fail(f"rank {gone[0].number} {how} after the test before this", pytrace=False)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dist_lab-")
        for number in range(len(self._ranks), size):
            self._log(number).touch()
            rank = ranks.start(number, serve, self._folder.name, threads=1, preload=self._preload)
            self._ranks.append(rank)
            text, _ = self._outcome([rank], AT_START)
            if text:
                pytest.fail(text, pytrace=False)
        return self._ranks[:size]

    def _end(self) -> list[int]:
        codes = ranks.stop(self._ranks)
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return codes
