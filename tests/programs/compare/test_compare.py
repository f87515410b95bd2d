"""The comparison of strategies: its statistics, its settings, its report and its runs on ranks."""

import csv
import gc
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from programs import run
from rich.console import Console

from dist_lab.data import open_data
from dist_lab.errors import UserError, one_of
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe import sockets
from dist_lab.observe.memory import KINDS
from dist_lab.parallel.replicated import ddp, ddp_torch, dp
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.compare import files, measure, rounds, tables
from dist_lab.programs.compare.entries import ListedStrategy, entries
from dist_lab.programs.compare.ratios import Quartiles, depth, fewest_rounds, missed, orders, ratio
from dist_lab.programs.compare.report import CompareReport, ContenderRow, Traffic
from dist_lab.programs.compare.settings import Settings, read
from dist_lab.step.protocol import Applied
from dist_lab.step.setup import Setup

ROOT = Path(__file__).parents[3]
LABELS = [
    name if impl == "hand" else f"{name}@{impl}"
    for name, row in STRATEGIES.items()
    for impl in row.impls
]
IN_BUCKETS = " or ".join(
    f"--strategy {name}" for name, row in STRATEGIES.items() if "bucket_mb" in row.options
)
TOO_MANY = 4 * cores() + 1


# --- the statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 9, 12])
def test_the_probability_of_missing_the_median_equals_a_count_of_all_cases(n):
    for k in range(1, n // 2 + 1):
        sides = itertools.product([0, 1], repeat=n)  # each value below the median, or above it
        misses = sum(sum(side) < k or n - sum(side) < k for side in sides)
        assert missed(n, k) == pytest.approx(misses / 2**n)


def test_the_interval_is_the_narrowest_that_is_right_99_times_in_100():
    for n in range(8, 200):
        assert missed(n, depth(n)) <= 0.01 < missed(n, depth(n) + 1)


def test_fewer_than_8_rounds_have_no_interval_of_99_percent():
    assert fewest_rounds() == 8
    with pytest.raises(ValueError, match="7 rounds"):
        ratio([1.0] * 7, [1.0] * 7)


def test_the_ratio_compares_times_of_the_same_round():
    slow_machine = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0, 7.0, 2.0]  # different in every round
    result = ratio(slow_machine, [1.25 * seconds for seconds in slow_machine])
    assert (result.median, result.low, result.high) == (1.25, 1.25, 1.25)
    assert result.verdict == "faster"
    assert result.confidence == 1 - 2 / 2**8


def test_the_verdict_follows_from_the_interval():
    times = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
    assert ratio(times, [1.0] * 8).verdict == "too noisy to tell"  # the interval ends at 1
    assert ratio([1.0] * 8, times).verdict == "too noisy to tell"  # it begins there
    assert ratio([t + 0.01 for t in times], [1.0] * 8).verdict == "slower"
    assert ratio([0.9] * 8, times).verdict == "faster"


def noisy_rounds(speedup: float, rng: random.Random, rounds: int = 24, steps: int = 3):
    """Round times of two strategies on a noisy machine; the first is `speedup` times as fast.

    The machine drifts, has slow minutes and interruptions, and favors the strategy that runs first.
    """
    round_times: list[list[float]] = [[], []]
    slow = 0.0
    for number, order in enumerate(orders(2, rounds, seed=rng.randrange(10**6))):
        slow = 0.8 * slow + rng.expovariate(20)  # a slow machine stays slow for a while
        for position, contender in enumerate(order):
            times = []
            for _ in range(steps):
                seconds = (1 + slow + 0.01 * number) * (1 if position else 0.97)
                seconds *= rng.lognormvariate(0, 0.03) * (5 if rng.random() < 0.1 else 1)
                times.append(seconds / (speedup if contender == 0 else 1))
            round_times[contender].append(statistics.median(times))
    return round_times


def test_equal_strategies_are_called_too_noisy_to_tell_99_times_in_100():
    rng = random.Random(0)
    verdicts = [ratio(*noisy_rounds(1, rng)).verdict for _ in range(500)]
    assert verdicts.count("too noisy to tell") >= 495


