"""Live bytes over a step: the peak is exact, and each tensor at the peak has an owner."""

import pytest
import torch
from models import batch, gpt
from torch import nn

from dist_lab.compose import parallelize
from dist_lab.loss import cross_entropy_sum
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe import memory_series
from dist_lab.observe.memory import KINDS, measured


def entry_of(job, optimizer, x, y):
    with measured(job, optimizer) as live:
        job.run([(x, y)], lambda out, target: cross_entropy_sum(out, target))
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    return live.by_kind(), memory_series.of_rank(live, rank=0, place="", step=2)


def check(peak, entry):
    at, series = entry["at"], entry["bytes"]
    assert list(series) == list(KINDS)
    assert at == sorted(set(at))
    assert len(at) <= memory_series.MOST
    assert at[-1] <= entry["changes"]
    totals = [sum(series[kind][i] for kind in KINDS) for i in range(len(at))]
    found = entry["peak"]
    assert found["total"] == peak.total == max(totals) == totals[at.index(found["at"])]
    assert found["by_kind"] == peak.at_peak
    assert sum(row["bytes"] for row in found["alive"]) == peak.total
    assert min(min(values) for values in series.values()) >= 0


def test_everything_at_the_peak_has_an_owner():
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 4, bias=False))
    job = parallelize(model, init_mesh(), "single", units=["0", "2"])
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    x, y = torch.ones(5, 6), torch.zeros(5, dtype=torch.int64)
    for _ in range(2):
        peak, entry = entry_of(job, optimizer, x, y)
    check(peak, entry)
    alive = {(row["kind"], row["of"]): row["bytes"] for row in entry["peak"]["alive"]}
    for kind in ("parameters", "optimizer"):
        assert alive[kind, "0.weight"] == 240
        assert alive[kind, "2.weight"] == 160
    assert ("activations", "0") in alive, "the output of the first layer"
    phases = [phase for _, phase, _ in entry["phases"]]
    assert phases.index("forward") < phases.index("backward")


@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp", "tp"])
@pytest.mark.ranks(2)
def test_the_series_of_every_rank_is_gathered(strategy, mesh):
    axis = {"fsdp": "fsdp", "tp": "tp"}.get(strategy, "dp")
    real = init_mesh(timeout=mesh.timeout, **{axis: 2})
    job = parallelize(gpt(layers=4), real, strategy, units=["Block"])
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-3)
    for _ in range(2):
        peak, entry = entry_of(job, optimizer, *batch(0, rows=2))
    check(peak, entry)
    ranks = memory_series.gather(entry, real)
    assert len(ranks) == 2
    assert ranks[mesh.rank]["bytes"] == entry["bytes"]
    alive = entry["peak"]["alive"]
    assert any(row["kind"] == "activations" and "model.layers" in row["of"] for row in alive)
