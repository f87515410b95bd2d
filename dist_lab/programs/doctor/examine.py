"""doctor(): try every strategy on a model, and report what happens.

First each strategy is applied to a fresh model in the model's own dtype. A strategy may refuse the
model. Otherwise the layouts give its memory. Then one process runs a few steps on the batch, and
repeats the first one (proof.py). This finds problems of the model and the batch. If there are none,
each applied strategy trains in float64 and is compared with the one process. notes.py finds ways to
save time and memory.
"""

import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.comm.context import CollectiveError
from dist_lab.compose import parallelize
from dist_lab.errors import UserError, one_of, shown
from dist_lab.job import Job
from dist_lab.layout.layout import Layout, local_numel
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh
from dist_lab.parallel.tensor.auto_plan import NoPlan
from dist_lab.parallel.tensor.plan import Plan
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.doctor import notes, pairs
from dist_lab.programs.doctor.proof import (
    ADAM,
    SEE_ABOVE,
    Proof,
    amplified_rounding,
    prove_in_one_process,
)
from dist_lab.programs.doctor.report import DoctorReport, StrategyRow, Verdict, size
from dist_lab.programs.doctor.subject import ModelSource, Subject, one_line, subject_of
from dist_lab.programs.doctor.trial import Trial, Unit
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.engine import verify
from dist_lab.programs.verify.report import VerifyReport
from dist_lab.step.find_units import find_units
from dist_lab.step.hooks import tensors_in


def doctor(
    model: ModelSource,
    mesh: Mesh,
    *,
    batch: Pair | None = None,
    loss_sum: LossFn | None = None,
    units: Iterable[Unit] = (),
    strategies: Sequence[str] = (),
    plan: Plan | str | None = None,
    microbatches: int = 1,
    steps: int = 3,
) -> DoctorReport:
    """Try every strategy on a model, and report what each does with it. Collective over the mesh.

    Args:
        model: a module, which is copied and never changed; or a function that builds one.
            It is called for each strategy, with the same seed in every random number generator. The
            function may also return (module, batch) or (module, batch, loss_sum).
        mesh: its ranks run all strategies; each strategy has a mesh of its own over them.
        batch: (inputs, targets) of one step, all rows. None: no strategy can be called exact.
        loss_sum: (output, target) -> the sum over the rows; default cross_entropy_sum.
        units: the units of fsdp and hsdp, see `parallelize`; class names work too.
        strategies: default: all that the number of ranks allows.
        plan: the tp plan, or "auto"; default: the model's own.
        microbatches: the number of micro-batches of each rank.
        steps: the number of steps that are compared with one process.

    Returns:
        The report, the same on every rank.

    Raises:
        UserError: the model cannot be examined: it is not a module, its function fails, or a unit
            or a strategy does not exist.
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
    subject, unsplittable = drop_unsplittable_batch(subject, mesh)
    trial = Trial(subject, mesh, tuple(named), plan, microbatches, steps)
    attempts = {name: apply(trial, name) for name in strategies or default_strategies(mesh.size)}
    proof = Proof(obstacle="no strategy applies")
    if any(a.outcome is None or a.outcome.no_plan for a in attempts.values()):
        proof = prove_in_one_process(trial)
    if unsplittable:
        proof = replace(proof, findings=(unsplittable, *proof.findings), obstacle=SEE_ABOVE)
    facts = notes.Facts(built, named, proof.idle, mesh.size)
    rows = tuple(strategy_row(trial, proof, facts, name, a) for name, a in attempts.items())
    return DoctorReport(summary(trial, proof, built), mesh.size, proof.findings, rows)


def default_strategies(ranks: int) -> tuple[str, ...]:
    """All strategies that the number of ranks allows: hsdp needs two axes of two or more.

    >>> default_strategies(1), "hsdp" in default_strategies(2), "hsdp" in default_strategies(4)
    (('single',), False, True)
    """
    if ranks == 1:
        return ("single",)
    two_axes = ranks >= 4 and ranks % 2 == 0
    return tuple(name for name in STRATEGIES if name != "hsdp" or two_axes)


def drop_unsplittable_batch(subject: Subject, mesh: Mesh) -> tuple[Subject, str]:
    """Drops the batch if it cannot be split by rows. Also returns the reason. Collective."""
    try:
        with together(mesh.world):
            if (batch := subject.batch) is not None:
                if any(tensor.is_meta for tensor in tensors_in(batch)):
                    raise UserError("the batch is on the meta device, where it has no values")
                batches.checked_batch(lambda step: batch, 0, mesh.device)
        return subject, ""
    except UserError as error:
        return replace(subject, batch=None), str(error)


# --- one strategy ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The outcome of trying one strategy. `no_plan`: tp was refused because it has no plan."""

    verdict: Verdict
    reason: str = ""
    error: float | None = None
    no_plan: bool = False


