"""A run whose ranks are killed computes, to the bit, what it computes if they are not.

More kills, on more ranks, are in tests/nightly/kills.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import kills
import pytest
from programs import run

STEPS, SAVE_EVERY = 12, 3
TIME = ("--timeout", "20")  # in kills.SMALL


def train(mode: str, out: Path, *flags: object, steps: int = STEPS):
    """Train on 2 ranks in this process's forkserver."""
    sizes = ["--steps", steps, "--save-every", SAVE_EVERY, "--nproc", 2]
    paths = ["--data", kills.DATA, "--cache", out.parent / "cache", "--out", out]
    small = [flag for flag in kills.SMALL if flag not in (() if "--timeout" not in flags else TIME)]
    done = run("train.py", *kills.MODES[mode].split(), *small, *sizes, *paths, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, "a rank that lost another one says so in one line"
    return done


@cache
def never_killed(mode: str, steps: int = STEPS):
    with TemporaryDirectory() as folder:
        train(mode, Path(folder, "run"), steps=steps)
        return kills.numbers(Path(folder, "run"))


def check_logs(out: Path, steps: int = STEPS):
    """Each step is once in metrics.jsonl, and once in TensorBoard: goal R23."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    scalars = EventAccumulator(str(out)).Reload().Scalars("grad_norm")
    assert [event.step for event in scalars] == list(range(1, steps + 1))
    assert [event.value for event in scalars] == pytest.approx([row["grad_norm"] for row in rows])
    assert (out / "summary.json").exists()


@pytest.mark.slow
def test_a_rank_that_is_killed_in_the_middle_of_a_save_changes_nothing(tmp_path):
    flags = ["--restarts", 1, "--fault", "kill:rank=0@step=6,phase=save,op=6"]
    done = train("fsdp", tmp_path / "run", *flags, steps=6)
    assert kills.numbers(tmp_path / "run") == never_killed("fsdp", 6)
    check_logs(tmp_path / "run", 6)
    assert "train.py: rank 0 of 2 failed first: killed by SIGKILL" in done.stderr
    assert done.stdout.count("resumed after step 3") == 1


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda mode: mode in ("fsdp", "pp"))
@pytest.mark.parametrize("mode", kills.MODES)
def test_the_same_command_with_the_same_seed_computes_the_same_bits(mode, tmp_path):
    train(mode, tmp_path / "run")
    assert kills.numbers(tmp_path / "run") == never_killed(mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", kills.MODES)
def test_random_kills_change_nothing_in_any_mode(mode, tmp_path):
    """Three random ones, rank 0 in the optimizer's step, and then both ranks in one step."""
    seed = list(kills.MODES).index(mode)
    spec = (
        f"random:n=3,seed={seed};kill:rank=0@step=2,phase=optimizer,op=2;"
        "kill:rank=0@step=11;kill:rank=1@step=11,phase=reduce"
    )
    train(mode, tmp_path / "run", "--restarts", 6, "--fault", spec)
    assert kills.numbers(tmp_path / "run") == never_killed(mode)
    check_logs(tmp_path / "run")
    happened = [json.loads(ln) for ln in (tmp_path / "run/faults.jsonl").read_text().splitlines()]
    assert max(Counter(entry["number"] for entry in happened).values()) == 1
    assert len(happened) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segv", "exit", "exc", "stop", "sleep", "gil"])
@pytest.mark.nightly_unless(lambda kind: kind == "exc")
def test_a_rank_that_crashes_or_hangs_costs_one_restart(kind, tmp_path):
    spec = f"{kind}:rank=1@step=7,phase=forward"
    flags = ["--restarts", 1, "--fault", spec, "--timeout", 5]
    done = train("ddp", tmp_path / "run", *flags)
    assert "restart 1 of 1" in done.stderr
    assert kills.numbers(tmp_path / "run") == never_killed("ddp")


@pytest.mark.slow
def test_a_rank_that_is_killed_while_ranks_restart_changes_nothing(tmp_path):
    expected = reference(tmp_path)
    assert kills.kill_while_restarting("ddp", 2, tmp_path, expected) == ""


@pytest.mark.slow
def test_no_rank_outlives_a_killed_launcher_and_the_run_goes_on_by_hand(tmp_path):
    expected = reference(tmp_path)
    assert kills.kill_the_launcher("ddp", 2, tmp_path, expected) == ""


def reference(folder: Path):
    out = folder / "reference" / "run"
    assert kills.finished(kills.command("ddp", 2, out)).status == 0
    return kills.numbers(out)


@pytest.mark.slow
def test_torchrun_restarts_a_run_in_the_folder_that_its_first_attempt_has_chosen(tmp_path):
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    spec = "kill:rank=0@step=5;kill:rank=1@step=8,phase=reduce;kill:rank=0@step=9,phase=save,op=4"
    flags = ["--steps", STEPS, "--save-every", SAVE_EVERY, "--data", kills.DATA, "--fault", spec]
    flags += ["--cache", tmp_path / "cache", *kills.MODES["ddp"].split(), *kills.SMALL]
    done = subprocess.run(
        [sys.executable, *by, kills.ROOT / "launch/train.py", *map(str, flags)],
        cwd=tmp_path, capture_output=True, text=True, timeout=150,
        env=os.environ | {"PYTHONPATH": str(kills.ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert kills.numbers(out) == never_killed("ddp")
    check_logs(out)
    assert "connectFullMesh" not in done.stderr


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda flags: "fsdp" in flags)
@pytest.mark.parametrize("flags", ["--strategy ddp", "--strategy fsdp --microbatches 2"])
def test_a_run_keeps_its_batch_on_a_number_of_ranks_that_does_not_divide_it(flags, tmp_path):
    """The default of 32 samples is divided as 11, 11 and 10. Three ranks alone would begin with 33,
    which would be another run.
    """
    small = "--size tiny --seq 16 --log-every 1 --val-every 0 --dtype float64 --dropout 0.1"
    paths = ["--data", kills.DATA, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    common = [*flags.split(), *small.split(), *paths]
    done = run("train.py", *common, "--nproc", 4, "--steps", 4, "--save-every", 2, "--keep", 9)
    assert done.returncode == 0, done.stderr
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    done = run("train.py", *common, "--nproc", 3, "--steps", 4, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "32 x 16 a step" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(before, rel=1e-10)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
