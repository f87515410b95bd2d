"""The pytest plugin: what runs on the ranks, how failures are reported, and what is left behind.

A test of a failure runs an inner pytest on a small test file, in this process, where the forkserver
is warm. A test of what is left behind runs the inner pytest as a program.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import all_gone, with_mark

from dist_lab.comm import ops
from dist_lab.processes import ranks

pytest_plugins = ["pytester"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HEAD = """
import ctypes, datetime, multiprocessing.util, os, signal, socket, threading, time
import warnings
import pytest, torch
import torch.distributed as dist
from dist_lab.comm import ops

def meet(mesh):
    return ops.all_reduce(torch.tensor(1.0), mesh["dp"])
"""
# Without pytest's own garbage collections, which take a second when torch is imported.
QUIET = ("-p", "dist_lab.testing", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-q")


@dataclass(frozen=True)
class Point:
    x: int


@pytest.fixture(autouse=True)
def _only_our_plugin_is_loaded(monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def inner(pytester):
    """Runs a test file in an inner pytest; returns its result, with all of stdout as `text`."""
    # Modules that the inner pytest imports are forgotten after it; the forkserver must not be.
    importlib.import_module("multiprocessing.popen_forkserver")

    def run(body, *arguments):
        pytester.makepyfile(HEAD + body)
        result = pytester.runpytest_inprocess(*QUIET, *arguments)
        result.text = result.stdout.str()
        return result

    return run


# --- what runs ------------------------------------------------------------------------------------


@pytest.mark.ranks(3)
def test_the_body_runs_on_all_ranks_at_once(mesh):
    assert ops.all_gather(torch.tensor([mesh.rank]), mesh["dp"]).tolist() == [0, 1, 2]


@pytest.mark.ranks(4, mesh={"dp": 2, "tp": 2})
def test_the_mesh_has_the_axes_of_the_marker(mesh):
    assert (mesh["dp"].size, mesh["tp"].ranks) == (2, (0, 1) if mesh.rank < 2 else (2, 3))


@pytest.fixture
def a_tensor():
    return torch.arange(3)


@pytest.mark.parametrize("point", [Point(3)])
@pytest.mark.ranks(2)
def test_each_rank_gets_its_own_copy_of_fixtures_and_parameters(mesh, tmp_path, a_tensor, point):
    assert point == Point(3)
    (tmp_path / str(mesh.rank)).touch()
    ops.all_reduce(torch.zeros(1), mesh["dp"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    a_tensor += 1 + mesh.rank
    ops.all_reduce(torch.zeros(1), mesh["dp"])
    assert a_tensor.tolist() == [1 + mesh.rank, 2 + mesh.rank, 3 + mesh.rank]


class TestClass:
    @pytest.mark.ranks(2)
    def test_methods_and_pytest_raises_warns_and_approx_work(self, mesh):
        with pytest.raises(KeyError, match="nobody"):
            {}["nobody"]
        with pytest.warns(UserWarning, match="look"):
            warnings.warn("look", UserWarning, stacklevel=1)
        assert torch.rand(1).item() == pytest.approx(0.4963, abs=1e-4), "ranks have different seeds"


def test_the_ranks_are_reused_and_a_smaller_test_runs_on_the_first_of_them(inner):
    result = inner(
        """
@pytest.mark.ranks(3)
def test_a(mesh): print("A", os.getpid())
@pytest.mark.ranks(2)
def test_b(mesh): print("B", os.getpid())
""",
        "-rP",
    )
    a, b = ([line[2:] for line in result.outlines if line.startswith(x)] for x in "AB")
    assert len(set(a)) == 3
    assert b == a[:2]


def test_a_test_does_not_change_the_next_one(inner):
    # The test leaves a message that is never received, groups that are never destroyed, and a
    # timeout of half a second. In a shared process group, the next test would receive the message.
    result = inner("""
THREADS = []

