"""doctor(): what each strategy would do with a model, found by trying it.

Each strategy is applied to a fresh model, in the model's own dtype: that is where it refuses, and
where its memory is read off the layouts. Then one process runs a few steps of the batch, the first
of them twice, and what cannot be trained in parallel or not be compared, whoever trains it, is
found (proof.py). If there is nothing of the kind, each strategy that was applied trains in float64,
and is compared with the one process. What could be cheaper is read off the model (notes.py).
"""

import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.comm.context import CollectiveError
from dist_lab.compose import find_units, parallelize
from dist_lab.errors import UserError, one_of, shown
from dist_lab.job import Job
from dist_lab.layout.layout import Layout, local_numel
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh
from dist_lab.parallel.tensor.plan import Plan
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.doctor import notes, pairs
from dist_lab.programs.doctor.proof import (
    ADAM,
    SEE_ABOVE,
    Proof,
    prove_in_one_process,
    rounding_grows,
)
from dist_lab.programs.doctor.report import DoctorReport, StrategyRow, Verdict, size
from dist_lab.programs.doctor.subject import Given, Subject, in_a_line, subject_of
from dist_lab.programs.doctor.trial import Trial, Unit
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.engine import verify
from dist_lab.programs.verify.report import VerifyReport as Comparisons
from dist_lab.step.hooks import tensors_in


def doctor(
    model: Given,
    mesh: Mesh,
    *,
    batch: Pair | None = None,
    loss_sum: LossFn | None = None,
    units: Iterable[Unit] = (),
    strategies: Sequence[str] = (),
    plan: Plan | None = None,
    microbatches: int = 1,
    steps: int = 3,
) -> DoctorReport:
    """Try every strategy on a model, and say what each would do with it. Collective over the mesh.

    Args:
        model: a module, which is copied and never changed; or a function that builds one, called
            anew for each strategy, every generator of random numbers at the same seed. It may also
            return (module, batch) or (module, batch, loss_sum).
        mesh: its ranks are those of all strategies, each of which has axes of its own over them.
        batch: (inputs, targets) of one step, all rows; None: nothing can be proved.
        loss_sum: (output, target) -> the sum over the rows; default cross_entropy_sum.
        units: of fsdp and hsdp, see `parallelize`; names of classes are taken, too.
        strategies: default: all that so many ranks allow.
        plan: of tp; default: the model's own.
        microbatches: in how many pieces a rank takes its rows.
        steps: how many are compared with one process.

    Returns:
        The report, the same on every rank.

    Raises:
        UserError: what cannot be looked at: no module, a function that fails, a unit or a strategy
            there is not.
    """
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown:
        raise UserError(
            f"no strategy {shown(unknown[0])}; there is {one_of(list(STRATEGIES), unknown[0])}"
        )
    with together(mesh.world):
        subject = subject_of(model, batch, loss_sum, cross_entropy_sum)
        built = subject.build()
        named = find_units(built, units)
    subject, not_cut = with_a_batch_of_rows(subject, mesh)
    trial = Trial(subject, mesh, tuple(named), plan, microbatches, steps)
    applied = {name: apply(trial, name) for name in strategies or usual(mesh.size)}
    proof = Proof(obstacle="no strategy applies")
    if any(each.outcome is None or lacks_a_plan(each.outcome) for each in applied.values()):
        proof = prove_in_one_process(trial)
    if not_cut:
        proof = replace(proof, findings=(not_cut, *proof.findings), obstacle=SEE_ABOVE)
    facts = notes.Facts(built, named, proof.idle, mesh.size)
    rows = tuple(row(trial, proof, facts, name, each) for name, each in applied.items())
    return DoctorReport(summary(trial, proof, built), mesh.size, proof.findings, rows)


def usual(ranks: int) -> tuple[str, ...]:
    """All strategies that so many ranks can tell apart: hsdp takes two axes of two.

    >>> usual(1), "hsdp" in usual(2), "hsdp" in usual(4)
    (('single',), False, True)
    """
    if ranks == 1:
        return ("single",)
    two_axes = ranks >= 4 and ranks % 2 == 0
    return tuple(name for name in STRATEGIES if name != "hsdp" or two_axes)


