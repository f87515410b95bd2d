"""launch/train.py as a user starts it, and the files that it writes."""

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import run
from torch.nn.functional import cross_entropy

import dist_lab
from dist_lab.data import open_data
from dist_lab.errors import TrainingDiverged, UserError
from dist_lab.mesh import groups
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe import flops
from dist_lab.programs.cli import setup
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.train import command as commands
from dist_lab.programs.train.checkpoints import Checkpoints
from dist_lab.programs.train.loop import (
    OPTIMIZERS,
    OPTIONS,
    evaluate,
    learning_rate,
    make_optimizer,
    train,
)
from dist_lab.programs.train.meter import Meter

ROOT = Path(__file__).parents[3]
ROW = {
    "step", "loss", "grad_norm", "lr", "step_ms", "samples_per_s", "tokens_per_s",
    "comm_payload_bytes", "comm_sent_bytes", "comm_ms", "peak_memory_bytes",
}  # fmt: skip
SMALL = "--size tiny --batch 8 --seq 32 --log-every 1".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text to learn: 60 kB of Python source."""
    path = tmp_path_factory.mktemp("data") / "source.txt"
    path.write_bytes(Path(subprocess.__file__).read_bytes()[:60_000])
    return path


def place(text, tmp_path):
    return [*SMALL, "--data", text, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_a_mix_names_its_strategies_first_and_how_to_verify_it_last():
    config = parse("--strategy zero1 --mesh pp=2,dp=2 --nproc 4 --schedule zb".split())
    info = {
        "config": config.to_dict(), "strategies": "pp x zero1@hand", "mesh": {"pp": 2, "dp": 2},
        "world_size": 4, "threads": 1, "cores": 2, "parameters": 1e6,
        "data": {"name": "stdlib", "sha256": "", "image": None, "tokenizer_sha256": ""},
    }  # fmt: skip
    assert commands.opening_line(info).startswith("pp x zero1@hand on pp=2,dp=2: 4 ranks x 1 thr")
    assert commands.next_line(config, 4).endswith(
        "launch/verify.py --strategy zero1 --nproc 4 --mesh pp=2,dp=2 --schedule zb"
    )
    many = parse("--mesh pp=2,dp=2,fsdp=2,tp=64 --size 124m".split())
    assert commands.next_line(many, 512).endswith(
        "launch/verify.py --nproc 512 --mesh pp=2,dp=2,fsdp=2,tp=64 --size 124m --oversubscribe"
    )


def test_a_run_writes_metrics_a_summary_and_tensorboard_events(text, tmp_path):
    out = tmp_path / "run"
    flags = "--nproc 2 --strategy dp --steps 6 --val-every 3"
    done = run("train.py", *flags.split(), *place(text, tmp_path))
    assert done.returncode == 0, done.stderr
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() - {"val_loss"} == ROW for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(256), abs=0.8)
    assert rows[-1]["loss"] < rows[0]["loss"]

    summary = json.loads((out / "summary.json").read_text())
    parameters = summary["parameters"]
    # Every gradient once, one byte per tensor for whether it was used, and a few numbers.
    gradients = 4 * parameters
    assert gradients < rows[-1]["comm_payload_bytes"] < gradients + 200
    assert rows[-1]["comm_sent_bytes"] == rows[-1]["comm_payload_bytes"]  # 2 (N-1)/N at N = 2
    # At least the weights, gradients and Adam's two moments, and some activations.
    assert 4 * gradients < rows[-1]["peak_memory_bytes"] < 12 * gradients
    by_kind = summary["peak_memory"]
    assert sum(by_kind["at_peak"].values()) == summary["peak_memory_bytes"]
    assert by_kind["own_peak"]["parameters"] == by_kind["own_peak"]["gradients"] == gradients
    assert "peak memory " in done.stdout
    assert summary["world_size"] == 2
    assert summary["mesh"] == {"dp": 2}
    assert summary["final_loss"] == rows[-1]["loss"]
    assert summary["final_val_loss"] == rows[-1]["val_loss"]
    per_second = summary["model_flops_per_step"] / summary["median"]["step_ms"] * 1e3
    assert summary["mfu"] == pytest.approx(per_second / summary["peak_flops_per_s"])
    assert list(out.glob("events.out.tfevents.*"))
    assert "dp@hand on dp=2: 2 ranks" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(
        "next: is it equal to one process? python launch/verify.py --strategy dp --nproc 2"
    )
    assert done.stderr == ""


LAYOUTS = {
    "single": (1, "--strategy single"),
    "dp": (4, "--strategy dp"),
    "accumulate": (2, "--strategy dp --microbatches 4"),
}


@pytest.mark.slow  # the parity tests cover each strategy; this covers whole runs
@pytest.mark.ranks(4)
def test_every_layout_logs_the_same_losses_on_the_same_data(text, tmp_path, mesh):
    for name, (size, flags) in LAYOUTS.items():
        groups.disconnect()
        if mesh.rank >= size:
            continue
        if size > 1:
            store = groups.file_store(str(tmp_path / f"{name}.store"), size)
            groups.connect(store, mesh.rank, size, timeout=mesh.timeout)
        words = [*flags.split(), "--data", str(text), "--cache", str(tmp_path / "cache")]
        place = ["--steps", "4", "--dtype", "float64", "--out", str(tmp_path / name)]
        config = parse([*SMALL, *words, *place])
        assert commands.train(config, init_mesh(**config.axes(size))) == 0
    if mesh.rank == 0:
        losses = {
            name: [(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name)]
            for name in LAYOUTS
        }
        for name in LAYOUTS:
            for a, b in zip(losses[name], losses["single"], strict=True):
                assert a == pytest.approx(b, rel=1e-10), name


@pytest.mark.slow
def test_the_same_command_runs_under_torchrun(text, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = "launch/train.py --strategy dp --steps 2 --log-collectives --timeline 2:2 --profile 2:2"
    command = [*torchrun, *flags.split(), *map(str, place(text, tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "timeline.json").exists()
    assert (tmp_path / "run" / "profile" / "merged.json").exists()
    logged = [line for line in done.stderr.splitlines() if line.startswith("rank 1 | finish")]
    assert any("all_reduce" in line and "lm_head.weight" in line for line in logged)


def test_a_run_that_diverges_stops_all_ranks_with_one_line(text, tmp_path):
    flags = "--nproc 2 --strategy dp --steps 50 --warmup 0 --optimizer sgd --lr 1e30 --clip 0"
    done = run("train.py", *flags.split(), *place(text, tmp_path))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("train.py: error: step ")
    assert "first in the gradient of" in line
    assert "on rank 0" in line
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.ranks(2)
def test_a_setting_that_differs_between_ranks_is_named(text, tmp_path, mesh):
    flags = ["--strategy", "dp", "--lr", f"{mesh.rank + 1}", "--data", str(text)]
    config = parse([*SMALL, *flags, "--cache", str(tmp_path), "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"rank 1 was started with lr=2"):
        commands.train(config, mesh)


@pytest.mark.slow
def test_a_setting_that_differs_between_started_ranks_is_named(text, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2"}
    with __import__("socket").socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place["MASTER_PORT"] = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [
                sys.executable, "launch/train.py", *SMALL, "--strategy", "dp", "--lr", lr,
                "--data", str(text), "--cache", str(tmp_path / "cache"),
                "--out", str(tmp_path / "run"),
            ],
            cwd=ROOT, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank, lr in enumerate(["0.001", "0.002"])
    ]  # fmt: skip
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    assert "was started with lr=" in errors[0]
    assert "Traceback" not in "".join(errors)


def test_validation_is_the_mean_over_every_held_out_batch(text, tmp_path):
    config = parse([*SMALL, "--dtype", "float64"])
    data = open_data(str(text), batch=8, seq=32, seed=0, cache_dir=tmp_path)
    job = setup.build(config, init_mesh(), data)
    batches = [data.validation(i, slice(0, 8)) for i in range(data.validation_batches)]
    assert len(batches) > 1
    losses = [
        cross_entropy(job.model(inputs).flatten(0, 1), targets.flatten()).item()
        for inputs, targets in batches
    ]
    values = evaluate(job, data, config, slice(0, 8))
    assert values == {"val_loss": pytest.approx(sum(losses) / len(losses), rel=1e-12)}


def test_a_failed_run_leaves_no_prefetch_thread(text, tmp_path):
    config = parse([*SMALL, *"--steps 9 --lr 1e30 --clip 0 --optimizer sgd --warmup 0".split()])
    data = open_data(str(text), batch=8, seq=32, seed=0, cache_dir=tmp_path)
    job = setup.build(config, init_mesh(), data)
    optimizer = make_optimizer(job, config)
    checkpoints = Checkpoints(job, optimizer, config, data, tmp_path)
    with pytest.raises(TrainingDiverged, match="step ") as raised:  # keeps the frames alive
        train(job, optimizer, data, config, checkpoints, [])
    assert [t for t in threading.enumerate() if t.name.startswith("prefetch")] == []
    assert raised.value.__traceback__ is not None


@pytest.mark.slow
def test_images_train_in_the_same_loop_and_are_reported_as_images(tmp_path):
    flags = "--nproc 2 --strategy dp --model vit --batch 8 --steps 3 --log-every 1 --out"
    done = run("train.py", *flags.split(), tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert all(row.keys() - {"val_loss", "val_accuracy"} == ROW - {"tokens_per_s"} for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(34), abs=1)
    assert 0 <= rows[-1]["val_accuracy"] <= 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_val_accuracy"] == rows[-1]["val_accuracy"]
    assert summary["config"]["data"] == summary["data"]["name"] == "glyphs"
    assert "8 images of 1 x 28 x 28 (--seq is unused) a step" in done.stdout
    accuracy = rows[-1]["val_accuracy"]
    (closing,) = [line for line in done.stdout.splitlines() if ", MFU " in line]
    assert f"({accuracy:.1%} right)" in closing
    assert "samples/s" in closing


@pytest.mark.slow_unless(lambda model: model == "vit")
@pytest.mark.parametrize("model", ["vit", "resnet18"])
def test_accuracy_is_the_fraction_of_held_out_images_classified_right(model):
    config = parse(["--model", model, "--batch", "4", "--dtype", "float64"])
    data = setup.open_run(config, init_mesh())
    job = setup.build(config, init_mesh(), data)
    job.model.eval()
    batches = [data.validation(i, slice(0, 4)) for i in range(data.validation_batches)]
    logits = torch.cat([job.model(inputs) for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    values = evaluate(job, data, config, slice(0, 4))
    assert values["val_loss"] == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-12)
    assert values["val_accuracy"] == (logits.argmax(1) == targets).double().mean().item()


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda model, dtype: (model == "vit") == (dtype == "bfloat16"))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("model", ["vit", "resnet18"])
def test_an_image_model_trains_in_every_dtype(model, dtype, tmp_path):
    steps = ["--data", "fake:2x12x12", "--batch", "2", "--steps", "2", "--clip", "0"]
    config = parse(["--model", model, "--dtype", dtype, *steps])
    data = setup.open_run(config, init_mesh())
    assert data.batch(0, slice(0, 1))[0].dtype == setup.parameter_dtype(config)
    job = setup.build(config, init_mesh(), data)
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    optimizer = make_optimizer(job, config)
    checkpoints = Checkpoints(job, optimizer, config, data, tmp_path)
    summary = train(job, optimizer, data, config, checkpoints, [])
    assert math.isfinite(summary["final_val_loss"])
    changed = [name for name, p in job.model.named_parameters() if not torch.equal(p, before[name])]
    assert set(changed) >= {name for name in before if name.endswith("weight")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_fused_optimizer_takes_the_same_steps(dtype):
    torch.manual_seed(0)
    start, gradient = torch.randn(50, 50, dtype=dtype), torch.randn(50, 50, dtype=dtype)
    ends = []
    for options in (OPTIONS["adamw"], {}):
        weight = torch.nn.Parameter(start.clone())
        optimizer = OPTIMIZERS["adamw"]([weight], lr=1e-2, weight_decay=0.1, **options)
        for step in range(5):
            weight.grad = gradient * (step + 1)
            optimizer.step()
        ends.append(weight.detach())
    eps = torch.finfo(dtype).eps  # the error is the rounding of steps as large as the weight
    torch.testing.assert_close(*ends, rtol=16 * eps, atol=eps)


def test_weight_decay_applies_to_matrices_but_not_to_norms_and_biases():
    config = parse(["--model", "vit", "--weight-decay", "0.3", "--data", "fake:2x12x12"])
    job = setup.build(config, init_mesh(), setup.open_run(config, init_mesh()))
    optimizer = make_optimizer(job, config)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    decays = {name: decay[id(p)] for name, p in job.model.named_parameters()}
    assert decays == {n: 0.3 if p.dim() > 1 else 0.0 for n, p in job.model.named_parameters()}
    assert set(decays.values()) == {0.3, 0.0}


def test_medians_leave_out_the_steps_that_are_measured_for_memory(monkeypatch):
    monkeypatch.setattr(flops, "calibrate", lambda dtype, device: torch.ones(3))
    config = parse(["--batch", "4"])
    job = dist_lab.parallelize(torch.nn.Linear(2, 2), init_mesh(), "single")
    meter = Meter(job, job.optimizer(torch.optim.SGD, lr=0.1))
    tally = job.mesh.comm.ledger.total
    meter.steps = [(9.0, replace(tally, blocked=9.0))] * 2 + [(1.0, replace(tally, blocked=0.5))]
    median = meter.summary(config, 100)["median"]
    assert (median["step_ms"], median["comm_ms"]) == (1000, 500)
    assert (median["samples_per_s"], median["tokens_per_s"]) == (4, 100)
    meter.steps = meter.steps[:2]  # only measured steps
    assert meter.summary(config, 100)["median"]["step_ms"] == 9000


def test_the_learning_rate_warms_up_and_then_follows_a_cosine_down_to_a_tenth():
    config = parse("--lr 1 --warmup 10 --steps 110".split())
    assert learning_rate(1, config) == pytest.approx(0.1)
    assert learning_rate(10, config) == 1
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)
