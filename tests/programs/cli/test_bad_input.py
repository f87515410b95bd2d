"""A mistake on the command line of the real programs: one line on stderr and exit status 2, at once
and without importing torch or numpy.

test_config.py checks the message of every mistake; here a few run in a real process.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start(tmp_path):
    """Runs a program in an empty folder; importing torch or numpy ends it."""
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("torch", "numpy"):
        (trap / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = f"{trap}{os.pathsep}{ROOT}"

    def run(*arguments: str | bytes, program: str = "train.py", **variables: str):
        return subprocess.run(
            [sys.executable, ROOT / "launch" / program, *arguments],
            cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


MISTAKES = {
    "choice": ["--strategy", "zp"],
    "flag": ["--batchsize", "32"],
    "no file": ["--config", "nope.toml"],
    "folder": ["--config", "."],
    "not TOML": ["--config", "broken.toml"],
    "type": ["--steps", "1.5"],
    "range": ["--lr", "nan"],
    "not launched": ["--strategy", "dp"],
    "ranks": ["--strategy", "dp", "--nproc", "0"],
    "more ranks than the mesh": ["--strategy", "dp", "--mesh", "dp=3", "--nproc", "2"],
    "batch": ["--strategy", "dp", "--nproc", "2", "--batch", "33"],
    "axis": ["--strategy", "dp", "--mesh", "tp=2", "--nproc", "2"],
    "dtype": ["--dtype", "fp8"],
    "twice": ["--lr", "1", "--lr", "2"],
    "stray": ["dp"],
    "output": ["--strategy", "dp", "--nproc", "2", "--out", "."],
    "not UTF-8": [b"--out=\xff"],
    "text for a model of images": ["--nproc", "1", "--model", "vit", "--data", "stdlib"],
    "images for a model of text": ["--nproc", "1", "--data", "fake"],
    "size of an image": ["--nproc", "1", "--model", "vit", "--data", "fake:3x30x30"],
    "no dataset": ["--nproc", "1", "--model", "vit", "--data", "mnist", "--cache", "."],
    "half a dataset": ["--nproc", "1", "--model", "vit", "--data", "cifar10", "--cache", "half"],
    "nothing to download": ["--nproc", "1", "--download"],
    "size of the model": ["--model", "resnet18", "--size", "25m"],
    "even with --debug": ["--strategy", "zp", "--debug"],
}


USUAL = (
    "choice",
    "no file",
    "not launched",
    "output",
    "half a dataset",
)


@pytest.mark.slow_unless(lambda arguments: arguments in [MISTAKES[name] for name in USUAL])
@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_by_one_line_and_exit_status_2(start, tmp_path, arguments):
    (tmp_path / "broken.toml").write_text("steps = \n")
    (tmp_path / "half" / "cifar-10-batches-py").mkdir(parents=True)
    done = start(*arguments)
    [line] = done.stderr.splitlines()
    assert line.startswith("train.py: error: ")
    assert "; " in line  # what is wrong; how to fix it
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "runs").exists()


def test_a_mistake_is_answered_without_the_delay_of_importing_torch(start):
    began = time.perf_counter()
    start("--strategy", "zp")
    assert time.perf_counter() - began < 1.5  # it takes 0.1 s; importing torch alone takes more


def test_the_message_names_the_program_that_was_started(start):
    done = start("--strategy", "zp", program="verify.py")
    assert done.stderr.startswith("verify.py: error: strategy cannot be 'zp' (--strategy); ")
    assert done.returncode == 2


def test_doctor_reports_a_missing_module_without_importing_it(start):
    done = start("no_such:build", "--nproc", "2", program="doctor.py")
    assert done.stderr.startswith("doctor.py: error: no module 'no_such' in ")
    assert done.returncode == 2


@pytest.mark.parametrize("program", ["train.py", "verify.py", "doctor.py"])
def test_help_starts_with_how_to_launch_the_program(start, program):
    done = start("--help", program=program)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"torchrun --nproc_per_node=4 launch/{program}" in done.stdout


def test_under_torchrun_rank_0_prints_the_message(start):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = start("--strategy", "zp", RANK="0", **place)
    assert done.stderr.startswith("train.py: error: strategy cannot be 'zp'")
    assert done.returncode == 2
