"""Stragglers: a slow rank is named in time, at its cost, and noise and long stages are not."""

import json
import time
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs import run

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.observe import stragglers
from dist_lab.observe.sinks import closing_line
from dist_lab.observe.stragglers import AGREE, EVERY, Stragglers, closing_words

STEPS, RANKS = 200, 4
ONSET = 100  # of the slow rank


def noisy_work(seed):
    """Seconds of work of (ranks, steps), as on few cores: half of the steps are 20% off or more.

    One step in ten is long, up to four times, on a rank of its own.
    """
    random = np.random.default_rng(seed)
    work = 0.1 * random.lognormal(sigma=0.3, size=(RANKS, STEPS))
    return work * np.where(random.random(work.shape) < 0.1, random.uniform(1, 4, work.shape), 1)


@pytest.fixture
def watched(monkeypatch):
    """Returns what all ranks of a run say, by a watch and the lines of each step.

    All ranks together take as long as the slowest, and the others wait.
    """

    def watch(work, network=0.0, **axes):
        steps = torch.as_tensor(work)
        seconds = steps.max(0).values.expand_as(steps) + network
        rows = torch.stack([seconds, seconds - steps], dim=-1)  # (ranks, steps, 2)
        position = iter(range(0, STEPS + EVERY, EVERY))

        def gathered(own, axis):
            start = next(position)
            return rows[:, start : start + own.shape[1]]

        monkeypatch.setattr(stragglers.ops, "all_gather", gathered)
        comm = SimpleNamespace(label=lambda phase: nullcontext())
        axes = axes or {"dp": len(work)}
        mesh = SimpleNamespace(axes=axes, size=len(work), device="cpu", comm=comm, world=None)
        watch = Stragglers(mesh)
        lines = {s: watch.after_step(s, *rows[0, s - 1].tolist()) for s in range(1, STEPS + 1)}
        return watch, {step: of_step for step, of_step in lines.items() if of_step}

    return watch


@pytest.mark.parametrize("seed", range(10))
def test_noise_of_200_steps_is_no_alarm(seed, watched):
    watch, lines = watched(noisy_work(seed))
    assert (lines, watch.episodes, watch.now()) == ({}, [], {})


@pytest.mark.parametrize("first", range(ONSET, ONSET + EVERY))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_that_needs_twice_the_time_is_named_within_10_steps(first, ranks, watched):
    work = np.random.default_rng(first).uniform(0.09, 0.11, (ranks, STEPS))
    work[1, first - 1 : first + 19] *= 2
    watch, lines = watched(work)
    ((named, (line,)),) = lines.items()
    assert first + AGREE - 1 <= named < first + AGREE - 1 + EVERY
    assert line.startswith(f"step {named}: rank 1 is slow since step {first}: ")
    (slow,) = watch.episodes
    assert (slow.rank, slow.first) == (1, first)
    assert abs(slow.last - (first + 19)) <= EVERY
    assert watch.now() == {}, "it is not slow any more"
    assert slow.lost == pytest.approx(2, abs=0.5)  # 20 steps x 0.1 s; the last ones may lack


@pytest.mark.parametrize("first", range(ONSET, ONSET + EVERY))
def test_noise_that_hides_two_of_the_slow_steps_delays_no_name_beyond_10(first, watched):
    """It was 5 of 6 steps, compared every 5: a single hidden step made it 14."""
    for hidden in combinations(range(first, first + 8), 2):
        work = np.full((RANKS, STEPS), 0.1)
        work[1, first - 1 : first + 19] *= 2
        work[1, np.array(hidden) - 1] /= 2
        _, lines = watched(work)
        assert min(lines) < first + 10, hidden


def test_a_rank_that_is_always_slow_is_named_once(watched):
    work = np.full((RANKS, STEPS), 0.1)
    work[2] *= 1.6
    watch, lines = watched(work)
    assert lines == {
        8: ["step 8: rank 2 is slow since step 1: 160 ms of work a step, ranks with the same "
            "work 100"]
    }  # fmt: skip
    assert watch.now() == {
        "slow_rank": 2, "slow_times": pytest.approx(1.6), "slow_ms": pytest.approx(60),
    }  # fmt: skip
    assert watch.episodes[0].lost == pytest.approx(0.06 * STEPS)


def test_two_slow_ranks_of_four_are_both_named(watched):
    work = np.full((RANKS, STEPS), 0.1)
    work[[0, 3], 50:] *= 2
    watch, _ = watched(work)
    assert [slow.rank for slow in watch.episodes] == [0, 3]


