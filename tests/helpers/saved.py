"""One small model in many layouts, saved in one and loaded in another."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dist_lab
from dist_lab.checkpoint.entries import model_entries
from dist_lab.checkpoint.optimizer_state import optimizer_entries
from dist_lab.layout.layout import to_json
from dist_lab.loss import cross_entropy_sum
from dist_lab.mesh.mesh import init_mesh
from dist_lab.optim import Muon, Shampoo
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.matrix import models

ROWS, LAYERS = 16, 4
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "muon": (Muon, {"lr": 1e-3}),
    "shampoo": (Shampoo, {"lr": 1e-3, "every": 2}),
}


@dataclass(frozen=True)
class Lay:
    """A layout: a mesh, a strategy if the mesh does not say it, and options."""

    name: str
    axes: dict[str, int]
    strategy: str | None = None
    impl: str = "hand"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return int(torch.tensor([*self.axes.values()]).prod())


def _lays() -> dict[str, Lay]:
    rows = [
        Lay("one", {"dp": 1}, "single"),
        Lay("dp2", {"dp": 2}, "dp"),
        Lay("ddp3", {"dp": 3}),
        Lay("zero1-3", {"dp": 3}, "zero1"),
        Lay("zero1-4", {"dp": 4}, "zero1"),
        Lay("zero2-2", {"dp": 2}, "zero2"),
        Lay("fsdp2", {"fsdp": 2}),
        Lay("fsdp5", {"fsdp": 5}),
        Lay("fsdp8", {"fsdp": 8}),
        Lay("hsdp2x2", {"dp": 2, "fsdp": 2}),
        Lay("tp2", {"tp": 2}),
        Lay("tp4", {"tp": 4}),
        Lay("pp2", {"pp": 2}, options={"schedule": "1f1b"}),
        Lay("pp2-zbv", {"pp": 2}, options={"schedule": "zbv"}),
        Lay("pp4-gpipe", {"pp": 4}, options={"schedule": "gpipe"}),
        Lay("fsdp2xtp2", {"fsdp": 2, "tp": 2}),
        Lay("zero1:pp2xdp2", {"pp": 2, "dp": 2}, "zero1", options={"schedule": "1f1b"}),
        Lay("pp2xfsdp2", {"pp": 2, "fsdp": 2}, options={"schedule": "1f1b"}),
        Lay("pp2xtp2", {"pp": 2, "tp": 2}, options={"schedule": "zb"}),
        Lay("pp2xfsdp2xtp2", {"pp": 2, "fsdp": 2, "tp": 2}, options={"schedule": "1f1b"}),
        Lay("dp2xfsdp2xtp2", {"dp": 2, "fsdp": 2, "tp": 2}),
        Lay("ddp2@torch", {"dp": 2}, impl="torch"),
        Lay("zero1-2@torch", {"dp": 2}, "zero1", "torch"),
        Lay("fsdp3@torch", {"fsdp": 3}, impl="torch"),
        Lay("tp2@torch", {"tp": 2}, impl="torch"),
        Lay("pp2@torch", {"pp": 2}, impl="torch", options={"schedule": "1f1b"}),
        Lay("ddp2@accelerate", {"dp": 2}, impl="accelerate"),
    ]
    return {row.name: row for row in rows}


LAYS = _lays()


def build(lay: Lay, model: str = "gpt", seed: int = 0, optimizer: str = "adamw"):
    """A job on this rank, and its optimizer. Another seed: other weights, to be overwritten."""
    mesh = init_mesh(**lay.axes)
    module = models.build(model, LAYERS, torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + seed)
    options = {"units": (*module.units, *module.ends), **lay.options}
    if "pp" in lay.axes:
        options["example_inputs"] = models.batch(model, 0, 2, torch.float64)[0]
    cls, arguments = OPTIMIZERS[optimizer]
    groups = None
    if optimizer in ("muon", "shampoo"):
        groups = dist_lab.optim.matrices(module)
    job = dist_lab.parallelize(module, mesh, lay.strategy, lay.impl, **options)
    return job, job.optimizer(cls, groups=groups, **arguments)


def train(job, optimizer, first: int, last: int, model: str = "gpt") -> list[float]:
    """Steps first ... last - 1. Returns their losses."""
    losses = []
    for step in range(first, last):
        data = job.mesh.data
        rows = batches.slice_rows(models.batch(model, step, ROWS, torch.float64), data.size)[
            data.index
        ]
        total = job.count(rows[1].numel())
        pairs = batches.slice_rows(rows, 2)
        losses.append(job.run(pairs, lambda out, y, n=total: cross_entropy_sum(out, y) / n))
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    return losses


def save(
    rank: int, lay: Lay, folder: str, model: str, optimizer: str, more: int = 1
) -> list[float]:
    """Train two steps, save, and take `more` steps whose losses another layout must repeat.

    Also writes which entries each rank has: the layouts that other tests compare in process.
    """
    job, optim = build(lay, model, optimizer=optimizer)
    train(job, optim, 0, 2, model)
    path = job.save(folder, optim, step=2)
    entries = [*model_entries(job), *optimizer_entries(optim, job)]
    held = {
        e.name: [list(e.shape), [[[s.start, s.stop] for s in box] for box in e.boxes]]
        for e in entries
    }
    Path(folder, f"held-{rank}.json").write_text(json.dumps(held))
    if rank == 0:
        layouts = {name: to_json(layout) for name, layout in job.layouts.items()}
        Path(folder, "layouts.json").write_text(json.dumps(layouts))
    assert path.name == "step-00000002"
    return [*train(job, optim, 2, 2 + more, model)]


def load(rank: int, lay: Lay, folder: str, model: str, optimizer: str, more: int = 1):
    """Load into a job with other weights. Returns its full state, and losses of further steps."""
    job, optim = build(lay, model, seed=1, optimizer=optimizer)
    job.load(folder, optim)
    full = job.full_state_dict()
    again = job.save(f"{folder}/again-{lay.name}", optim, step=2)
    losses = train(job, optim, 2, 2 + more, model)
    return {n: t.numpy() for n, t in full.items()} if rank == 0 else None, str(again), losses
