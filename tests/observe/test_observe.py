"""Floating-point operations of a run, the measured peak of the machine, and the sinks."""

import json
import shutil
from contextlib import nullcontext, suppress

import pytest
import torch
from finished_run import summary_of
from models import VOCAB, batch, gpt
from torch import nn

from dist_lab.errors import MachineError
from dist_lab.observe import flops
from dist_lab.observe.memory import LiveBytes
from dist_lab.observe.sinks import closing_line, drop_rows, open_sinks
from dist_lab.optim import Muon
from dist_lab.transforms.recompute import recompute


def test_counted_operations_equal_the_formula():
    # 2 per multiply-add, 3 passes over each matrix, 7 T x T x Dh matmuls of attention per head.
    rows, seq, heads, width, head_dim, layers = 8, 6, 4, 32, 8, 2
    model = gpt(torch.float32)
    inputs, targets = batch(0, rows, seq)
    with flops.counter() as counter:
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    matrices -= VOCAB * width  # the embedding is a lookup
    attention = 7 * 2 * rows * heads * seq * seq * head_dim * layers
    assert counter.get_total_flops() == 6 * matrices * rows * seq + attention


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("matrices", ["adamw", "one"])
def test_operations_of_the_model_are_neither_the_optimizers_nor_recomputed_ones(every, matrices):
    model = gpt(torch.float32)
    recompute(model, {f"layers.{n}": block for n, block in model.model.layers.items()}, every)
    inputs, _ = batch(0, 4)
    groups = [
        {"params": [p], "matrices": matrices if p.dim() == 2 else "adamw"}
        for p in model.parameters()
    ]
    optimizer = Muon(groups, lr=1e-3)
    with flops.counter() as counter:
        gpt(torch.float32)(inputs).sum().backward()
    with flops.counted(model) as found:
        model(inputs).sum().backward()
        optimizer.step()
    assert found.model == counter.get_total_flops()
    assert (found.total > found.model) == (every == 1 or matrices == "one")


def test_counting_operations_keeps_no_activation_alive():
    # torch's own module tracker keeps recomputed activations alive.
    model = gpt(torch.float32)
    recompute(model, {f"layers.{n}": block for n, block in model.model.layers.items()}, 1)
    peaks = []

    def backward(step):
        inputs, targets = batch(step, 4)
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()

    backward(0)  # so that gradients exist from the start
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    for microbatches in (1, 8):
        with LiveBytes(tensors) as live, flops.counter():
            for step in range(microbatches):
                backward(step)
        peaks.append(live.by_kind().own["activations"])
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.Mish()])
def test_counting_operations_changes_no_bit_of_a_gradient(activation):
    """Else a run that resumes, and counts another step, would not be the run that was killed."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 300), activation, torch.nn.Linear(300, 1))
    x, gradients = torch.randn(64, 40), []
    for counted in (False, True):
        model.zero_grad()
        with flops.counter() if counted else nullcontext():
            model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step, loss 1.6"), (2, "2 steps, loss 1.6")])
def test_the_last_line_of_a_run_begins_with_its_steps(steps, words):
    assert closing_line(summary_of(steps=steps)).startswith(words)


def test_the_last_line_of_a_librarys_run_counts_no_waiting_that_it_cannot_see():
    """Its ranks wait inside the library: ours are the waits for a loss."""
    assert "of 200 ms a step waiting for others; " in closing_line(step_of("", 200))
    line = closing_line(step_of("torch ddp", 200))
    assert ", 200 ms a step; " in line
    assert "waiting" not in line


def step_of(about, ms):
    summary = summary_of(about=about)
    return summary | {"median": summary["median"] | {"step_ms": ms}}


def test_rows_are_written_as_json_lines_and_tensorboard_scalars(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = open_sinks(tmp_path, steps=2)
    row = {"loss": 1.5, "grad_norm": 0.5, "tokens_per_s": 10.0, "step_ms": 3.0, "comm_ms": 1.0}
    for step in (1, 2):
        for sink in sinks:
            sink.tick(step)
            sink.row({"step": step} | row)
    for sink in sinks:
        sink.close(None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1} | row, {"step": 2} | row]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5), (2, 1.5)]
    assert "step     2/2  loss 1.5000" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists(), "a run that failed has no summary"


@pytest.mark.parametrize("event", ["row", "memory", "close"])
def test_a_disk_that_is_full_is_one_line(tmp_path, event):
    sink = open_sinks(tmp_path, steps=2)[0]
    sink.file.close()
    sink.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    if event != "row":
        shutil.rmtree(tmp_path)  # any other error of a disk
    with pytest.raises(MachineError, match=r"cannot write to .*; make room, or give"):
        getattr(sink, event)({"step": 1})
    with suppress(OSError):
        sink.file.close()
    sink.close(None)  # the run has failed: another error would hide the first


def test_a_run_that_resumes_has_each_step_once_in_both_logs(tmp_path):
    """Killed after step 5, while a line was being written, and resumed after step 3."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log(steps, first=0):
        sinks = open_sinks(tmp_path, steps=6, plain=True, first=first)[:2]
        for step in steps:
            for sink in sinks:
                sink.row({"step": step, "loss": step + first / 10})
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        for sink in sinks:
            sink.close(None)
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}, "not flushed"

    log([1, 2, 3, 4, 5])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (tmp_path / "summary.json").write_text("of a run that had ended")
    (events,) = tmp_path.glob("events*")
    events.write_bytes(events.read_bytes()[:-3])  # its last event was torn, too
    log([4, 5, 6], first=3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.3), (5, 5.3), (6, 6.3)]
    assert [(row["step"], row["loss"]) for row in rows] == expected
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, round(e.value, 3)) for e in scalars] == expected
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"metrics", "events"}


def test_rows_are_kept_as_they_are_if_none_is_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    drop_rows(path, 2)
    assert path.stat() == before
    drop_rows(path, 0)
    assert path.read_text() == ""
    drop_rows(tmp_path / "no such file", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_machines_peak_is_measured_at_the_dtype_of_the_run(dtype):
    rates = flops.calibrate(dtype, torch.device("cpu"), windows=3, seconds=0.01)
    assert rates.shape == (3,)
    assert rates.min() > 1e8
