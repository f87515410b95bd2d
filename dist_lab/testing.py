"""A pytest plugin that runs the body of a test on several ranks at once.

    @pytest.mark.ranks(4)
    def test_gradients_are_summed(mesh):
        assert all_reduce(torch.tensor(1.0), mesh["dp"]) == 4

    @pytest.mark.ranks(4, mesh={"dp": 2, "tp": 2}, timeout=20)
    def test_...

The ranks are processes of a warm pool: after the first test, a test on 4 ranks costs 0.05 s. Each
test has its own process group, and TCP connections that it leaves open are closed after it.

Fixtures and parameters are evaluated in pytest's process, pickled, and sent to the ranks. So a
fixture that changes its process (monkeypatch, the current folder) does not change the ranks. The
body of the test does that itself, with `pytest.MonkeyPatch.context()`. Asserts show their values;
pytest.raises, approx, skip and xfail work.

A failed test shows what each rank printed and the traceback of every rank. The cause comes first,
ranks that only lost their connection come last. A rank that hangs is named, with its stack. Then
the ranks are ended, and the next test starts fresh ones. Nothing is ever retried.

The pytest setting `ranks_preload` names modules that the tests import and that take long to import.
They are imported once, before the ranks fork.
"""

import ast
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import dumps, loads
from types import ModuleType
from typing import Any

import pytest

from dist_lab.processes.failures import Failure
from dist_lab.processes.pool import Pool, RanksFailed
from dist_lab.processes.ranks import PRELOAD

POOL = pytest.StashKey[Pool]()
COMPLAINTS = pytest.StashKey[list[str]]()


class OnEachRank:
    """Stands for the fixture `mesh` in pytest's own process, which is no rank and has no mesh."""


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> OnEachRank:
    """A fresh Mesh over all ranks, in the body of a test that is marked `ranks`."""
    if request.node.get_closest_marker("ranks") is None:
        pytest.fail("the fixture `mesh` is for tests marked @pytest.mark.ranks(n)", pytrace=False)
    return OnEachRank()


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "modules that the ranks of @pytest.mark.ranks import once, before they fork"
    parser.addini("ranks_preload", about, type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    about = "ranks(size, timeout=60, mesh=None): run the body on that many processes at once"
    config.addinivalue_line("markers", about)
    config.stash[POOL] = Pool([*PRELOAD, *config.getini("ranks_preload")])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    try:
        size, timeout, axes = ranks(*marker.args, **marker.kwargs)
    except (TypeError, ValueError) as error:
        pytest.fail(f"@pytest.mark.ranks: {error}", pytrace=False)
    run(pyfuncitem.config.stash[POOL], size, sent_test(pyfuncitem, axes), timeout)
    return True


def ranks(
    size: Any = None, timeout: float = 60.0, mesh: Mapping[str, int] | None = None
) -> tuple[int, float, Mapping[str, int]]:
    """Check the arguments of `@pytest.mark.ranks`.

    Args:
        size: number of ranks that run the body.
        timeout: seconds after which the test counts as hung.
        mesh: axis -> size, for the fixture `mesh`; default: one axis, dp, over all ranks.

    Raises:
        ValueError: size is no positive int, or the mesh is not for that many ranks.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{size!r} is not a number of ranks; write for instance ranks(4)")
    axes = mesh or {"dp": size}
    if math.prod(axes.values()) != size:
        raise ValueError(f"mesh {dict(axes)} is not for {size} ranks")
    return size, timeout, axes


def run(pool: Pool, size: int, test: "SentTest", timeout: float) -> None:
    """Run a test on the ranks of a pool, and fail or skip as they did."""
    try:
        outcomes = pool.run(size, run_test, test, timeout=timeout)
    except RanksFailed as failed:
        raise pytest.fail.Exception(str(failed), pytrace=False) from None
    for outcome in outcomes:
        if outcome is not None:
            skip_or_xfail, reason = outcome
            getattr(pytest, skip_or_xfail)(reason)


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[COMPLAINTS] = session.config.stash[POOL].close()
    if session.config.stash[COMPLAINTS]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for complaint in config.stash.get(COMPLAINTS, []):
        terminalreporter.write_line(complaint, red=True)


@dataclass(frozen=True)
class SentTest:
    """One test as it is sent to a rank.

    Attributes:
        axes: the axes of the mesh that the body gets; None if it takes no mesh.
        module, path: the name and the path of the test's file.
        name: the function in that file, `TestClass.test_name` for a method.
        search: sys.path.
        values: the other arguments of the body, each pickled.
        filters: warnings.filters, pickled.
    """

    axes: Mapping[str, Any] | None
    module: str
    path: str
    name: str
    search: Sequence[str]
    values: Mapping[str, bytes]
    filters: bytes


def sent_test(item: pytest.Function, axes: Mapping[str, int]) -> SentTest:
    """Return all that a rank needs to run the body of this test."""
    wants_mesh, values = False, {}
    for name in inspect.signature(item.obj).parameters:
        value = item.funcargs[name]
        if isinstance(value, OnEachRank):
            wants_mesh = True
            continue
        if isinstance(value, pytest.MonkeyPatch):
            # A copy of it would patch the rank, and nothing would undo the patch after the test.
            pytest.fail(
                "the fixture `monkeypatch` changes pytest's own process; on a rank, use "
                "pytest.MonkeyPatch.context() in the body of the test", pytrace=False,
            )  # fmt: skip
        try:
            values[name] = dumps(value)
        except Exception as error:
            pytest.fail(f"the fixture `{name}` cannot be pickled: {error}", pytrace=False)
    class_names = [] if item.cls is None else [item.cls.__qualname__]
    return SentTest(
        axes=axes if wants_mesh else None,
        module=item.module.__name__,
        path=item.module.__file__,
        name=".".join([*class_names, item.originalname]),
        search=sys.path,
        values=values,
        filters=dumps(warnings.filters),
    )


# --- in a rank ------------------------------------------------------------------------------------

Outcome = tuple[str, str] | None  # ("skip" or "xfail", the reason); None if the body passed


def run_test(rank: int, test: SentTest) -> Failure | Outcome:
    from dist_lab.mesh import mesh

    __tracebackhide__ = True
    try:
        with warnings.catch_warnings():
            function = load_function(test)
            arguments = {name: loads(value) for name, value in test.values.items()}
            warnings.resetwarnings()
            warnings.filters = loads(test.filters)
            if test.axes is not None:
                arguments["mesh"] = mesh.init_mesh(**test.axes)
            function(**arguments)
    except pytest.skip.Exception as outcome:
        return "skip", str(outcome)
    except pytest.xfail.Exception as outcome:
        return "xfail", str(outcome)
    except BaseException as error:
        traceback = pytest.ExceptionInfo.from_exception(error).getrepr(style="short")
        return replace(Failure.of(rank, error), details=f"{traceback}\n")
    return None


def load_function(test: SentTest) -> Callable[..., Any]:
    """Import the test's file if needed, and return the function, or the method of a new object."""
    sys.path[:] = test.search
    owner: Any = sys.modules.get(test.module)
    if owner is None or owner.__file__ != test.path:
        owner = import_test(test.module, test.path)
    for name in test.name.split("."):
        owner = getattr(owner() if isinstance(owner, type) else owner, name)
    return owner


def import_test(name: str, path: str) -> ModuleType:
    """Import a file as pytest does, so that a failing assert shows its values."""
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