def test_a_speedup_of_a_tenth_is_found_in_the_same_noise():
    rng = random.Random(0)
    verdicts = [ratio(*noisy_rounds(1.1, rng)).verdict for _ in range(200)]
    assert verdicts.count("faster") >= 180
    assert verdicts.count("slower") == 0


@pytest.mark.parametrize("contenders", [1, 2, 5])
def test_every_contender_has_the_same_average_position_in_a_round(contenders):
    drawn = orders(contenders, 20, seed=3)
    assert all(sorted(order) == list(range(contenders)) for order in drawn)
    for who in range(contenders):
        places = [order.index(who) for order in drawn]
        assert statistics.fmean(places) == (contenders - 1) / 2
    assert drawn == orders(contenders, 20, seed=3), "every rank computes the same order"
    assert contenders == 1 or drawn != orders(contenders, 20, seed=4)
    assert orders(contenders, 9, seed=3) == drawn[:9]


# --- the settings ---------------------------------------------------------------------------------


def test_all_strategies_are_compared_unless_some_are_listed():
    every = [entry.label for entry in read([]).entries()]
    assert every == LABELS
    assert {"single", "ddp@accelerate", "fsdp@torch"} <= set(every)
    some = read(["--strategies", "dp, ddp@torch,dp@hand"]).entries()
    assert some == [
        ListedStrategy("dp", "dp", "hand"), ListedStrategy("ddp@torch", "ddp", "torch"),
        ListedStrategy("dp#2", "dp", "hand"),
    ]  # fmt: skip


def test_each_strategy_gets_the_settings_that_train_would_get():
    settings = read("--strategies single,dp --nproc 2 --mesh dp=2 --lr 0.5".split())
    single, dp = (settings.of(entry) for entry in settings.entries())
    assert type(dp) is Config
    assert (dp.strategy, dp.mesh, dp.nproc, dp.lr) == ("dp", {"dp": 2}, 2, 0.5)
    assert (single.strategy, single.mesh, single.nproc, single.lr) == ("single", None, None, 0.5)
    assert settings.axes(2) == {"dp": 2}


def test_a_setting_of_one_strategy_is_left_out_for_the_others():
    settings = read("--strategies dp,ddp --nproc 2 --bucket-mb 3".split())
    assert [settings.of(entry).bucket_mb for entry in settings.entries()] == [None, 3]


def test_smoke_changes_defaults_and_flags_override_it():
    smoke = read("--smoke --rounds 9".split())
    assert (smoke.size, smoke.batch, smoke.seq, smoke.rounds) == ("tiny", 8, 32, 9)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        settings = read(arguments)
        settings.axes(1, plain=settings.nproc is None)
    return str(caught.value)


