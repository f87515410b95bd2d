"""explain shows what a run does, because it runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lab import train as loop
from dist_lab.commands import build, meet
from dist_lab.config import Config

ROOT = Path(__file__).parent.parent
SMALL = {"batch": 4, "seq": 16, "microbatches": 2}

OBSERVED = """
import json, sys
from dist_lab.config import Config
from dist_lab.explain import observe
from dist_lab.mesh import pretended
config = Config(**json.loads(sys.argv[1]))
with pretended({"dp": 2}) as mesh:
    _, first, steady = observe(config, mesh)
print(json.dumps([[(c.phase, c.op, c.unit, c.payload, c.sent) for c in calls] for calls in (first, steady)]))
"""  # noqa: E501


def shown(*arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "launch/explain.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("strategy", ["dp", "ddp"])
@pytest.mark.ranks(2, timeout=120)
def test_what_is_shown_is_what_a_run_sends_to_the_byte(strategy, mesh, tmp_path):
    own = {"bucket_mb": 0.5} if strategy == "ddp" else {}
    settings = {"strategy": strategy, **SMALL, **own}
    config = Config(**settings)
    data = meet(config, mesh)
    job = build(config, mesh, data)
    optimizer = job.optimizer(loop.OPTIMIZERS["sgd"], lr=1e-3)
    steps = []
    for step in range(2):
        inputs, targets = data.batch(step, loop.own_rows(config.batch, job))
        with mesh.wire.ledger.recording() as calls:
            total = job.count(targets.numel())
            job.run(loop.microbatches(inputs, targets, config, job), loop.mean_over(total))
            job.finish()
            job.clip_grad_norm(1.0)
            optimizer.step()
            job.after_step()
        optimizer.zero_grad()
        steps.append([[c.phase, c.op, c.unit, c.payload, c.sent] for c in calls])
    if mesh.rank == 0:
        done = subprocess.run(
            [sys.executable, "-c", OBSERVED, json.dumps(settings)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == steps


def test_a_mesh_of_ranks_that_do_not_exist_is_laid_out_cut_and_counted():
    text = shown("--strategy", "ddp", "--mesh", "dp=64", "--batch", "64", "--seq", "8")
    assert "ranks of dp=64" in text
    assert "model.layers.0-3.self_attn.q_proj.weight" in text
    assert "bucket 0: lm_head.weight" in text
    assert "2 (N-1)/N S" in text
    row = next(line.split() for line in text.splitlines() if line.lstrip().startswith("all_reduce"))
    payload, by_formula, sent = (int(row[i].replace(",", "")) for i in (3, -2, -1))
    assert payload > 4 * 1_000_576  # all parameters, and the flags
    assert by_formula == pytest.approx(2 * 63 / 64 * payload, abs=1)
    assert sent == pytest.approx(by_formula, rel=1e-3)  # rank 0 has the longest pieces


@pytest.mark.parametrize("collectives", ["ring", "direct", "tree"])
def test_algorithms_by_hand_are_explained_without_anyone_to_send_to(collectives):
    text = shown("--strategy", "ddp", "--seq", "8", "--batch", "4", "--collectives", collectives)
    row = next(line.split() for line in text.splitlines() if line.lstrip().startswith("all_reduce"))
    by_formula, sent = (int(row[i].replace(",", "")) for i in (-2, -1))
    assert sent == pytest.approx(by_formula, rel=1e-2)


def test_one_process_sends_nothing():
    assert shown("--seq", "8", "--batch", "2").endswith("nothing is sent\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--strategy", "ddp", "--impl", "torch"], "ddp@torch is a library's (--impl); give"),
        (["--strategy", "dp", "--mesh", "dp=3"], "batch 32 does not divide into 3 data-parallel"),
        (["--strategy", "dp", "--mesh", "tp=3"], "strategy dp does not run along 'tp' (--mesh)"),
        (["--strategy", "dp", "--nproc", "2"], "no flag '--nproc'"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(arguments, line):
    done = subprocess.run(
        [sys.executable, ROOT / "launch/explain.py", *arguments], capture_output=True, text=True
    )
    [said] = done.stderr.splitlines()
    assert said.startswith("explain.py: error: ")
    assert line in said
    assert (done.returncode, done.stdout) == (2, "")
