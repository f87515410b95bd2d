"""How a run ends that does not reach its last step: the cause in few lines, and how it goes on."""

import os
import signal
import threading
import time

import pytest
from programs import run

TINY = "--model mlp --size tiny --seq 8 --batch 4 --val-every 0 --log-every 1".split()


def train(out, *flags, steps=4):
    return run("train.py", *TINY, "--steps", steps, "--out", out, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("saves", [True, False])
def test_a_killed_run_names_the_fault_its_newest_checkpoint_and_how_to_go_on(tmp_path, saves):
    """The kill was said to be the kernel's, which was out of memory."""
    flags = ["--save-every", 2] if saves else []
    ranks = ["--strategy", "ddp", "--nproc", 2]
    done = train(tmp_path, *flags, *ranks, "--fault", "kill:rank=1@step=4")
    assert done.returncode == 1
    first, *_, last = done.stderr.splitlines()
    assert first == "---- rank 1 of 2: killed by SIGKILL, by --fault kill ----"
    if saves:
        newest = tmp_path / "checkpoints/step-00000002"
        assert last == (
            f"train.py: last logged step 3; newest whole checkpoint {newest}; to go on, give the "
            f"same command with --resume auto --out {tmp_path}"
        )
    else:
        assert last.endswith(f"no checkpoint is whole in {tmp_path}, --save-every N saves some")


def test_a_mismatch_shows_what_all_ranks_did_and_no_traceback_and_no_rank_twice(tmp_path):
    """The other rank was said to have "timed out, or lost the connection"."""
    flags = "--strategy ddp --nproc 2 --check-collectives --fault mismatch:rank=1@step=2".split()
    done = train(tmp_path, *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("---- rank ")
    assert ": CollectiveMismatch: rank " in done.stderr.splitlines()[0]
    assert done.stderr.splitlines()[1] == "what every rank was doing:"
    assert "Traceback" not in done.stderr
    assert "lost the connection" not in done.stderr


@pytest.mark.parametrize("ranks", [["--nproc", 2, "--strategy", "ddp"], []])
@pytest.mark.slow_unless(lambda ranks: ranks)
def test_ctrl_c_says_how_the_run_goes_on(tmp_path, ranks):
    saved = tmp_path / "checkpoints/step-00000003"

    def interrupt():
        while not saved.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    done = train(tmp_path, *ranks, "--save-every", 3, "--keep", 9999, steps=100_000)
    assert done.returncode == 130
    *_, last = done.stderr.splitlines()
    assert last.startswith("train.py: stopped by SIGINT, last logged step ")
    assert f"newest whole checkpoint {tmp_path}/checkpoints/step-" in last
    assert last.endswith(f"give the same command with --resume auto --out {tmp_path}")
