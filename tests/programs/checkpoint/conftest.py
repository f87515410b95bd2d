"""A short run to look at."""

import pytest
from programs import run
from short_run import MODEL


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The folder of a run of one process: two steps, saved after each."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    settings = [f"--{name}={value}" for name, value in MODEL.items()]
    flags = ["--steps=2", "--save-every=1", "--val-every=0", f"--out={folder}"]
    done = run("train.py", *flags, *settings)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def sharded(source, tmp_path_factory):
    """The same run as if two ranks of fsdp had saved it."""
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    for step in (1, 2):
        path = source / f"checkpoints/step-0000000{step}"
        target = folder / "checkpoints"
        done = run("checkpoint.py", "reshard", path, target, "--mesh=fsdp=2")
        assert done.returncode == 0, done.stderr
    return folder
