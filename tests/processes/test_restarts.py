"""Restarts: a rank that fails costs one restart, and the sum that the ranks count is exact.

The program is tests/helpers/toy.py: `do=count_to_9` counts nine steps, with a checkpoint in a file
after every third.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import toy

from dist_lab.errors import MachineError, UserError
from dist_lab.processes import launcher
from dist_lab.processes.attempts import agreed_attempt

ROOT = Path(__file__).parents[2]


def count(folder: Path, plan: str, *settings: str) -> int:
    """Count to 9 on 3 ranks, with `plan`: lines of attempt, step, rank and way of a failure."""
    (folder / "plan").write_text(plan)
    settings = ("nproc=3", "do=count to 9", f"folder={folder}", *settings)
    return launcher.main("toy.py", toy.parse, "toy:body", settings, place=toy.place)


def result(folder: Path) -> str:
    """The number of attempts, and the sum."""
    return (folder / "result").read_text()


def attempts(folder: Path, rank: int = 0) -> list[str]:
    """For each attempt: whether it was told to resume, and its process."""
    (out,) = folder.glob("out-*")
    return [line.split()[0] for line in (out / f"attempts-{rank}").read_text().splitlines()]


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("kill", "killed by SIGKILL, which the kernel sends when memory runs out"),
        ("exit", "exited with status 3"),
        ("exc", "KeyError: 'a defect' (--debug shows the traceback)"),
    ],
)
@pytest.mark.slow_unless(lambda way: way == "kill")
def test_a_rank_that_fails_costs_one_restart_and_no_step_is_lost_or_counted_twice(
    way, how, tmp_path, capsys
):
    assert count(tmp_path, f"1 5 1 {way}", "restarts=2") == 0
    (out,) = tmp_path.glob("out-*")
    line = f"toy.py: rank 1 of 3 failed first: {how}; restart 1 of 2, in {out}\n"
    assert capsys.readouterr() == ("", line)
    assert result(tmp_path) == "2 27.0"
    assert [attempts(tmp_path, rank) for rank in range(3)] == [["False", "True"]] * 3


@pytest.mark.slow
def test_any_rank_may_fail_again_and_two_at_once(tmp_path, capsys):
    plan = "1 2 0 kill\n2 5 1 kill\n2 5 2 kill\n3 9 0 kill"
    assert count(tmp_path, plan, "restarts=3") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"restart \d of 3", line) for line in lines] == [
        ["restart 1 of 3"], ["restart 2 of 3"], ["restart 3 of 3"],
    ]  # fmt: skip
    assert "rank 0 of 3 failed first" in lines[0]
    assert result(tmp_path) == "4 27.0"


def test_when_no_restart_is_left_the_failure_is_reported(tmp_path, capsys):
    assert count(tmp_path, "1 2 1 kill\n2 4 2 kill", "restarts=1") == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith(f"restart 1 of 1, in {next(tmp_path.glob('out-*'))}")
    assert rest[0].startswith("---- rank 2 of 3: killed by SIGKILL")


def test_a_refusal_is_not_tried_again(tmp_path, capsys):
    assert count(tmp_path, "1 2 1 refuse", "restarts=3") == 1
    assert capsys.readouterr().err == "toy.py: error: no space left in /scratch\n"
    assert attempts(tmp_path) == ["False"]


@pytest.mark.slow
def test_a_rank_that_is_stopped_costs_one_restart_after_the_timeout(tmp_path, capsys):
    assert count(tmp_path, "1 5 1 stop", "restarts=1", "timeout=1") == 0
    output = capsys.readouterr().err
    assert re.match(r"toy.py: ranks? [02, ]+ of 3 gave up first: .*; restart 1 of 1, in", output)
    assert "rank 1" in output.splitlines()[0]
    assert result(tmp_path) == "2 27.0"


@pytest.mark.slow
def test_debug_shows_the_traceback_of_a_failure_that_costs_a_restart(tmp_path, capsys):
    assert count(tmp_path, "1 2 1 exc", "restarts=1", "debug=1") == 0
    assert "in raise_key_error\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, MachineError])
def test_every_rank_hears_why_rank_0_has_no_folder(kind):
    """The others wait for its answer: a disk that cannot be read was one that never came."""
    stores = dist.HashStore(), dist.HashStore()

    def place(config):
        raise kind("why")

    for rank in range(2):
        with pytest.raises(kind, match="why"):
            agreed_attempt(None, place, rank, *stores)


@pytest.mark.nightly
def test_torchrun_can_restart_three_times_in_a_row_and_finds_the_folder_again(tmp_path):
    """torchrun keeps its store, in which the addresses of the dead ranks are: each attempt has a
    prefix of its own, without which gloo tries to connect to them.
    """
    (tmp_path / "plan").write_text("1 2 1 kill\n2 4 0 kill\n3 5 2 kill")
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--max-restarts=3"]
    command = [sys.executable, *by, toy.__file__, "do=count to 9", f"folder={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result(tmp_path) == "4 27.0"
    assert attempts(tmp_path) == ["False", "True", "True", "True"]
    assert "connectFullMesh" not in done.stderr
