"""A short run and its checkpoints, made once."""

from functools import cache
from pathlib import Path

from programs import run

MODEL = {"layers": 2, "batch": 4, "seq": 16, "optimizer": "adamw"}


@cache
def trained(base: Path) -> Path:
    """The folder of a run of one process, in `base`: two steps, saved after each."""
    folder = base / "short-run"
    settings = [f"--{name}={value}" for name, value in MODEL.items()]
    flags = ["--steps=2", "--save-every=1", "--val-every=0", f"--out={folder}"]
    done = run("train.py", *flags, *settings)
    assert done.returncode == 0, done.stderr
    return folder


@cache
def trained_on_two_ranks(base: Path) -> Path:
    """The same run as if two ranks of fsdp had saved it."""
    folder = base / "short-run-sharded"
    for step in (1, 2):
        path = trained(base) / f"checkpoints/step-0000000{step}"
        target = folder / "checkpoints"
        done = run("checkpoint.py", "reshard", path, target, "--mesh=fsdp=2")
        assert done.returncode == 0, done.stderr
    return folder
