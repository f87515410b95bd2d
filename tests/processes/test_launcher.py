"""The launcher: three ways to start a program, and every way in which it can end.

The program is tests/helpers/toy.py: `toy.py nproc=3 do=fail` calls fail(config, mesh, last) on each
rank.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import toy
from processes import all_gone, children, listening, with_mark

from dist_lab.processes import failures, launcher
from dist_lab.processes.ranks import cores

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def launch(*settings: str) -> int:
    """Run it in this process, where the forkserver is warm."""
    return launcher.main("toy.py", toy.parse, "toy:body", settings)


def start(*settings: object, by: Sequence[str] = (), **environment: str) -> "subprocess.Popen[str]":
    """Run it as a separate program."""
    command = [sys.executable, *by, toy.__file__, *settings]
    return subprocess.Popen(
        [str(word) for word in command], env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def ready(folder: Path, ranks: int) -> list[int]:
    """Waits until all ranks are in `wait`, and returns their process ids."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.ready"))) < ranks:
        assert time.monotonic() < deadline, f"{ranks} ranks did not start"
        time.sleep(0.02)
    return [int(path.read_text()) for path in folder.glob("*.ready")]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- exit statuses and reports --------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [1, 3])
def test_a_body_that_returns_is_silent_and_leaves_no_process_and_no_file(nproc, capsys, tmp_path):
    launch("nproc=1")  # starts the forkserver, whose socket stays
    before = set(multiprocessing.active_children())  # the ranks of other tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        assert launch(f"nproc={nproc}") == 0
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.glob("dist_lab-*"))
    assert set(multiprocessing.active_children()) == before


