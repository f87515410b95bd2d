"""One training run of an exhibit, with or without its mistake, compared with one process.

It runs on one rank. The reference is computed before the mistake is put in place, except for the
groups of the optimizer: a comparison gives both runs the same.
"""

import copy
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lab.errors import UserError
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import init_mesh
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.engine import verify
from dist_lab.programs.verify.matrix import cell as matrix
from dist_lab.programs.verify.matrix import models
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.museum.exhibit import Exhibit, patched
from dist_lab.programs.verify.museum.rooms import exhibit_named
from dist_lab.programs.verify.reference import one_process
from dist_lab.programs.verify.report import Comparison, VerifyReport

STEPS = 4
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
}


@dataclass(frozen=True)
class Trial:
    """A comparison with one process.

    Attributes:
        exhibit: the name of an exhibit.
        mistaken: its mistake is in place.
        same_rows: every rank gets the rows of the first one.
    """

    exhibit: str
    cell: Cell
    mistaken: bool = True
    same_rows: bool = False
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Outcome:
    """What `verify` found.

    Attributes:
        verdict: "equal"; "not equal"; "refused" by a UserError; "failed": a rank crashed or hung.
        sentence: the report's sentence, the refusal, or the tracebacks.
        first: the first comparison that differs.
        losses: the error of the loss at each step.
        weights: the largest error of a weight after the last step.
    """

    verdict: str
    sentence: str
    first: Comparison | None = None
    losses: tuple[float, ...] = ()
    weights: float = 0.0


def run(rank: int, trial: Trial) -> Outcome:
    """Train once in one process and once in parallel, and compare. Collective."""

    def mistake() -> AbstractContextManager[None]:
        return patched(exhibit) if trial.mistaken else nullcontext()

    exhibit, axes = exhibit_named(trial.exhibit), dict[str, Any](trial.cell.axes)
    mesh = init_mesh(**axes)

    def build_model() -> nn.Module:
        model = models.build(trial.cell.model, trial.cell.layers, torch.float64)
        exhibit.prepare(model)
        return model

    def build_batch(step: int) -> Pair:
        batch = exhibit.batch(matrix.batch(trial.cell, step))
        if trial.same_rows:
            batch = batches.join([batches.slice_rows(batch, mesh.data.size)[0]] * mesh.data.size)
        return batch

    optimizer, options = OPTIMIZERS[trial.optimizer]
    with mistake():
        groups = exhibit.groups() if exhibit.groups else None
    with tempfile.TemporaryDirectory(prefix="dist_lab-") as folder:
        keywords = matrix.arguments(trial.cell, mesh, Path(folder))
    shared: dict[str, Any] = {
        "steps": STEPS, "microbatches": trial.cell.microbatches, "optimizer": optimizer,
        "options": options, "groups": groups, "clip": keywords.pop("clip"),
        "sync_batchnorm": keywords.pop("sync_batchnorm", False),
    }  # fmt: skip
    steps = one_process(build_model, build_batch, mesh.data.size, mesh.device, **shared)
    reference = [copy.deepcopy(step) for step in steps]
    try:
        with mistake():
            return outcome_of(
                verify(
                    build_model, build_batch, mesh, trial.cell.strategy,
                    reference=reference, **shared, **keywords,
                )
            )  # fmt: skip
    except UserError as refusal:
        return Outcome("refused", str(refusal))


def outcome_of(report: VerifyReport) -> Outcome:
    by_quantity: dict[str, list[Comparison]] = {"loss": [], "weight": []}
    for comparison in report.comparisons:
        if comparison.judged:
            by_quantity.setdefault(comparison.quantity, []).append(comparison)
    last = [c.error for c in by_quantity["weight"] if c.step == STEPS - 1]
    return Outcome(
        "equal" if report.equal else "not equal", report.sentence(), report.first,
        tuple(c.error for c in by_quantity["loss"]), max(last, default=0.0),
    )  # fmt: skip


def in_words(exhibit: Exhibit) -> str:
    """The training run of an exhibit, in words."""
    cell = exhibit.cell
    parts = [f"{cell.model} on {cell.mix} ({cell.ranks} ranks), {cell.microbatches} micro-batches"]
    parts += [f"schedule {cell.schedule}"] if cell.schedule else []
    return ", ".join([*parts, *cell.options, f"{STEPS} steps of {exhibit.optimizer}"])