def test_a_difference_that_costs_little_is_no_alarm(watched):
    work = np.full((RANKS, STEPS), 0.001)
    work[1] *= 3
    assert watched(work, network=0.1)[0].episodes == []
    assert len(watched(work, network=0.01)[0].episodes) == 1


def test_a_long_stage_is_an_unbalanced_pipeline_and_no_slow_rank(watched):
    work = np.full((RANKS, STEPS), 0.1)
    work[2:] *= 2  # the second stage of pp=2 x dp=2
    watch, _ = watched(work, pp=2, dp=2)
    assert watch.episodes == []
    assert watch._groups == [(0, 1), (2, 3)]
    summary = watch.summary()
    assert summary["stage_work_ms"] == pytest.approx([100, 200])
    assert "; an unbalanced pipeline: pp=1 works 200 ms a step, the mean of stages is 150" in (
        closing_words(summary)
    )


def test_a_slow_rank_of_a_long_stage_is_named(watched):
    work = np.full((RANKS, STEPS), 0.1)
    work[2:] *= 2
    work[3] *= 1.7
    watch, _ = watched(work, pp=2, dp=2)
    assert [(slow.rank, round(slow.own / slow.others, 1)) for slow in watch.episodes] == [(3, 1.7)]


def test_the_summary_has_the_work_and_waiting_of_each_rank(watched):
    work = np.tile([[0.1], [0.3]], STEPS)
    summary = watched(work)[0].summary()
    assert summary["ranks"]["work_ms"] == pytest.approx([100, 300])
    assert summary["ranks"]["wait_ms"] == pytest.approx([200, 0])
    (slow,) = summary["slow_ranks"]
    assert slow["rank"] == 1
    assert slow["lost_s"] == pytest.approx(0.2 * STEPS)
    json.dumps(summary, allow_nan=False)
    line = closing_line(
        summary | {
            "about": "", "steps": STEPS, "final_loss": 1, "final_val_loss": None, "mfu": 0.5,
            "out": "runs/1",
            "median": {"tokens_per_s": 1, "comm_ms": 1, "step_ms": 2},
            "peak_memory": {"at_peak": {"activations": 1}},
        }
    )  # fmt: skip
    assert "rank 1 was slow in steps 1 to 200 (3.0 times the work of the others), which cos" in line


def test_one_process_has_nobody_to_be_compared_with():
    watch = Stragglers(init_mesh())
    assert [watch.after_step(step, 0.1, 0.0) for step in range(1, 12)] == [[]] * 11
    assert watch.summary()["ranks"] == {"work_ms": [pytest.approx(100)], "wait_ms": [0]}


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_ranks_that_really_wait_name_the_slow_one_and_none_in_200_normal_steps(mesh: Mesh):
    watch, named = Stragglers(mesh), {}
    ledger = mesh.comm.ledger
    for step in range(1, 221):
        began, before = time.perf_counter(), ledger.total.blocked
        work = 0.005 if step <= 200 else 0.020  # long enough for busy cores
        time.sleep(2 * work if mesh.rank == 2 and step > 200 else work)
        ops.all_reduce(torch.ones(1), mesh.world)
        seconds, blocked = time.perf_counter() - began, ledger.total.blocked - before
        for line in watch.after_step(step, seconds, blocked):
            named[step] = line
    assert len(named) == 1, named
    ((step, line),) = named.items()
    assert 201 < step <= 210
    assert f"step {step}: rank 2 is slow since step 20" in line


@pytest.mark.slow
def test_a_run_names_the_slow_rank_in_its_output_its_metrics_and_its_summary(tmp_path):
    flags = "--strategy dp --nproc 2 --size tiny --batch 8 --seq 64 --steps 40 --val-every 0"
    fault = "--fault slow:rank=1@step=13 --log-every 10".split()
    done = run("train.py", *flags.split(), *fault, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (slow,) = summary["slow_ranks"]
    assert slow["rank"] == 1
    assert 13 <= slow["first_step"] <= 15
    assert slow["lost_s"] > 0
    (notice,) = [line for line in done.stdout.splitlines() if "rank 1 is slow since" in line]
    assert int(notice.split(":")[0].removeprefix("step ")) <= 23
    assert "; rank 1 was slow in steps 1" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    named = [row.get("slow_rank") for row in rows]  # of steps 1, 10, 20, 30, 40
    assert (named[:2], named[3:]) == ([None, None], [1, None])


@pytest.mark.slow
def test_the_ranks_of_a_library_are_not_compared(tmp_path):
    flags = "--strategy ddp --impl torch --nproc 2 --batch 8 --seq 16 --steps 8 --val-every 0"
    done = run("train.py", *flags.split(), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["ranks"], summary["slow_ranks"]) == (None, [])