def with_a_batch_of_rows(subject: Subject, mesh: Mesh) -> tuple[Subject, str]:
    """The subject, without its batch if that cannot be cut by rows, and why not. Collective."""
    try:
        with together(mesh.world):
            if (batch := subject.batch) is not None:
                if any(tensor.is_meta for tensor in tensors_in(batch)):
                    raise UserError("the batch is on the meta device, where it has no values")
                batches.take(lambda step: batch, 0, mesh.device)
        return subject, ""
    except UserError as error:
        return replace(subject, batch=None), str(error)


# --- one strategy ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of one attempt."""

    verdict: Verdict
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Attempt:
    """What became of applying a strategy.

    Attributes:
        mesh: the strategy's own.
        outcome: None: it was applied; else why not.
        kept: of each rank, see `bytes_kept`.
    """

    mesh: Mesh
    outcome: Outcome | None
    layouts: Mapping[str, Layout]
    kept: Sequence[Mapping[str, int]]


def apply(trial: Trial, strategy: str) -> Attempt:
    """Apply a strategy to a fresh model, in the model's own dtype. Collective."""
    own = trial.own_mesh(strategy)
    outcome, kept = Outcome(Verdict.EXACT), dict[str, int]()
    layouts: Mapping[str, Layout] = {}
    try:
        with together(trial.mesh.world):  # it may fail on one rank alone
            model = trial.subject.build()
        if not any(p.is_meta for p in model.parameters()):
            model = model.to(own.device)
        job = parallelize(model, own, strategy, **trial.options(strategy, trial.subject.batch))
        kept, layouts = bytes_kept(job, strategy), job.layouts
        del job, model
    except UserError as error:
        outcome = Outcome(Verdict.REFUSED, str(error))
    except CollectiveError:
        raise
    except Exception as error:
        outcome = Outcome(Verdict.FAILED, in_a_line(error))
    gc.collect()  # a job and its model refer to each other
    outcome, everywhere = over_ranks(outcome, kept, trial.mesh)
    return Attempt(own, None if outcome.verdict is Verdict.EXACT else outcome, layouts, everywhere)


def row(
    trial: Trial, proof: Proof, facts: notes.Facts, strategy: str, applied: Attempt
) -> StrategyRow:
    """Compare a strategy with one process, if it was applied, and say what would be better."""
    outcome = applied.outcome or compared(trial, proof, strategy, applied.mesh, {})
    kept: Mapping[str, int] = {}
    said: list[str] = []
    if lacks_a_plan(outcome):
        said = suggested_plan(trial, proof, facts.model, applied.mesh)
    elif outcome.verdict not in (Verdict.REFUSED, Verdict.FAILED):
        example = trial.options(strategy, trial.subject.batch).get("example_inputs")
        held = [each["parameters"] for each in applied.kept]
        said = notes.of(strategy, facts, applied.layouts, held, example)
        kept = max(applied.kept, key=lambda each: sum(each.values()))
    label = str(applied.mesh) if strategy != "single" else "-"
    return StrategyRow(
        strategy, label, outcome.verdict, outcome.reason, outcome.error, tuple(said), kept
    )


def compared(
    trial: Trial, proof: Proof, strategy: str, mesh: Mesh, told: Mapping[str, Any]
) -> Outcome:
    """Train by the strategy and in one process. Collective."""
    subject = trial.subject
    if proof.obstacle or subject.batch is None:
        return Outcome(Verdict.UNPROVED, proof.obstacle)
    batch = proof.batch(subject.batch)
    try:
        report = verify(
            lambda: proof.build(subject), lambda step: batch, mesh, strategy,
            steps=trial.steps, microbatches=trial.microbatches_of(strategy), options=ADAM,
            loss_sum=subject.loss_sum, reference=proof.steps,
            **{**trial.options(strategy, batch), **told},
        )  # fmt: skip
        worst = max(c.error for c in report.comparisons if c.judged)
        outcome = Outcome(Verdict.EXACT, "", worst)
        if not report.equal:
            pieces = mesh.data.size, trial.microbatches_of(strategy)
            outcome = Outcome(*_not_equal(report, rounding_grows(trial, proof, *pieces)), worst)
    except UserError as error:
        outcome = Outcome(Verdict.REFUSED, str(error))
    except CollectiveError:
        raise
    except Exception as error:
        outcome = Outcome(Verdict.FAILED, in_a_line(error))
    gc.collect()
    return over_ranks(outcome, {}, trial.mesh)[0]


