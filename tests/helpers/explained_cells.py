"""Takes two steps of a cell of the matrix on real ranks, and compares each with its dry run."""

import gc
import tempfile
from pathlib import Path

import torch

from dist_lab.compose import parallelize
from dist_lab.loss import cross_entropy_sum
from dist_lab.mesh import groups
from dist_lab.mesh.mesh import dry_run, init_mesh
from dist_lab.observe import memory
from dist_lab.programs.explain.shapes_only import shapes_only
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.matrix import cell as cells
from dist_lab.programs.verify.matrix import models

SMALL = 256  # bytes: room for the flags of a cell's parameters; all else has no values


def differences(rank, cell) -> list[str]:
    """What this rank counts in a step that its dry run does not, in words; [] if all is equal."""
    real = steps(cell, init_mesh(**cell.axes))
    groups.disconnect()  # from here on each rank is a single process, as explain.py is
    gc.collect()
    with dry_run(cell.axes, rank) as mesh, shapes_only(mesh, SMALL):
        dry = steps(cell, mesh)
    return [
        f"rank {rank} step {number} {what}: {dry_one[what]} is not {real_one[what]}"
        for number, (dry_one, real_one) in enumerate(zip(dry, real, strict=True), 1)
        for what in real_one
        if dry_one[what] != real_one[what]
    ]


def steps(cell, mesh) -> list[dict]:
    """The calls and the memory of two steps."""
    with tempfile.TemporaryDirectory(prefix="dist_lab-") as folder:
        options = cells.arguments(cell, mesh, Path(folder))
        clip = options.pop("clip")
        model = models.build(cell.model, cell.layers, cells.stored_dtype(cell))
        job = parallelize(model, mesh, cell.strategy, broadcast=False, seed=0, **options)
        optimizer = job.optimizer(torch.optim.AdamW, lr=1e-3)
        return [step(cell, job, optimizer, number, clip) for number in range(2)]


def step(cell, job, optimizer, number, clip) -> dict:
    mesh = job.mesh
    rows = batches.slice_rows(cells.batch(cell, number), mesh.data.size)[mesh.data.index]
    with memory.measured(job, optimizer) as live, mesh.comm.ledger.recording() as calls:
        total = job.count(batches.count(rows[1]))
        pairs = batches.slice_rows(rows, cell.microbatches)
        job.run(pairs, lambda out, target: cross_entropy_sum(out, target) / total)
        job.finish()
        job.clip_grad_norm(clip)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    peak = live.by_kind()
    sent = [(c.phase, c.op, c.axis, c.size, c.unit, c.payload, c.sent) for c in calls]
    return {"calls": sent, "at_peak": dict(peak.at_peak), "own_peak": dict(peak.own)}
