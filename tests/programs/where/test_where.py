"""where.py looks at a live run from outside, and never disturbs it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import all_gone
from programs import ROOT

from dist_lab.comm import ops
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe.run_dir import claimed
from dist_lab.programs.cli.config import Config
from dist_lab.programs.where.command import where
from dist_lab.programs.where.settings import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_folder_without_a_live_run_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="there is no folder 'nowhere'; give that of a run"):
        where("nowhere")
    with pytest.raises(MachineError, match=r"nothing runs in folder .*: it is not one of a run"):
        where(str(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(MachineError, match=r"nothing runs in folder .*: it has ended"):
        where(str(tmp_path))
    assert main([str(tmp_path)], "") == 1
    assert main(["nowhere"], "") == main([], "") == main(["a", "b"], "") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"(where\.py: error: .*\n){4}", output.err)


def test_a_folder_that_another_program_has_locked_is_one_line(tmp_path):
    hold = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        with pytest.raises(MachineError, match=rf"process {other.pid}, which has locked folder"):
            where(str(tmp_path))
        other.communicate("")


def spin(seconds):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        re.match(r"(a+)+b", 18 * "a")  # in C, with the GIL


@pytest.mark.ranks(3, timeout=30)
def test_each_ranks_place_step_phase_unit_call_age_and_line_are_shown(mesh, tmp_path):
    mesh = init_mesh(dp=3)
    axis = mesh["dp"]
    ops.all_reduce(torch.ones(4), axis)
    with mesh.comm.visible():
        ops.all_reduce(torch.ones(2), axis)  # all answer now
        if mesh.rank == 0:
            with claimed(Config(out=str(tmp_path / "run"))) as folder:
                time.sleep(0.3)
                rows = where(str(folder)).splitlines()
                assert os.listdir(folder) == [], "a run must leave nothing for where.py"
            assert rows[0] == "dp=3, 3 ranks"
            call = r"in all_gather\(float32\[5\]\) by direct #3 on dp\{0-2\} +\d\.\d s"
            place = r"1 +dp=1 +7 +backward  block\.3  "
            assert re.fullmatch(rf"{place}{call}  test_where\.py:\d+ in .*", rows[3]), rows
            call = r"after all_reduce\(float32\[2\], sum\) #2 on dp\{0-2\} +\d\.\d s"
            assert re.search(rf" forward +block\.0  {call}  test_where.py:\d+ in spin", rows[4]), (
                rows
            )
            assert rows[2].endswith(" in table"), "this rank is looking"
        elif mesh.rank == 2:
            mesh.comm.begin(7, "forward", "block.0")
            spin(1.0)
        else:
            mesh.comm.begin(7, "backward", "block.3")
        ops.all_gather(torch.ones(5), axis)


def start(out: Path, *command: str) -> subprocess.Popen:
    settings = ["--strategy", "ddp", "--size", "tiny", "--steps", "100000", "--out", str(out)]
    with printed_by(out).open("w") as file:
        return subprocess.Popen(
            [*command, *settings], cwd=ROOT, env=os.environ | {"MARK": str(out)},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def printed_by(out: Path) -> Path:
    return out.with_name("printed.txt")


def looked(out: Path, after: int = 1) -> str:
    """The output of launch/where.py once all ranks are in a step after this one."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        command = [sys.executable, "launch/where.py", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        rows = done.stdout.splitlines()[2:]
        if done.returncode == 0 and len(rows) == 2 and step_of(rows) > after:
            return done.stdout
        time.sleep(0.2)
    raise AssertionError(done.stderr + done.stdout + printed_by(out).read_text())


def step_of(rows: list[str]) -> int:
    return min(int(row.split()[2]) for row in rows)


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda by_torchrun: not by_torchrun)
@pytest.mark.parametrize("by_torchrun", [False, True])
def test_a_run_can_be_watched_and_goes_on_and_a_stopped_rank_is_seen(by_torchrun, tmp_path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ours = [sys.executable, "launch/train.py", "--nproc", "2"]
    command = [*torchrun, "--nproc_per_node=2", "launch/train.py"] if by_torchrun else ours
    program = start(out, *command)
    try:
        first = looked(out)
        assert re.match(r"dp=2, 2 ranks\nrank  place  step ", first)
        assert len(re.findall(r"\w+\.py:\d+ in \w+", first)) >= 1, first
        rank_1 = next(
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/environ")
            if is_rank_1(path, str(out), by_torchrun)
        )
        os.kill(rank_1, signal.SIGSTOP)
        time.sleep(0.5)
        second = looked(out)
        assert "stopped (SIGSTOP), last call at " in second.splitlines()[3], second
        os.kill(rank_1, signal.SIGCONT)
        looked(out, step_of(second.splitlines()[2:]))  # it goes on
        assert program.poll() is None
    finally:
        program.terminate()
        program.wait()
    assert all_gone(f"MARK={out}")
    assert main([str(out)], "") == 1


def is_rank_1(path: Path, out: str, by_torchrun: bool) -> bool:
    try:
        ours = f"MARK={out}".encode() in path.read_bytes()
        if by_torchrun:
            return ours and b"\0RANK=1\0" in path.read_bytes()
        title = (path.parent / "maps").read_text()
        return ours and "dist_lab-board" in title and not locks(int(path.parent.name), out)
    except OSError:
        return False


def locks(process: int, out: str) -> bool:
    return f" {process} " in "".join(
        line for line in Path("/proc/locks").read_text().splitlines(keepends=True)
        if line.split()[5].endswith(f":{os.stat(out).st_ino}")
    )  # fmt: skip
