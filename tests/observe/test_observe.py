"""Floating-point operations of a run, the measured peak of the machine, and the sinks."""

import json

import pytest
import torch
from models import VOCAB, batch, gpt
from torch import nn

from dist_lab.observe import flops
from dist_lab.observe.memory import LiveBytes
from dist_lab.observe.sinks import open_sinks
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_machines_peak_is_measured_at_the_dtype_of_the_run(dtype):
    rates = flops.calibrate(dtype, torch.device("cpu"), windows=3, seconds=0.01)
    assert rates.shape == (3,)
    assert rates.min() > 1e8