@pytest.mark.parametrize("i", range(4))
@pytest.mark.ranks(2)
def test_leaves_things_behind(mesh, i):
    THREADS.append(len(os.listdir("/proc/self/task")) if os.path.exists("/proc") else 0)
    assert max(THREADS) == min(THREADS), "threads pile up"
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == 1
    assert torch.is_grad_enabled()
    assert torch.rand(1).item() == pytest.approx(0.4963, abs=1e-4)
    assert mesh.timeout > 60
    received = torch.zeros(1)
    sent, peer = torch.full((1,), 10.0 * i), 1 - mesh.rank
    if mesh.rank == 0:
        dist.send(sent, peer)
        dist.isend(sent + 1, peer)
    else:
        dist.recv(received, peer)
        assert received == sent
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    dist.group.WORLD.set_timeout(datetime.timedelta(seconds=0.5))
    for _ in range(3):
        dist.new_group([0, 1])
""")
    result.assert_outcomes(passed=4)


def test_only_tcp_connections_that_a_test_leaves_open_are_closed(inner):
    result = inner("""
LEFT = []

@pytest.mark.parametrize("i", range(2))
@pytest.mark.ranks(2)
def test_leaves_sockets_open(mesh, i):
    if i == 0:
        server = socket.create_server(("127.0.0.1", 0))
        LEFT.extend([server, socket.create_connection(server.getsockname()), *socket.socketpair()])
    server, connected, local, remote = LEFT
    connected.setblocking(False)
    if i == 0:
        with pytest.raises(BlockingIOError): connected.recv(1)
    else:
        assert connected.recv(1) == b""
    remote.send(b"x")
    assert local.recv(1) == b"x"
    with socket.create_connection(server.getsockname(), timeout=5): pass
    assert meet(mesh) == 2
""")
    result.assert_outcomes(passed=2)


@pytest.mark.slow
def test_a_test_on_four_ranks_takes_at_most_0_3_seconds_after_the_first(pytester):
    pytester.makepyfile(
        HEAD
        + """
@pytest.mark.parametrize("i", range(6))
@pytest.mark.ranks(4)
def test_sum(mesh, i): assert meet(mesh) == 4
"""
    )
    reports = pytester.inline_run(*QUIET).getreports("pytest_runtest_logreport")
    seconds = [report.duration for report in reports if report.when == "call"]
    assert len(seconds) == 6
    assert min(seconds[1:]) <= 0.3  # the best of five, because the machine may be busy


def test_collecting_starts_no_rank_and_imports_no_torch(pytester, monkeypatch):
    pytester.makepyfile(
        """
import sys, pytest
@pytest.mark.ranks(2)
def test_a(mesh): pass
def test_b(): assert "torch" not in sys.modules
"""
    )
    result = pytester.runpytest_subprocess(*QUIET, "-k", "test_b", "-W", "error")
    result.assert_outcomes(passed=1, deselected=1)
    monkeypatch.setattr(ranks, "start", None)
    assert pytester.runpytest_inprocess(*QUIET, "--collect-only").ret == 0


# --- what a failure looks like --------------------------------------------------------------------


def test_the_rank_that_fails_is_reported_first_and_the_next_test_has_new_ranks(inner):
    result = inner(
        """
@pytest.mark.ranks(3)
def test_before(mesh): print("PID", os.getpid())

@pytest.mark.ranks(3)
def test_fails(mesh):
    print("hello from", mesh.rank)
    os.write(2, b"and from C++\\n")
    if mesh.rank == 1:
        time.sleep(0.05)
        values = [1, 2]
        assert sum(values) == mesh.size + 1
    meet(mesh)

@pytest.mark.ranks(3)
def test_after(mesh):
    assert meet(mesh) == 3
    print("PID", os.getpid())