def _not_equal(found: Comparisons, grows: Mapping[int, float]) -> tuple[Verdict, str]:
    """Whether the strategy is wrong, or the model turns rounding into as much by itself."""
    judged = [c for c in found.comparisons if c.judged]
    if any(not c.error <= max(found.tolerance, 10 * grows[c.step]) for c in judged):
        return Verdict.WRONG, found.sentence()
    return Verdict.UNPROVED, (
        f"{found.sentence()}; but one process gets as far from itself, by {max(grows.values()):.1e}"
        ", if its weights differ in the last digit: the model makes rounding large; give it more "
        "rows, or fewer --steps"
    )


def over_ranks(
    outcome: Outcome, kept: Mapping[str, int], mesh: Mesh
) -> tuple[Outcome, list[dict[str, int]]]:
    """The worst outcome of all ranks, and what each of them keeps."""
    mine = [outcome.verdict.value, outcome.reason, str(outcome.error), kept]
    rows = [json.loads(b) for b in ops.all_gather_bytes(json.dumps(mine).encode(), mesh.world)]
    order = list(Verdict)
    verdict, reason, error, _ = max(rows, key=lambda row: order.index(Verdict(row[0])))
    worst = Outcome(Verdict(verdict), reason, None if error == "None" else float(error))
    return worst, [row[3] for row in rows if row[3]]


def bytes_kept(job: Job, strategy: str) -> dict[str, int]:
    """Bytes on this rank, by the layouts: parameters, gradients, and two moments of Adam's."""
    found = {"parameters": 0, "gradients": 0, "moments": 0}
    parameters = dict(job.model.named_parameters())
    for name, layout in job.layouts.items():
        if name in parameters:
            here = local_numel(layout, job.mesh.axes, job.mesh.coordinates)
            stays = layout.shape.numel() if name in job.stepped else here
            found["parameters"] += stays * layout.dtype.itemsize
            if parameters[name].requires_grad:
                gradient = stays if strategy == "zero1" else here  # whole until the step
                found["gradients"] += gradient * layout.dtype.itemsize
                found["moments"] += 2 * here * layout.dtype.itemsize
    return found


def lacks_a_plan(outcome: Outcome) -> bool:
    """Whether tp was refused because nobody has said what to split."""
    return outcome.verdict is Verdict.REFUSED and " has no tp_plan()" in outcome.reason


def suggested_plan(trial: Trial, proof: Proof, model: nn.Module, mesh: Mesh) -> list[str]:
    """A plan of tp of pairs of Linear layers, in a line, if it has been proved. Collective."""
    plan = pairs.plan_of_pairs(model)
    while plan and not proof.obstacle and trial.mesh.size > 1:
        found = compared(trial, proof, "tp", mesh, {"plan": plan})
        if found.verdict is Verdict.EXACT:
            written = pairs.written(model, plan)
            return [f"a plan that was tried and is exact, by {found.error:.1e}: plan={written}"]
        if found.verdict is not Verdict.REFUSED:
            return []
        shorter = pairs.without(plan, found.reason)
        plan = shorter if len(shorter) < len(plan) else {}
    return []


def summary(trial: Trial, proof: Proof, built: nn.Module) -> str:
    """The first line of the report."""
    parameters = list(built.parameters())
    count, total = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    dtypes = " and ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters))
    ranks = f"{trial.mesh.size} rank{'s' * (trial.mesh.size > 1)}"
    words = [f"{trial.subject.name} on {ranks}: {count:,} parameters ({size(total)}, {dtypes})"]
    if trial.subject.batch is not None and not proof.obstacle:
        rows = batches.rows_in(trial.subject.batch[0])
        dtype = "float64" if proof.wide else "its own dtype"
        words.append(f"{trial.steps} steps of {rows} rows, compared in {dtype}")
    return "; ".join(words)