def test_only_ranks_import_the_module_of_the_body(tmp_path, monkeypatch):
    (tmp_path / "of_ranks.py").write_text("from toy import body\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert launcher.main("toy.py", toy.parse, "of_ranks:body", ["nproc=2"]) == 0
    assert "of_ranks" not in sys.modules


def test_the_exit_status_is_the_largest_of_all_ranks():
    assert launch("nproc=3", "do=status") == 7


def test_each_rank_has_the_threads_of_the_setting_or_its_share_of_the_cores():
    assert launch("nproc=2", "do=threads", "threads=3") == 3
    assert launch("nproc=2", "do=threads") == max(1, cores() // 2)


@pytest.mark.parametrize(
    ("settings", "line", "status"),
    [
        (["zap=1"], "no setting zap", 2),
        (["nproc=5"], "batch 8 does not divide by 5 ranks; give --batch 10", 2),
        (["nproc=3", "do=refuse"], "tp=3 does not divide 4 heads; give tp=2", 2),
        (["do=refuse"], "tp=3 does not divide 4 heads; give tp=2", 2),
        (["nproc=3", "do=refuse on last"], "no space left in /scratch", 1),
    ],
)
def test_a_refusal_is_one_line_and_nothing_else(settings, line, status, capsys):
    assert launch(*settings) == status
    assert capsys.readouterr() == ("", f"toy.py: error: {line}\n")


def test_debug_shows_the_traceback_of_a_refusal(capsys):
    assert launch("nproc=2", "do=refuse", "debug=1") == 2
    output = capsys.readouterr().err
    assert "in refuse\n" in output
    assert output.endswith("\ntoy.py: error: tp=3 does not divide 4 heads; give tp=2\n")


def test_the_failed_rank_is_reported_and_ranks_that_lost_it_are_one_line(capsys):
    began = time.monotonic()
    assert launch("nproc=3", "do=fail on last") == 1
    output = capsys.readouterr().err
    assert output.startswith("---- rank 2 of 3: KeyError: 'only here' ----\nTraceback")
    assert "in fail_on_last\n" in output
    assert output.endswith("---- ranks 0, 1 of 3: timed out, or lost the connection ----\n")
    assert "Connection" not in output
    assert time.monotonic() - began < 30


def test_a_failure_of_all_ranks_is_reported_once(capsys):
    assert launch("nproc=3", "do=fail") == 1
    output = capsys.readouterr().err
    assert output.startswith("---- ranks 0, 1, 2 of 3: KeyError: 'the same everywhere' ----\n")
    assert output.count("Traceback") == 1


@pytest.mark.parametrize(
    ("do", "how"),
    [
        ("kill last", "killed by SIGKILL, which the kernel sends when memory runs out"),
        ("leave on last", "exited with status 0"),
    ],
)
def test_a_rank_that_dies_without_an_exception_is_named(do, how, capsys):
    assert launch("nproc=3", f"do={do}") == 1
    assert capsys.readouterr().err.startswith(f"---- rank 2 of 3: {how} ----\n")


def test_a_hung_rank_is_named_with_its_stack_and_all_end_soon_after_the_timeout(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(failures, "GRACE", 0.5)
    began = time.monotonic()
    assert launch("nproc=3", "do=hang on last", "timeout=1", f"folder={tmp_path}") == 1
    assert time.monotonic() - began < 30
    output = capsys.readouterr().err
    first = r"---- rank (\d) of 3: CollectiveError: rank \1/3 .*: all_reduce #2 on dp\{0-2\} .*"
    assert re.match(first + "rank 2 did not arrive: in no collective; last finished", output)
    assert re.search(r"  rank 2 \[dp=2\] .*; now at toy.py:\d+ in hang_on_last\n", output)
    assert output.count("what every rank was doing") == 1, "the same is said several times"
    assert "Traceback" not in output, "45 lines before the table that matters"
    assert "; find out where the late rank is" in output.splitlines()[0]
    assert output.splitlines()[0].endswith("(--debug shows the traceback) ----")
    assert output.endswith("---- rank 2: still running ----\n")
    assert "in hang_on_last\n" in (tmp_path / "stderr").read_text()


# Goal R10. What the message says of rank 2, and the line that it is at.
HANGS = {
    "stop last": (r"is stopped \(SIGSTOP\); in no collective", ""),
    "hold the gil on last": ("in no collective", r"; now at toy.py:\d+ in hold_the_gil_on_last"),
    "receive on last": (
        r"in recv\(float32\[4\], peer 0\) #2 on dp\{0>2\}",
        r"; now at toy.py:\d+ in receive_on_last",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("do", HANGS)
@linux
def test_a_rank_that_hangs_in_any_way_is_named_and_all_end(do, capsys):
    # The rank that receives times out too, and may be the first to report.
    launch("nproc=1")
    began = time.monotonic()
    assert launch("nproc=3", f"do={do}", "timeout=1") == 1
    assert time.monotonic() - began < 1 + 5 + 10  # to start them, on a busy machine
    output = capsys.readouterr().err
    state, line = HANGS[do]
    assert re.search(rf"\n  rank 2 \[dp=2\] step 0, start: .*{state}.*({line})?\n", output), output
    assert output.count("what every rank was doing") == 1
    if do != "receive on last":
        assert re.search(rf"rank 2 did not arrive: {state}", output)
        assert re.search(rf"{state}.*{line}\n", output)


@pytest.mark.slow
@linux
def test_a_rank_that_hangs_while_others_wait_in_a_library_is_named_with_its_line(capsys):
    assert launch("nproc=3", "do=hang in a library", "timeout=1") == 1
    output = capsys.readouterr().err
    first = (
        r"---- rank (\d) of 3: CollectiveError: rank \1/3 \[dp=\1\] step 0 phase=start: a collec"
    )
    assert re.match(first, output)
    assert re.search(r"  rank 2 \[dp=2\] .*; now at toy.py:\d+ in hang_in_a_library\n", output)
    assert output.count("what every rank was doing") == 1


@linux
def test_of_a_killed_rank_the_report_has_the_last_call_and_what_the_others_did(capsys):
    assert launch("nproc=3", "do=kill last") == 1
    output = capsys.readouterr().err
    assert output.startswith("---- rank 2 of 3: killed by SIGKILL")
    assert "---- ranks 0, 1 of 3: timed out, or lost the connection ----\n" in output
    assert output.count("what every rank was doing:\n  rank 2 [dp=2] step 0, start: its pro") == 1
    assert re.search(r"  > all_reduce.* at toy.py:\d+ +\| -\n", output)
    assert "Traceback" not in output


@pytest.mark.slow
@linux
def test_under_torchrun_one_rank_reports_what_all_did_when_one_is_killed():
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    program = start("do=kill last", by=by)
    _, output = program.communicate(timeout=60)
    assert program.returncode == 1
    # torchrun ends the others at once: now and then before one has reported.
    assert output.count("what every rank was doing") <= 1
    if "what every rank" in output:
        assert "  rank 2 [dp=2] step 0, start: its process has ended; in no collective" in output


@pytest.mark.slow
def test_a_rank_that_does_not_exit_is_killed_and_reported(capsys, monkeypatch):
    monkeypatch.setattr(launcher, "AT_EXIT", 0.5)
    assert launch("nproc=2", "do=keep a thread") == 1
    output = capsys.readouterr().err
    assert output == "---- rank 1: still running ----\n---- rank 1 of 2: killed by SIGTERM ----\n"


@pytest.mark.parametrize("nproc", ["nproc=2", ""])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_ranks_with_its_own_status(number, status, nproc, capsys, tmp_path):
    def interrupt() -> None:
        ready(tmp_path, 2 if nproc else 1)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    assert launch("do=wait", f"folder={tmp_path}", *[nproc][: len(nproc)]) == status
    assert time.monotonic() - began < 30
    assert capsys.readouterr() == ("", "")
    assert not any(is_alive(pid) for pid in ready(tmp_path, 1) if nproc)


def test_after_ctrl_c_at_a_terminal_the_prompt_starts_on_a_new_line(capsys, monkeypatch, tmp_path):
    def interrupt() -> None:
        ready(tmp_path, 1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    threading.Thread(target=interrupt, daemon=True).start()
    assert launch("do=wait", f"folder={tmp_path}") == 130
    assert capsys.readouterr() == ("", "toy.py: importing torch ...\n\n")


def test_at_a_terminal_a_line_says_at_once_what_the_program_waits_for(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert launch("nproc=2") == 0
    assert capsys.readouterr().err == "toy.py: starting 2 ranks, which import torch ...\n"


def test_a_second_ctrl_c_does_not_wait_for_stubborn_ranks(tmp_path):
    times = []

    def interrupt() -> None:
        ready(tmp_path, 2)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            times.append(time.monotonic())
            time.sleep(0.3)

    threading.Thread(target=interrupt, daemon=True).start()
    assert launch("nproc=2", "do=wait stubbornly", f"folder={tmp_path}") == 130
    assert time.monotonic() - times[1] < 1.9, "it waited for the grace of 2 s"
    assert not any(is_alive(pid) for pid in ready(tmp_path, 2))


# --- a separate program ---------------------------------------------------------------------------


@pytest.mark.slow
@linux
def test_ranks_listen_only_on_loopback_and_die_when_the_launcher_is_killed():
    # A killed launcher leaves its temporary files, so we give it a folder. Not tmp_path: the
    # forkserver's socket goes there too, and its path can have 108 characters at most.
    with tempfile.TemporaryDirectory() as name:
        check_sockets_and_orphans(Path(name), f"TMPDIR={name}")


def check_sockets_and_orphans(folder: Path, mark: str) -> None:
    program = start("nproc=3", "do=wait", f"folder={folder}", TMPDIR=str(folder))
    pids = ready(folder, 3)
    # One rank is stopped, so none of its threads can notice. The launcher is killed without notice.
    os.kill(pids[0], signal.SIGSTOP)
    addresses = [address for pid in with_mark(mark) for address in listening(pid)]
    program.kill()
    assert all_gone(mark)
    program.communicate()
    assert len(addresses) >= 3, "gloo's own sockets were not found"
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_every_rank_and_ends_all_with_one_line(tmp_path):
    program = start("nproc=2", "do=wait", f"folder={tmp_path}")
    pids = ready(tmp_path, 2)
    for pid in [*pids, program.pid]:  # a terminal sends it to all, in any order
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
    line = "toy.py: stopped by SIGINT, it has logged no step and saved no checkpoint\n"
    assert program.communicate(timeout=5) == ("", line)
    assert not [*tmp_path.glob("out-*")], "a run that has written nothing leaves no folder"
    assert program.returncode == 130
    assert not any(is_alive(pid) for pid in pids)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("after", [0.3, 0.6, 1.0])
def test_ctrl_c_while_the_forkserver_imports_torch_is_one_line(tmp_path, after):
    program = start("nproc=2", "do=wait", f"folder={tmp_path}")
    deadline = time.monotonic() + 10
    while len(found := children(program.pid)) < 2:  # and the resource tracker
        assert time.monotonic() < deadline
    time.sleep(after)
    os.killpg(program.pid, signal.SIGINT)
    line = "toy.py: stopped by SIGINT, it has logged no step and saved no checkpoint\n"
    assert program.communicate(timeout=10) == ("", line)
    assert program.returncode == 130
    while any(is_alive(pid) for pid in found):  # it ends when it has imported torch
        assert time.monotonic() < deadline + 10


@pytest.mark.slow
def test_torchrun_can_start_the_program():
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = start("do=fine", by=by)
    _, output = program.communicate(timeout=60)
    assert program.returncode == 0, output


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_reported_once_and_every_rank_ends():
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    program = start("zap=1", by=by)
    _, output = program.communicate(timeout=60)
    assert program.returncode == 1
    assert output.count("toy.py: error: no setting zap\n") == 1
    assert "exitcode  : 2 " in output


PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.slow
def test_under_torchrun_a_rank_other_than_0_reports_its_refusal_after_a_moment():
    began = time.monotonic()
    program = start("zap=1", **PLACE)
    _, output = program.communicate(timeout=20)
    assert (program.returncode, output) == (2, "toy.py: error: no setting zap\n")
    assert time.monotonic() - began > launcher.AFTER_TORCHRUN


@pytest.mark.parametrize(
    ("environment", "line", "status"),
    [
        ({"RANK": "2"}, "RANK=2 is not a rank of WORLD_SIZE=2", 2),
        ({"RANK": "-1"}, "RANK=-1 is not a rank of WORLD_SIZE=2", 2),
        ({"RANK": "one"}, "RANK=one is not an integer", 2),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 is not an integer", 2),
        ({"WORLD_SIZE": "0"}, "RANK=1 is not a rank of WORLD_SIZE=0", 2),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, but RANK or WORLD_SIZE is", 2),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port", 1),
    ],
)
def test_incomplete_or_wrong_environment_variables_are_refused(
    environment, line, status, monkeypatch, capsys
):
    for name, value in (PLACE | environment).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert launch("do=fine") == status
    output = capsys.readouterr().err
    assert output.startswith(f"toy.py: error: {line} (environment); ")
    assert output.count("\n") == 1


@pytest.mark.parametrize("name", ["^lo", "lo,eth77"])
def test_a_network_interface_that_does_not_exist_is_refused(name, monkeypatch, capsys):
    # gloo raises "ifa != nullptr. Unable to find address for: ^lo" with a page of traceback.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    assert launch("nproc=2") == 1
    output = capsys.readouterr().err
    wrong = name.split(",")[-1]
    assert output.startswith(
        f"toy.py: error: GLOO_SOCKET_IFNAME={wrong} is not a network interface"
    )
    assert output.count("\n") == 1