""",
        "-rP",
    )
    result.assert_outcomes(passed=2, failed=1)
    report = result.text[result.text.index("---- rank 1 of 3") :]
    assert report.startswith("---- rank 1 of 3: AssertionError: assert 3 == (3 + 1) ----\n")
    assert "where 3 = sum([1, 2])" in report, "the assert does not show its values"
    for rank in (0, 2):
        assert f"---- rank {rank} of 3: CollectiveError: rank {rank}/3 " in report
        assert "Connection closed by peer" in report
    for rank in (0, 1, 2):
        assert f"---- rank {rank} printed ----\nhello from {rank}\nand from C++\n" in report
    assert len({line for line in result.outlines if line.startswith("PID")}) == 6


def test_a_failure_of_all_ranks_is_reported_once_and_pytests_warning_filters_apply(inner):
    result = inner(
        "@pytest.mark.ranks(3)\n"
        "def test_warns(mesh): warnings.warn('old name', DeprecationWarning)\n",
        "-W",
        "error::DeprecationWarning",
    )
    result.assert_outcomes(failed=1)
    # We count whole lines, because pytest's summary may quote the line too, as under CI.
    assert result.outlines.count("---- ranks 0, 1, 2 of 3: DeprecationWarning: old name ----") == 1


@pytest.mark.slow_unless(lambda line: line == "killed by SIGSEGV")
@pytest.mark.parametrize(
    ("death", "line", "stack"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL", ""),
        ("os._exit(3)", "exited with status 3", ""),
        ("ctypes.string_at(0)", "killed by SIGSEGV", "in test_dies\n"),
        ("raise SystemExit(0)", "SystemExit: 0", "in test_dies\n"),
    ],
)
def test_a_rank_that_dies_is_named_with_the_cause(death, line, stack, inner):
    result = inner(f"""
@pytest.mark.ranks(2)
def test_dies(mesh):
    if mesh.rank == 1:
        {death}
    meet(mesh)
""")
    result.assert_outcomes(failed=1)
    first = result.text[result.text.index("---- rank 1 of 2: ") :].partition("---- rank 0")[0]
    assert line in first
    assert stack in first


def test_a_hang_is_ended_after_the_timeout_with_the_stack_of_every_hanging_rank(inner):
    began = time.monotonic()
    result = inner("""
def forgotten(): time.sleep(600)
def stopped(): os.kill(os.getpid(), signal.SIGSTOP)

@pytest.mark.ranks(4, timeout=1)
def test_hangs(mesh):
    if mesh.rank == 0: return
    if mesh.rank == 1: forgotten()
    if mesh.rank == 2: stopped()
    meet(mesh)
""")
    assert time.monotonic() - began < 40
    result.assert_outcomes(failed=1)
    parts = result.text.split("---- rank ")
    assert [part.splitlines()[0] for part in parts[1:5]] == [
        "1 of 4: had not ended after 1 s ----",
        "2 of 4: had not ended after 1 s ----",
        "3 of 4: had not ended after 1 s ----",
        "0 of 4: no failure ----",
    ]
    assert "in forgotten\n" in parts[1]
    assert "It prints no stack: it is stopped" in parts[2]
    assert "in meet\n" in parts[3]


@pytest.mark.slow
def test_after_a_failure_the_other_ranks_have_two_seconds_to_end(inner):
    began = time.monotonic()
    result = inner("""
@pytest.mark.ranks(2)
def test_fails(mesh):
    if mesh.rank == 0: raise KeyError("here")
    time.sleep(600)
""")
    assert time.monotonic() - began < 40
    result.assert_outcomes(failed=1)
    assert "---- rank 0 of 2: KeyError: 'here' ----" in result.text
    assert "---- rank 1 of 2: was still running ----" in result.text
    assert "in test_fails" in result.text.partition("was still running")[2]


def test_skip_and_xfail_work_on_ranks(inner):
    result = inner(
        """
@pytest.mark.ranks(2)
def test_skips(mesh): pytest.skip("no GPU here")

@pytest.mark.ranks(2)
def test_expects(mesh): pytest.xfail("a known bug")

@pytest.mark.xfail(strict=True)
@pytest.mark.ranks(2)
def test_marked(mesh): assert mesh.size == 1
""",
        "-rs",
    )
    result.assert_outcomes(skipped=1, xfailed=2)
    assert "no GPU here" in result.text


def test_misuse_is_reported_in_one_line(inner):
    result = inner("""