@dataclass(frozen=True)
class Attempt:
    """The result of applying a strategy.

    Attributes:
        mesh: the strategy's own mesh.
        outcome: None if the strategy was applied; otherwise the verdict and its reason.
        kept: the result of `bytes_kept` on each rank.
    """

    mesh: Mesh
    outcome: Outcome | None
    layouts: Mapping[str, Layout]
    kept: Sequence[Mapping[str, int]]


def apply(trial: Trial, strategy: str) -> Attempt:
    """Applies a strategy to a fresh model, in the model's own dtype. Collective."""
    mesh = trial.mesh_for(strategy)
    outcome, kept = Outcome(Verdict.EXACT), dict[str, int]()
    layouts: Mapping[str, Layout] = {}
    try:
        with together(trial.mesh.world):  # building may fail on one rank only
            model = trial.subject.build()
        if not any(p.is_meta for p in model.parameters()):
            model = model.to(mesh.device)
        job = parallelize(model, mesh, strategy, **trial.options(strategy, trial.subject.batch))
        kept, layouts = bytes_kept(job, strategy), job.layouts
        del job, model
    except UserError as error:
        outcome = Outcome(Verdict.REFUSED, str(error), no_plan=isinstance(error, NoPlan))
    except CollectiveError:
        raise
    except Exception as error:
        outcome = Outcome(Verdict.FAILED, one_line(error))
    gc.collect()  # a job and its model refer to each other
    outcome, kept_by_rank = worst_over_ranks(outcome, kept, trial.mesh)
    applied = outcome.verdict is Verdict.EXACT
    return Attempt(mesh, None if applied else outcome, layouts, kept_by_rank)


def strategy_row(
    trial: Trial, proof: Proof, facts: notes.Facts, strategy: str, attempt: Attempt
) -> StrategyRow:
    """Compares a strategy with one process, if it was applied, and adds the notes. Collective."""
    outcome = attempt.outcome or compare_with_one_process(trial, proof, strategy, attempt.mesh, {})
    kept: Mapping[str, int] = {}
    lines: list[str] = []
    if outcome.no_plan:
        lines = suggested_plan(trial, proof, facts.model, attempt.mesh)
    elif outcome.verdict not in (Verdict.REFUSED, Verdict.FAILED):
        example = trial.options(strategy, trial.subject.batch).get("example_inputs")
        parameter_bytes = [rank_bytes["parameters"] for rank_bytes in attempt.kept]
        lines = notes.notes_for(strategy, facts, attempt.layouts, parameter_bytes, example)
        kept = max(attempt.kept, key=lambda rank_bytes: sum(rank_bytes.values()))
    label = str(attempt.mesh) if strategy != "single" else "-"
    return StrategyRow(
        strategy, label, outcome.verdict, outcome.reason, outcome.error, tuple(lines), kept
    )


