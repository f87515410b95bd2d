"""What one rank does for a cell: train it in parallel, and compare it with one process.

Many cells compare with the same training in one process. A rank stays alive from cell to cell, and
keeps the steps of the last few references.
"""

import copy
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lab.compose import parallelize
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.loss import Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import State, error
from dist_lab.programs.verify.engine import verify
from dist_lab.programs.verify.matrix import models
from dist_lab.programs.verify.matrix.cells import FILE, SCHEDULE_FILE, Cell
from dist_lab.programs.verify.matrix.results import Result
from dist_lab.programs.verify.reference import one_process

STEPS = 3
OPTIMIZER: dict[str, Any] = {"optimizer": torch.optim.AdamW, "options": {"lr": 1e-3}}


def run(rank: int, cell: Cell) -> Result:
    """Run a cell on this rank. The result is the same on every rank. Collective."""
    axes: dict[str, Any] = cell.axes
    try:
        mesh = init_mesh(**axes)
        with tempfile.TemporaryDirectory(prefix="dist_lab-") as folder:
            return compared(cell, mesh, Path(folder))
    except UserError as refusal:
        return Result(str(cell), cell.ranks, "refused", str(refusal))


def compared(cell: Cell, mesh: Mesh, folder: Path) -> Result:
    """Train the cell in parallel and in one process, and compare the two."""
    keywords = arguments(cell, mesh, folder)
    report = verify(
        functools.partial(models.build, cell.model, cell.layers, stored_dtype(cell)),
        functools.partial(batch, cell),
        mesh,
        cell.strategy,
        steps=STEPS,
        microbatches=cell.microbatches,
        reference=reference(key_of(cell), mesh.device),
        **keywords,
        **OPTIMIZER,
    )
    worst: dict[str, float] = {}
    for c in report.comparisons:
        if c.judged:
            worst[c.quantity] = max(worst.get(c.quantity, 0.0), c.error)
    count, why = len(report.comparisons), "" if report.equal else report.sentence()
    if "round-trip" in cell.options:
        errors = round_trip(cell, mesh, keywords)
        wrong = [name for name, e in errors.items() if not e <= report.tolerance]
        why = why or ("not equal: " + ", ".join(wrong) if wrong else "")
        worst, count = worst | {"round trip": max(errors.values())}, count + len(errors)
    return Result(str(cell), cell.ranks, "not equal" if why else "equal", why, worst, count)


def arguments(cell: Cell, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """The keyword arguments of `verify` that the cell means, but for its batches.

    Args:
        folder: empty, for files of this rank.
    """
    built = models.build(cell.model, cell.layers, torch.float32, "meta")
    keywords = {"units": (*built.units, *built.ends), "clip": 0.5, **cell.keywords()}
    if cell.schedule == FILE:
        path = folder / "schedule.csv"
        path.write_text(SCHEDULE_FILE)
        keywords["schedule"] = str(path)
    elif cell.schedule:
        keywords["schedule"] = cell.schedule
    if cell.schedule:
        keywords["example_inputs"] = batch(cell, 0, rows=2)[0]
    if cell.model in models.DROPOUT:
        keywords["dropout"] = "exact"
    if "offload" in cell.options:
        keywords["offload"] = str(folder)
    if cell.is_low:
        keywords["param_dtype"] = torch.bfloat16
    if "bf16-reduce" in cell.options:
        keywords["reduce_dtype"] = torch.bfloat16
    return keywords


def batch(cell: Cell, step: int, rows: int | None = None) -> Pair:
    return models.batch(cell.model, step, rows or cell.rows, stored_dtype(cell))


def stored_dtype(cell: Cell) -> torch.dtype:
    return torch.float32 if cell.is_low else torch.float64


# --- the one process ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """All that the training in one process depends on.

    Attributes:
        pieces: the data ranks, the micro-batches, and whether BatchNorm is over all ranks; (1, 1,
            False) for a model without BatchNorm, whose gradients do not depend on them.
    """

    model: str
    layers: int
    rows: int
    low: bool
    clip: bool
    pieces: tuple[int, int, bool]


def key_of(cell: Cell) -> Key:
    sync = "sync-bn" in cell.options
    pieces = (cell.data_ranks, cell.microbatches, sync) if cell.model == "conv" else (1, 1, False)
    clips = "no-clip" not in cell.options
    return Key(cell.model, cell.layers, cell.rows, cell.is_low, clips, pieces)


@functools.lru_cache(maxsize=8)
def reference(key: Key, device: torch.device) -> list[tuple[Pair, State]]:
    """The steps of one process, copied, because the next step changes their tensors in place."""
    stored = torch.float32 if key.low else torch.float64
    ranks, microbatches, sync = key.pieces
    steps = one_process(
        functools.partial(models.build, key.model, key.layers, stored),
        lambda step: models.batch(key.model, step, key.rows, stored),
        ranks, device, steps=STEPS, microbatches=microbatches, clip=0.5 if key.clip else None,
        param_dtype=torch.bfloat16 if key.low else None, sync_batchnorm=sync,
        dropout="exact" if key.model in models.DROPOUT else None, **OPTIMIZER,
    )  # fmt: skip
    return [copy.deepcopy(step) for step in steps]


# --- beyond training ------------------------------------------------------------------------------


def round_trip(cell: Cell, mesh: Mesh, keywords: dict[str, Any]) -> dict[str, float]:
    """What is done with -> its error, for a start from the meta device, evaluation and saving.

    The weights that are loaded differ from those that the job starts from, so that a load without
    an effect is noticed.
    """
    options = {name: value for name, value in keywords.items() if name != "clip"}
    stored = stored_dtype(cell)
    plain = models.build(cell.model, cell.layers, stored)
    meta = models.build(cell.model, cell.layers, stored, "meta")
    job = parallelize(meta, mesh, cell.strategy, seed=0, **options)
    errors = {"weights drawn from the meta device": difference(job, plain)}
    errors["evaluation"] = abs(evaluated(cell, job, mesh) - one_loss(cell, plain))
    other = {name: value * 1.5 for name, value in plain.state_dict().items()}
    plain.load_state_dict(other)
    job.load_full_state_dict(other)
    errors["weights loaded and saved"] = difference(job, plain)
    errors["evaluation of loaded weights"] = abs(evaluated(cell, job, mesh) - one_loss(cell, plain))
    return errors


def difference(job: Job, plain: nn.Module) -> float:
    """The largest error of `full_state_dict`; infinite if it has other names."""
    ours, theirs = job.full_state_dict(), plain.state_dict()
    if list(ours) != list(theirs):
        return torch.inf
    return max(error(ours[name], theirs[name], 0.0) for name in theirs)


def evaluated(cell: Cell, job: Job, mesh: Mesh) -> float:
    rows = batches.slice_rows(batch(cell, 0), mesh.data.size)[mesh.data.index]
    total = job.count(batches.count(rows[1]))
    microbatches = batches.slice_rows(rows, cell.microbatches)
    return job.evaluate(microbatches, lambda out, target: cross_entropy_sum(out, target) / total)


def one_loss(cell: Cell, plain: nn.Module) -> float:
    inputs, targets = batch(cell, 0)
    with torch.no_grad():
        return float(cross_entropy_sum(plain.eval()(inputs), targets)) / batches.count(targets)