FROM_LIST = "give, separated by commas, meshes such as pp2xfsdp2 or zero1:pp2xdp2, or " + one_of(
    LABELS, ""
)
BAD_FLAGS = [
    ("--strategies ddpp", f"no strategy 'ddpp' (--strategies); {FROM_LIST} (did you "
        "mean ddp?)"),
    ("--strategies dp,ddp@jax", f"no strategy 'ddp@jax' (--strategies); {FROM_LIST} "
        "(did you mean ddp?)"),
    ("--strategies=", f"no strategy '' (--strategies); {FROM_LIST}"),
    ("--strategies dp,", f"no strategy '' (--strategies); {FROM_LIST}"),
    ("--strategies single,dp --reference dpp", "reference 'dpp' is not listed (--reference); "
        "give single or dp (did you mean dp?), or name it in --strategies"),
    ("--rounds 7", "7 rounds are too few for a 99% confidence interval (--rounds); give 8 or "
        "more"),
    ("--nproc 4 --batch 30", "batch 30 is not a multiple of 4 data-parallel ranks x 1 "
        "micro-batches = 4 (--batch); give --batch 32"),
    ("--nproc 4 --mesh dp=2", "mesh dp=2 needs 2 processes, 4 were started (--mesh); type torchrun "
        "--nproc_per_node=2 ... or --nproc 2"),
    ("--strategies dp --nproc 2 --mesh tp=2", "none of the strategies runs on mesh tp=2 (--mesh); "
        "leave out --mesh, or name others in --strategies"),
    ("--strategies dp", "a comparison needs several processes, this is a single one "
        "(--strategies); add --nproc 4, or start it with torchrun --nproc_per_node=4"),
    (f"--strategies single --nproc {TOO_MANY}", f"nproc {TOO_MANY} is more than 4 ranks for each "
        f"of {cores()} cores (--nproc); give {TOO_MANY - 1} or less, or add --oversubscribe"),
    ("--strategies single,dp --nproc 2 --bucket-mb 3", "strategy single has no bucket_mb "
        f"(--bucket-mb); leave it out, or give {IN_BUCKETS}"),
    ("--strategy dp", "no flag '--strategy'; did you mean --strategies? --help lists them all"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "line"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_a_bad_command_line_is_refused_in_one_line(arguments, line):
    assert refusal(*arguments.split(" ")) == line


def test_a_strategy_that_cannot_use_the_mesh_does_not_stop_the_others():
    settings = read("--strategies single,dp --nproc 2 --mesh tp=2".split())
    single, dp = settings.entries()
    assert settings.misfit(single) == ""
    assert settings.misfit(dp) == (
        "does not fit --mesh tp=2: give --mesh dp=2,tp=2 or --strategy tp"
    )
    every = read("--nproc 2 --mesh tp=2".split()).entries()
    assert [entry.label for entry in every] == ["single", "tp", "tp@torch"]
    settings = read("--nproc 2 --mesh dp=2".split())
    assert not {"fsdp", "fsdp@torch"} & {entry.label for entry in settings.entries()}
    (fsdp,) = entries(["fsdp"])
    assert settings.misfit(fsdp).startswith("does not fit --mesh dp=2: give --mesh fsdp=2 or")


@pytest.mark.parametrize(
    ("arguments", "batch", "layers"),
    [
        ("--strategies dp,ddp --nproc 3", 33, None),
        ("--strategies dp,pp --nproc 8", 32, 8),  # as many blocks as stages, for both
        ("--strategies dp,pp --nproc 8 --layers 9", 32, 9),
        ("--strategies ddp,pp --nproc 2 --microbatches 5", 40, None),
        ("--nproc 3", 48, None),  # tp cannot divide 4 heads by 3: it is refused, the others run
    ],
)
def test_default_batch_and_layers_are_such_that_every_strategy_runs(arguments, batch, layers):
    settings = read([*arguments.split(), "--oversubscribe"])
    fitted = settings.fitted(settings.nproc)
    assert (fitted.batch, fitted.layers) == (batch, layers)
    assert fitted.axes(settings.nproc) == {"dp": settings.nproc}


def test_the_program_answers_a_mistake_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "compare.py", "--strategies", "zp"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.startswith("compare.py: error: no strategy 'zp' (--strategies); ")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# --- the report -----------------------------------------------------------------------------------


AT_PEAK = dict.fromkeys(KINDS, 0) | {"parameters": 4_000_000, "activations": 36_000_000}


def row(label: str, times: list[float], loss: float = 2.0, **changes) -> ContenderRow:
    strategy, _, impl = label.partition("@")
    made = ContenderRow(
        label=label, strategy=strategy, impl=impl or "hand", mesh={"dp": 4}, mix=label, about="",
        processes=4,
        rounds=[[t, t, 9 * t] for t in times],  # one step in three is interrupted
        losses=[5.0, loss], blocked=[0.25, 0.25], peak_memory_bytes=40_000_000,
        peak_memory={"at_peak": AT_PEAK, "own_peak": AT_PEAK},
        flops_per_step=2e9, model_flops_per_step=1e9, kernel_bytes=6_010_000.0,
        traffic=[Traffic("all_reduce dp", 4, 4e6, 6e6, 6e6), Traffic("send pp", 1, 8, 8, 8)],
    )  # fmt: skip
    return replace(made, **changes)


def report(*rows: ContenderRow) -> CompareReport:
    config = {"model": "gpt", "dtype": "float32", "steps": 3}
    return CompareReport(
        setting={
            "config": config, "mesh": {"dp": 4}, "parameters": 10**6, "world_size": 4, "threads": 1,
            "cores": 2, "data": {"name": "stdlib", "sha256": ""}, "versions": {"torch": "2"},
        },
        reference=rows[0].label, unit="tokens/s", batch=256, peak_flops_per_s=1e11, rows=[*rows],
        refused={"fsdp": "not on this mesh"},
    )  # fmt: skip


TIMES = [0.5, 0.5, 0.6, 0.5, 0.7, 0.5, 0.6, 0.5]


def test_the_numbers_of_a_row_follow_from_the_times_of_its_rounds():
    result = report(row("ddp", TIMES), row("dp", [2 * t for t in TIMES], blocked=None))
    summary = result.summary(result.rows[1])
    assert (summary["step_ms"], summary["ratio"], summary["verdict"]) == (1000, 0.5, "slower")
    assert summary["tokens_per_s"] == Quartiles.of([128 / t for t in TIMES]).median
    assert summary["mfu"] == pytest.approx(1e9 / 1.0 / 1e11)
    beyond = report(row("tp@torch", TIMES, model_flops_per_step=2e11))
    assert beyond.summary(beyond.rows[0])["mfu"] is None  # not 400%
    assert (summary["payload_bytes"], summary["sent_bytes"]) == (4_000_008, 6_000_008)
    assert (summary["blocked_ms"], summary["final_loss"]) == (None, 2.0)
    assert result.summary(result.rows[0])["verdict"] == "reference"
    assert result.summary(result.rows[0])["blocked_ms"] == 250


def printed(result: CompareReport, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(tables.speed(result))
        console.print(tables.cost(result))
        console.print(tables.memory(result))
        for line in tables.notes(result):
            console.print(line, highlight=False, markup=False)
    return capture.get()


def test_the_tables_fit_120_columns_and_a_narrow_terminal():
    twin = row("ddp@accelerate", TIMES, traffic=None, blocked=None, about="[bucket_cap_mb=25]")
    result = report(row("ddp", TIMES), twin, row("dp", [12345.6] * 8))
    wide = printed(result)
    assert max(map(len, wide.splitlines())) <= 120
    for word in ("ddp@accelerate ", "not counted here ", "all_reduce dp", "[bucket_cap_mb=25]"):
        assert word in wide
    assert "fsdp: refused: not on this mesh" in wide
    narrow = printed(result, 60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "\u2026" not in narrow, "no number is cut short"


def test_the_tables_show_whether_final_losses_differ():
    alike = printed(report(row("ddp", TIMES), row("dp", TIMES, loss=2.0001)))
    assert "differs" not in alike
    assert "final losses after 2 steps each are equal" in alike
    unlike = printed(report(row("ddp", TIMES), row("dp", TIMES, loss=2.1)))
    assert tables.losses(report(row("ddp", TIMES), row("dp", TIMES, loss=2.0001))).startswith("eq")
    assert "2.1 differs" in unlike
    assert "differ: dp's is the furthest from ddp's, relative difference 5.0e-02" in unlike


def test_the_files_that_are_written_can_be_read_again(tmp_path):
    result = report(row("ddp", TIMES), row("ddp@torch", TIMES, traffic=None, kernel_bytes=None))
    files.write(result, tmp_path)
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert [one["strategy"] for one in kept["strategies"]] == ["ddp", "ddp@torch"]
    assert kept["measured"][0]["rounds"] == result.rows[0].rounds
    with (tmp_path / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["strategy"] for line in lines] == ["ddp", "ddp@torch", "fsdp"]
    assert (lines[1]["sent_bytes"], lines[2]["refused"]) == ("", "not on this mesh")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 4


# --- on ranks -------------------------------------------------------------------------------------


def small(text: Path, **changes) -> Settings:
    values = {
        "data": str(text),
        "cache": str(text.parent),
        "seq": 16,
        "batch": 4,
        "dtype": "float64",
    }
    return Settings(**{"rounds": 8, "steps": 1, "threads": 1} | values | changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "source.txt"
    path.write_bytes(Path(subprocess.__file__).read_bytes()[:40_000])
    return path


def opened(settings: Settings):
    cache = Path(settings.cache)
    return open_data(settings.data, batch=settings.batch, seq=settings.seq, seed=0, cache_dir=cache)


@pytest.mark.slow  # verify's tests check each strategy by itself
@pytest.mark.ranks(2)
def test_all_strategies_take_the_same_steps_and_end_with_equal_losses(text, mesh):
    settings = small(text)
    result = measure.measure(
        settings, mesh, opened(settings), entries(["single", "dp", "ddp", "dp"])
    )
    assert (result is None) == (mesh.rank == 1)
    if result is None:
        return
    assert [one.label for one in result.rows] == ["single", "dp", "ddp", "dp#2"]
    single, dp, ddp, again = result.rows
    assert [one.processes for one in result.rows] == [1, 2, 2, 2]
    assert all(len(one.losses) == measure.WARM_UP + 8 for one in result.rows)
    assert all(result.loss_error(one) < 1e-10 for one in result.rows)
    assert dp.losses == again.losses
    assert all(len(one.rounds) == 8 and len(one.rounds[0]) == 1 for one in result.rows)
    assert (result.unit, result.batch) == ("tokens/s", 4 * 16)
    assert single.flops_per_step == dp.flops_per_step > 0
    gradients = 8 * result.setting["parameters"]
    assert single.traffic == []
    for one in (dp, ddp):
        assert all(traffic.collective.startswith("all_reduce dp") for traffic in one.traffic)
        payload = sum(traffic.payload for traffic in one.traffic)
        assert gradients < payload < gradients + 1000
        # 2 (N-1)/N at N = 2
        assert sum(traffic.formula for traffic in one.traffic) == pytest.approx(payload)
    assert sum(t.calls for t in ddp.traffic) < sum(t.calls for t in dp.traffic)
    # At least weights, gradients and two moments, and some activations.
    assert all(4 * gradients < one.peak_memory_bytes < 12 * gradients for one in result.rows)
    if sockets.sent_bytes() is not None:
        assert single.kernel_bytes < 1000
        assert dp.kernel_bytes == pytest.approx(dp.traffic[0].sent, rel=0.03)


@pytest.mark.nightly
@pytest.mark.ranks(4, timeout=120)
def test_mixes_take_the_same_steps_as_a_single_strategy_each_on_its_own_mesh(text, mesh):
    listed = "fsdp,fsdp2xtp2,pp2xfsdp2,zero1:pp2xdp2,zero1:dp2xtp2@torch"
    settings = small(text, batch=16, strategies=listed, schedule="zb", sequence_parallel=True)
    result = measure.measure(settings, mesh, opened(settings), settings.entries())
    if result is None:
        return
    assert [one.mix for one in result.rows] == [
        "fsdp@hand", "tp x fsdp@hand", "pp x fsdp@hand", "pp x zero1@hand"
    ]  # fmt: skip
    assert all(result.loss_error(one) < 1e-10 for one in result.rows)
    assert tables.losses(result) == "equal final losses"
    assert "its ZeroRedundancyOptimizer" in result.refused["zero1:dp2xtp2@torch"]
    assert result.summary(result.rows[1])["mesh"] == "fsdp=2,tp=2"
    over = [{t.collective.split()[1].strip(",") for t in one.traffic} for one in result.rows]
    assert [axes & {"pp", "fsdp", "dp", "tp"} for axes in over] == [
        {"fsdp"}, {"fsdp", "tp"}, {"pp", "fsdp"}, {"pp", "dp"}
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_strategy_that_cannot_run_is_refused_on_all_ranks_and_the_others_run(text, mesh):
    models = []

    def refuse(setup: Setup) -> Applied:
        models.append(weakref.ref(setup.model))
        raise UserError("not today")

    def refuse_on_rank_1(setup: Setup) -> Applied:
        if setup.axis.index == 1:
            raise UserError("not here")
        return dp.apply(setup)

    settings = small(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp, "apply", refuse)
        patch.setattr(ddp_torch, "apply", refuse_on_rank_1)
        listed = entries(["ddp", "dp", "ddp@torch"])
        result = measure.measure(settings, mesh, opened(settings), listed)
        with pytest.raises(UserError, match=r"^reference ddp cannot run: not today; give another"):
            measure.measure(replace(settings, reference="ddp"), mesh, opened(settings), listed)
        with pytest.raises(UserError, match=r"^none of the strategies can run; ddp: not today"):
            measure.measure(settings, mesh, opened(settings), listed[:1])
    if result is not None:
        assert result.refused == {"ddp": "not today", "ddp@torch": "not here"}
        assert ([one.label for one in result.rows], result.reference) == (["dp"], "dp")
    gc.collect()
    assert len(models) == 3
    assert not any(model() for model in models)


@pytest.mark.ranks(2)
def test_the_time_of_a_step_is_that_of_the_slowest_rank(mesh):
    def step() -> None:
        time.sleep(0.2 if mesh.rank == 1 else 0.15)

    for seconds in rounds.block(step, 2, mesh.world):
        assert 0.2 <= seconds < 0.33


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_ranks_without_work_do_not_time_out_in_a_long_block(mesh):
    short = init_mesh(timeout=1.0, dp=2)
    taken = rounds.block(lambda: time.sleep(0.6 * (mesh.rank == 0)), 3, short.world, alone=True)
    assert all(0.6 <= seconds < 0.9 for seconds in taken)


@pytest.mark.ranks(2)
@pytest.mark.skipif(sys.platform != "linux", reason="the byte count is Linux's")
def test_the_kernel_count_includes_what_this_rank_sends_but_not_the_barriers(mesh):
    import torch

    from dist_lab.comm import ops

    buffer = torch.zeros(1 << 20, dtype=torch.uint8)

    def send() -> None:
        sends = [(buffer, 1)] if mesh.rank == 0 else []
        receives = [(buffer, 0)] if mesh.rank == 1 else []
        for pending in ops.exchange(sends, receives, mesh["dp"]):
            pending.wait()

    sent = measure.sent_during(send, mesh)
    assert sent is not None
    payload = buffer.nbytes if mesh.rank == 0 else 0
    assert payload <= sent < payload + 150  # gloo's own headers


@pytest.mark.slow
def test_the_program_prints_tables_and_writes_its_files(text, tmp_path):
    out = tmp_path / "run"
    flags = "--nproc 2 --smoke --steps 1 --seq 16 --strategies single,dp --reference dp"
    place = ["--data", text, "--cache", tmp_path / "cache", "--out", out]
    done = run("compare.py", *flags.split(), *place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "round   8/8  single " in done.stdout
    assert "single: the whole batch on rank 0 alone" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 200
    names = {path.name for path in out.iterdir()}
    assert names == {
        "compare.json", "compare.csv", "compare.png", "report.html", "tensorboard",
    }  # fmt: skip
    kept = json.loads((out / "compare.json").read_text())
    assert kept["reference"] == "dp"
    assert kept["setting"]["world_size"] == 2


@pytest.mark.slow
def test_ctrl_c_leaves_the_rounds_that_were_measured(tmp_path):
    small = "--nproc 2 --layers 1 --seq 16 --batch 4 --steps 1 --rounds 100000 --strategies dp,ddp"
    running = subprocess.Popen(
        [sys.executable, "launch/compare.py", *small.split(), "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore the signal, and so would we.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    path, deadline = tmp_path / "compare.json", time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 130, errors
    report = json.loads(path.read_text())
    counts = {row["rounds"] for row in report["strategies"]}
    assert len(counts) == 1
    assert min(counts) >= fewest_rounds()
    assert [row["strategy"] for row in report["strategies"]] == ["dp", "ddp"]