def compare_with_one_process(
    trial: Trial, proof: Proof, strategy: str, mesh: Mesh, extra_options: Mapping[str, Any]
) -> Outcome:
    """Trains with the strategy and compares it with one process. Collective."""
    subject = trial.subject
    if proof.obstacle or subject.batch is None:
        return Outcome(Verdict.UNPROVED, proof.obstacle)
    batch = proof.batch(subject.batch)
    try:
        report = verify(
            lambda: proof.build(subject), lambda step: batch, mesh, strategy,
            steps=trial.steps, microbatches=trial.microbatches_of(strategy), options=ADAM,
            loss_sum=subject.loss_sum, reference=proof.steps,
            **{**trial.options(strategy, batch), **extra_options},
        )  # fmt: skip
        worst = max(c.error for c in report.comparisons if c.judged)
        outcome = Outcome(Verdict.EXACT, "", worst)
        if not report.equal:
            splits = mesh.data.size, trial.microbatches_of(strategy)
            outcome = Outcome(*_not_equal(report, amplified_rounding(trial, proof, *splits)), worst)
    except UserError as error:
        outcome = Outcome(Verdict.REFUSED, str(error))
    except CollectiveError:
        raise
    except Exception as error:
        outcome = Outcome(Verdict.FAILED, one_line(error))
    gc.collect()
    return worst_over_ranks(outcome, {}, trial.mesh)[0]


def _not_equal(report: VerifyReport, amplified: Mapping[int, float]) -> tuple[Verdict, str]:
    """Decides whether the strategy is wrong, or the model itself amplifies rounding that much."""
    judged = [c for c in report.comparisons if c.judged]
    if any(not c.error <= max(report.tolerance, 10 * amplified[c.step]) for c in judged):
        return Verdict.WRONG, report.sentence()
    return Verdict.UNPROVED, (
        f"{report.sentence()}; but one process differs from itself by "
        f"{max(amplified.values()):.1e} when its weights change in the last digit: the model "
        "amplifies rounding; give more rows or fewer --steps"
    )


def worst_over_ranks(
    outcome: Outcome, kept: Mapping[str, int], mesh: Mesh
) -> tuple[Outcome, list[dict[str, int]]]:
    """Gathers the worst outcome of all ranks, and the bytes that each rank keeps. Collective."""
    local = json.dumps([asdict(outcome), kept]).encode()
    gathered = [json.loads(b) for b in ops.all_gather_bytes(local, mesh.world)]
    outcomes = [
        Outcome(**fields | {"verdict": Verdict(fields["verdict"])}) for fields, _ in gathered
    ]
    worst = max(outcomes, key=lambda outcome: list(Verdict).index(outcome.verdict))
    return worst, [kept for _, kept in gathered if kept]


def bytes_kept(job: Job, strategy: str) -> dict[str, int]:
    """Bytes on this rank, from the layouts: parameters, gradients and Adam's two moments."""
    kept = {"parameters": 0, "gradients": 0, "moments": 0}
    parameters = dict(job.model.named_parameters())
    for name, layout in job.layouts.items():
        if name in parameters:
            sharded = local_numel(layout, job.mesh.axes, job.mesh.coordinates)
            stored = layout.shape.numel() if name in job.stepped else sharded
            kept["parameters"] += stored * layout.dtype.itemsize
            if parameters[name].requires_grad:
                gradient = stored if strategy == "zero1" else sharded  # unsharded until the step
                kept["gradients"] += gradient * layout.dtype.itemsize
                kept["moments"] += 2 * sharded * layout.dtype.itemsize
    return kept


def suggested_plan(trial: Trial, proof: Proof, model: nn.Module, mesh: Mesh) -> list[str]:
    """Tries plan="auto", then tp plans of Linear pairs; returns a line with the first exact one.
    Collective.
    """
    plan: dict[str, str] | str = "auto"
    while plan and not proof.obstacle and trial.mesh.size > 1:
        outcome = compare_with_one_process(trial, proof, "tp", mesh, {"plan": plan})
        if outcome.verdict is Verdict.EXACT:
            text = f'"{plan}"' if isinstance(plan, str) else pairs.plan_text(model, plan)
            return [f"this plan was tried and is exact (error {outcome.error:.1e}): plan={text}"]
        if isinstance(plan, str):
            plan = pairs.plan_of_pairs(model)
            continue
        if outcome.verdict is not Verdict.REFUSED:
            return []
        shorter = pairs.drop_refused_pair(plan, outcome.reason)
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
        dtype = "float64" if proof.in_float64 else "its own dtype"
        words.append(f"{trial.steps} steps of {rows} rows, compared in {dtype}")
    return "; ".join(words)
