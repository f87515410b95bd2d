"""launch/sweep.py: which comparisons it makes, what it fits, and that it goes on where it was."""

import json
from dataclasses import replace

import programs
import pytest

from dist_lab.observe.fit import nonnegative_fit
from dist_lab.programs.sweep import settings
from dist_lab.programs.sweep.command import read
from dist_lab.programs.sweep.report import notes, picture, table
from dist_lab.programs.sweep.results import Point, fit


def cells(*arguments):
    return [cell.settings for cell in settings.read(arguments).cells()]


def test_all_numbers_of_ranks_train_the_same_model_on_the_same_batch():
    strong = cells("--worlds", "3,4,2", "--strategies", "ddp,pp", "--layers", "6")
    assert [run.nproc for run in strong] == [2, 3, 4]
    assert {run.batch for run in strong} == {48}, "divides by 2, 3, 4, and 8 micro-batches of pp"
    assert {run.strategies for run in strong} == {"single,ddp,pp"}
    deeper = cells("--worlds", "2,8", "--strategies", "pp", "--oversubscribe")
    assert {run.layers for run in deeper} == {8}, "8 stages need 8 blocks, on 2 ranks as well"


def test_under_weak_scaling_each_rank_has_the_batch():
    weak = cells("--worlds", "2,4", "--scaling", "weak", "--batch", "6", "--strategies", "ddp")
    assert [(run.nproc, run.batch) for run in weak] == [(2, 12), (4, 24)]


def test_a_mesh_runs_on_its_own_number_of_ranks_only():
    both = cells("--worlds", "2,4", "--strategies", "fsdp,fsdp2xtp2", "--sizes", "tiny,small")
    assert [run.strategies for run in both] == ["single,fsdp", "single,fsdp,fsdp2xtp2"] * 2
    assert [run.size for run in both] == ["tiny", "tiny", "small", "small"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--worlds", "2,x"], "no number of ranks 'x' (--worlds)"),
        (["--worlds", "0"], "no number of ranks '0' (--worlds)"),
        (["--worlds", "2", "--strategies", "fsdp2xtp2"], "runs on 2 ranks (--strategies, --wor"),
        (["--worlds", "2,3", "--strategies", "tp"], "ranks of tp@hand (--worlds); leave 3 out, or"),
        (["--sizes", "huge"], "no size 'huge' (--sizes)"),
        (["--worlds", "1000"], "(--worlds); give"),
        (["--strategies", "zero9"], "(--strategies)"),
        (["--rounds", "2"], "2 rounds are too few"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    assert words in programs.refusal("sweep.py", *arguments)


def test_a_sweep_under_torchrun_is_told_what_to_type():
    with pytest.raises(settings.UserError, match=r"type python launch/sweep.py --worlds 2,4"):
        settings.read([]).axes(4)


# --- results --------------------------------------------------------------------------------------


def point(ranks, calls, sent, *, flops=8e9, costs=(1e-10, 2e-3, 1e-9), strategy="ddp"):
    cores = min(ranks, 2)
    work = flops / cores, calls, sent
    seconds = sum(cost * amount for cost, amount in zip(costs, work, strict=True))
    times = seconds, 0.9 * seconds, 1.1 * seconds
    speedup = flops * costs[0] / seconds
    interval = 0.9 * speedup, 1.2 * speedup
    return Point(
        "tiny", ranks, strategy, "dp=2", *times, 1 / seconds, speedup, interval, cores, work, True
    )


POINTS = [point(1, 0, 0, strategy="single"), point(2, 10, 1e7), point(4, 90, 2e7), point(4, 5, 9e7)]


def test_costs_are_found_from_the_steps_that_they_make():
    costs = fit(POINTS)
    assert costs.of == pytest.approx((1e-10, 2e-3, 1e-9))
    assert costs.error < 1e-9
    parts = costs.parts(POINTS[2])
    assert parts == pytest.approx({"compute": 0.4, "calls": 0.18, "bytes": 0.02})
    assert sum(parts.values()) == pytest.approx(POINTS[2].seconds)


def test_a_cost_is_never_negative_and_needs_enough_steps():
    assert fit(POINTS[:3]) is None, "three costs fit any three steps without an error"
    assert fit([replace(p, work=None) for p in POINTS]) is None
    falling = nonnegative_fit([[1, 0], [1, 1], [1, 2]], [3.0, 2.0, 1.0])
    assert falling.x[1] == 0, "more of it took less time"
    assert falling.x[0] > 0


def test_cores_are_said_to_be_the_limit_where_ranks_share_them():
    sweep = settings.read([])
    lines = [*notes(POINTS, sweep, fit(POINTS))]
    few = " ".join(notes(POINTS[:3], sweep, None))
    assert "3 costs need more than the 3 steps" in few
    assert lines[0].startswith("4 ranks share 2 cores, so no strategy can be more than 2 times")
    assert not any("share" in line for line in notes(POINTS[:2], sweep, None))
    assert POINTS[2].efficiency == pytest.approx(POINTS[2].speedup / 4)
    assert POINTS[2].of_the_cores == pytest.approx(POINTS[2].speedup / 2)
    assert table(POINTS, sweep, fit(POINTS)).row_count == len(POINTS)
    left, right = picture(POINTS, sweep, fit(POINTS)).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "a core for each rank", "these cores", "ddp",
    ]  # fmt: skip
    assert [tick.get_text() for tick in right.get_yticklabels()] == [
        "single", "ddp 2", "ddp 4",
    ]  # fmt: skip


# --- running --------------------------------------------------------------------------------------


def test_a_result_of_other_settings_or_a_damaged_one_is_measured_again(tmp_path):
    (cell,) = settings.read(["--worlds", "2"]).cells()
    path = tmp_path / f"{cell}.json"
    assert read(path, cell) is None
    config = cell.settings.to_dict() | {"out": str(path)}
    path.write_text(json.dumps({"setting": {"config": config}}))
    assert read(path, cell) == {"setting": {"config": json.loads(json.dumps(config))}}
    for damaged in (json.dumps({"setting": {"config": {**config, "batch": 7}}}), "{", "[]"):
        path.write_text(damaged)
        assert read(path, cell) is None


@pytest.mark.slow
def test_a_sweep_measures_and_goes_on_where_it_was(tmp_path):
    small = ["--seq", "16", "--layers", "1", "--batch", "6", "--steps", "1", "--strategies", "ddp"]
    arguments = ["sweep.py", "--worlds", "2,3", *small, "--out", str(tmp_path)]
    done = programs.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "1 of 2: gpt-tiny-2, single,ddp" in done.stdout
    everything = json.loads((tmp_path / "sweep.json").read_text())
    found = [(p["strategy"], p["ranks"]) for p in everything["points"]]
    assert found == [("single", 2), ("ddp", 2), ("single", 3), ("ddp", 3)]
    assert all(p["equal_loss"] for p in everything["points"])
    (tmp_path / "gpt-tiny-3.json").unlink()
    again = programs.run(*arguments)
    assert "1 of 2: gpt-tiny-2, measured before" in again.stdout
    assert "2 of 2: gpt-tiny-3, single,ddp" in again.stdout
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