def test_a(mesh): pass
@pytest.mark.ranks(2)
def test_b(request): pass
@pytest.mark.ranks(2)
def test_g(monkeypatch): pass
@pytest.mark.ranks("two")
def test_c(mesh): pass
@pytest.mark.ranks(4, mesh={"dp": 3})
def test_d(mesh): pass
@pytest.mark.ranks(4, timout=3)
def test_e(mesh): pass
@pytest.fixture
def size(mesh): return mesh.size
@pytest.mark.ranks(2)
def test_f(size): pass
""")
    result.assert_outcomes(failed=5, errors=2)
    for line in (
        "on a rank, use pytest.MonkeyPatch.context() in the body of the test",
        "the fixture `mesh` is for tests marked @pytest.mark.ranks(n)",
        "the fixture `request` cannot be pickled: ",
        "@pytest.mark.ranks: 'two' is not a number of ranks",
        "@pytest.mark.ranks: mesh {'dp': 3} is not for 4 ranks",
        "unexpected keyword argument 'timout'",
        "'OnEachRank' object has no attribute 'size'",
    ):
        assert line in result.text


def test_a_rank_that_dies_between_two_tests_is_reported(inner):
    result = inner("""
@pytest.mark.ranks(2)
def test_before(mesh):
    if mesh.rank == 1: threading.Timer(0.05, os._exit, [4]).start()
def test_between(): time.sleep(0.3)
@pytest.mark.ranks(2)
def test_next(mesh): pass
""")
    result.assert_outcomes(passed=2, failed=1)
    line = "rank 1: exited with status 4, after the body before this one had ended"
    assert line in result.text


def test_a_nonzero_exit_code_of_a_rank_fails_the_session(inner):
    result = inner("""
@pytest.mark.ranks(2)
def test_a(mesh):
    if mesh.rank == 1: multiprocessing.util.Finalize(None, os._exit, [5], exitpriority=1)
""")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "rank 1 of the pool: exited with status 5 after the last body" in result.outlines


# --- what is left behind --------------------------------------------------------------------------


@pytest.fixture
def program(pytester):
    """Starts a pytest process on a test file; its temporary files are in `folder`."""
    folder = Path(tempfile.mkdtemp())  # a short path: that of a socket has at most 108 characters
    mark = f"TMPDIR={folder}"
    started = []

    def start(body):
        pytester.makepyfile(test_it=body)
        command = [sys.executable, "-m", "pytest", *QUIET, f"--basetemp={pytester.path}/base"]
        running = subprocess.Popen(
            [*command, "test_it.py"], cwd=pytester.path, env=os.environ | {"TMPDIR": str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            # A shell ignores Ctrl-C in what it runs in the background, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(running)
        deadline = time.monotonic() + 60
        while len(list(pytester.path.glob("base/there-*"))) < 2:
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.02)
        return running

    yield start, folder, mark
    for running in started:
        running.kill()
        running.communicate()
    shutil.rmtree(folder)


HANGS = """
import time, pytest

@pytest.mark.ranks(2)
def test_passes(mesh): assert mesh.size == 2

@pytest.mark.ranks(2)
def test_hangs(mesh, tmp_path):
    (tmp_path.parent / f"there-{mesh.rank}").touch()
    time.sleep(600)
"""


@pytest.mark.slow
@linux
def test_ctrl_c_leaves_no_process_and_no_file(program):
    start, folder, mark = program
    running = start(HANGS)
    os.killpg(running.pid, signal.SIGINT)  # like a terminal, which signals the ranks as well
    text, _ = running.communicate(timeout=30)
    assert running.returncode == pytest.ExitCode.INTERRUPTED
    assert "1 passed" in text
    assert all_gone(mark)
    # torch._dynamo, which every optimizer imports, makes a folder for its own cache.
    assert not [path for path in folder.iterdir() if "torchinductor" not in path.name]


@pytest.mark.slow
@linux
def test_ranks_die_with_a_pytest_that_is_killed(program):
    start, _, mark = program
    running = start(HANGS)
    assert len(with_mark(mark)) >= 4
    running.kill()
    assert all_gone(mark)
