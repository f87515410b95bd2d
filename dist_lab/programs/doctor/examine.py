"""doctor(): what each strategy would do with a model, found by trying it.

First what is the model's own and no strategy's: one process runs a few steps of the batch twice,
and the comparison engine's refusals say what of it cannot be trained in parallel or not be compared
(random numbers, a loss that is a mean, rows that depend on each other). Then each strategy is
applied to a fresh model, in the model's own dtype: that is where it refuses, and where its memory
is read off the layouts. What it does not refuse is trained in float64 and compared with the one
process. What could be cheaper is read off the model: see notes.py.
"""

import copy
import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dist_lab.comm import ops
from dist_lab.comm.agree import check_shapes_agree, check_tensors_agree, together
from dist_lab.comm.context import CollectiveError, Wire
from dist_lab.compose import parallelize
from dist_lab.errors import MachineError, UserError, one_of, shown
from dist_lab.job import Job
from dist_lab.layout.layout import Layout, local_numel
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.parallel.tensor.plan import BringsItsPlan, Plan
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.doctor import notes, pairs
from dist_lab.programs.doctor.findings import findings, without_dropout
from dist_lab.programs.doctor.report import Report, Row, Verdict, size
from dist_lab.programs.doctor.subject import Given, Subject, in_a_line, subject_of
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import TOLERANCE, State
from dist_lab.programs.verify.engine import coarsest, verify
from dist_lab.programs.verify.reference import agreed, check_model, has_batchnorm, one_process
from dist_lab.programs.verify.repeat import repeated, weights_and_buffers
from dist_lab.step.hooks import map_tensors

Steps = list[tuple[Pair, State]]
Unit = type[nn.Module] | str
ADAM = {"lr": 1e-3}


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
) -> Report:
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
        named = units_by_name(built, units)
    patient = Patient(subject, mesh, tuple(named), plan, microbatches, steps)
    proof = prove_in_one_process(patient)
    facts = notes.Facts(built, named, proof.idle, mesh.size)
    rows = [examine(patient, proof, facts, name) for name in strategies or usual(mesh.size)]
    return Report(summary(patient, proof, built), mesh.size, proof.findings, tuple(rows))


def usual(ranks: int) -> tuple[str, ...]:
    """All strategies that so many ranks can tell apart: hsdp takes two axes of two.

    >>> usual(1), "hsdp" in usual(2), "hsdp" in usual(4)
    (('single',), False, True)
    """
    if ranks == 1:
        return ("single",)
    two_axes = ranks >= 4 and ranks % 2 == 0
    return tuple(name for name in STRATEGIES if name != "hsdp" or two_axes)


@dataclass(frozen=True)
class Patient:
    """What is examined, on which ranks, and what it is told. `units` are names of modules."""

    subject: Subject
    mesh: Mesh
    units: tuple[str, ...]
    plan: Plan | None
    microbatches: int
    steps: int

    def own_mesh(self, strategy: str) -> Mesh:
        """A mesh for one strategy, over the same ranks, or of this rank alone."""
        wire, timeout = self.mesh.wire, self.mesh.timeout
        if not STRATEGIES[strategy].axes or self.mesh.size == 1:
            axes = STRATEGIES[strategy].default_axes(1) or {"dp": 1}
            return Mesh(axes, Wire(0, 1, backend=wire.backend), timeout)
        axes = STRATEGIES[strategy].default_axes(self.mesh.size)
        return init_mesh(
            timeout=timeout, backend=wire.backend, check=wire.check, collectives=wire.collectives,
            **axes,
        )  # fmt: skip

    def microbatches_of(self, strategy: str) -> int:
        """A pipeline of p ranks has 2p, if each then has two rows: of one BatchNorm makes zeros."""
        if strategy != "pp" or self.subject.batch is None:
            return self.microbatches
        rows = batches.rows_in(self.subject.batch[0])
        return max(self.microbatches, min(rows // 2, 2 * self.mesh.size))

    def options(self, strategy: str, batch: Pair | None) -> dict[str, Any]:
        """What `parallelize` is told besides."""
        if strategy in ("fsdp", "hsdp"):
            return {"units": self.units}
        if strategy == "tp" and self.plan is not None:
            return {"plan": self.plan}
        if strategy == "pp" and batch is not None:
            first = batches.slice_rows(batch, self.microbatches_of("pp"))[0]
            return {"example_inputs": first[0]}
        return {}


def units_by_name(model: nn.Module, units: Iterable[Unit]) -> dict[str, nn.Module]:
    """The units, each a class, the name of a class or of a module. UserError: one matches none."""
    modules = {name: module for name, module in model.named_modules() if name}
    classes = {type(module).__name__ for module in modules.values()}
    found: dict[str, nn.Module] = {}
    for unit in units:
        matched = {
            name: module
            for name, module in modules.items()
            if (unit in (name, type(module).__name__) if isinstance(unit, str)
                else isinstance(module, unit))
        }  # fmt: skip
        if not matched:
            label = unit if isinstance(unit, str) else unit.__name__
            raise UserError(
                f"unit {label} matches no module (--units); classes here: "
                f"{', '.join(sorted(classes))}"
            )
        found |= matched
    return found


# --- the model's own ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What one process has shown.

    Attributes:
        steps: of the one process, to compare with; None: each comparison runs it itself.
        obstacle: why nothing can be compared; "" where it can.
        wide: whether it was computed in float64; else in the model's own dtype.
        idle: the trained parameters without a gradient on this batch.
    """

    findings: tuple[str, ...] = ()
    obstacle: str = ""
    steps: Steps | None = None
    wide: bool = True
    idle: tuple[str, ...] = ()

    def build(self, subject: Subject) -> nn.Module:
        """A fresh model as it is compared."""
        model = subject.build()
        without_dropout(model)
        return model.double() if self.wide else model

    def batch(self, batch: Pair) -> Pair:
        """The batch as it is compared."""
        if not self.wide:
            return batch
        return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)


def prove_in_one_process(patient: Patient) -> Proof:
    """Run the steps in one process, the first twice. Collective: what one rank finds, all find."""
    subject, mesh = patient.subject, patient.mesh
    built = subject.build()
    dropped = without_dropout(subject.build())
    narrow = Proof(wide=False)
    try:
        with together(mesh.world):
            check_model(narrow.build(subject))
            if (batch := subject.batch) is not None:
                batches.take(lambda step: batch, 0, mesh.device)
        state = dict(built.named_parameters()) | dict(built.named_buffers())
        check_shapes_agree(state, mesh.world)
        check_tensors_agree(state, mesh.world)
    except UserError as error:
        said = findings(built, dropped, None, None, mesh.size)
        return replace(narrow, findings=(str(error), *said), obstacle="see above")
    if subject.batch is None:
        said = findings(built, dropped, None, None, mesh.size)
        return replace(
            narrow, findings=tuple(said),
            obstacle="no batch was given: parallelize() alone was tried, and nothing computed",
        )  # fmt: skip
    obstacle, steps, proof = "", None, narrow
    for proof in (Proof(), narrow):
        try:
            steps = list(reference(patient, proof))
            obstacle = ""
            break
        except NotInThisDtype as error:
            obstacle = str(error)
        except UserError as error:
            obstacle = str(error)
            break
    said = findings(built, dropped, subject.batch, steps, mesh.size)
    if obstacle:
        return replace(proof, findings=(obstacle, *said), obstacle="see above")
    assert steps is not None
    if not proof.wide:
        said.append(
            "it does not compute in float64, so it was compared in its own dtype, where a small "
            "error hides behind rounding; let it take the dtype of its inputs"
        )
    gradients = steps[0][1]["gradient"]
    idle = [n for n, p in built.named_parameters() if p.requires_grad and gradients[n] is None]
    keep = None if has_batchnorm(built) else steps
    return replace(proof, findings=tuple(said), steps=keep, idle=tuple(idle))


class NotInThisDtype(UserError):
    """The model, run by itself, raises an error of its own."""


def reference(patient: Patient, proof: Proof) -> Iterator[tuple[Pair, State]]:
    """The steps of one process, of which the first is run again. Copied, as the next changes it."""
    subject, mesh = patient.subject, patient.mesh
    assert subject.batch is not None
    batch = proof.batch(subject.batch)
    if mesh.size > 1 and batches.rows_are_alike(batch[0]):
        raise UserError("every row of the batch is alike; ranks need different data to verify")
    model = proof.build(subject)
    dtype = coarsest(model, None, None)
    told: dict[str, Any] = {
        "microbatches": patient.microbatches, "loss_sum": subject.loss_sum, "param_dtype": None,
        "sync_batchnorm": False,
    }  # fmt: skip
    where = lambda: proof.build(subject), lambda step: batch, mesh.size, mesh.device
    steps = one_process(
        *where, steps=patient.steps, clip=1.0, optimizer=torch.optim.AdamW, options=ADAM, **told
    )
    built = weights_and_buffers(model)
    again = repeated(steps, built, *where, dtype=dtype, tolerance=TOLERANCE[dtype], **told)
    for step in agreed(_in_our_words(again), mesh):
        yield copy.deepcopy(step)


def _in_our_words(steps: Iterable[tuple[Pair, State]]) -> Iterator[tuple[Pair, State]]:
    try:
        yield from steps
    except (UserError, MachineError):
        raise
    except Exception as error:
        raise NotInThisDtype(f"in one process it fails on the batch: {in_a_line(error)}") from error


# --- one strategy ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of one attempt, on this rank."""

    verdict: Verdict
    reason: str = ""
    error: float | None = None


def examine(patient: Patient, proof: Proof, facts: notes.Facts, strategy: str) -> Row:
    """Apply a strategy, and compare it with one process if it can be. Collective."""
    own = patient.own_mesh(strategy)
    kept: dict[str, int] = {}
    layouts: Mapping[str, Layout] = {}
    try:
        model = patient.subject.build()
        if not any(p.is_meta for p in model.parameters()):
            model = model.to(own.device)
        told = patient.options(strategy, patient.subject.batch)
        job = parallelize(model, own, strategy, **told)
        kept, layouts = bytes_kept(job, strategy), job.layouts
        del job, model
    except UserError as error:
        outcome = Outcome(Verdict.REFUSED, str(error))
    except CollectiveError:
        raise
    except Exception as error:
        outcome = Outcome(Verdict.FAILED, in_a_line(error))
    else:
        outcome = compared(patient, proof, strategy, {})
    gc.collect()  # a job and its model refer to each other
    outcome, everywhere = over_ranks(outcome, kept, patient.mesh)
    said: list[str] = []
    if outcome.verdict is Verdict.REFUSED:
        said = suggested_plan(patient, proof, strategy, facts)
        everywhere = []
    elif outcome.verdict is not Verdict.FAILED:
        batch = patient.subject.batch
        example = patient.options(strategy, batch).get("example_inputs")
        said = notes.of(strategy, facts, layouts, [k["parameters"] for k in everywhere], example)
    fullest = max(everywhere, key=lambda each: sum(each.values()), default={})
    label = str(own) if strategy != "single" else "-"
    return Row(
        strategy, label, outcome.verdict, outcome.reason, outcome.error, tuple(said), fullest
    )


def compared(
    patient: Patient, proof: Proof, strategy: str, told: Mapping[str, Any]
) -> Outcome:  # fmt: skip
    """Train by the strategy and in one process."""
    subject = patient.subject
    if proof.obstacle or subject.batch is None:
        return Outcome(Verdict.UNPROVED, proof.obstacle)
    batch = proof.batch(subject.batch)
    try:
        report = verify(
            lambda: proof.build(subject), lambda step: batch, patient.own_mesh(strategy), strategy,
            steps=patient.steps, microbatches=patient.microbatches_of(strategy), options=ADAM,
            loss_sum=subject.loss_sum, reference=proof.steps,
            **{**patient.options(strategy, batch), **told},
        )  # fmt: skip
    except UserError as error:
        return Outcome(Verdict.REFUSED, str(error))
    except CollectiveError:
        raise
    except Exception as error:
        return Outcome(Verdict.FAILED, in_a_line(error))
    worst = max(c.error for c in report.comparisons if c.judged)
    if report.equal:
        return Outcome(Verdict.EXACT, "", worst)
    return Outcome(Verdict.WRONG, report.sentence(), worst)


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


def suggested_plan(
    patient: Patient, proof: Proof, strategy: str, facts: notes.Facts
) -> list[str]:  # fmt: skip
    """For tp without a plan: one of pairs of Linear layers, if it has been proved."""
    if strategy != "tp" or patient.plan is not None or isinstance(facts.model, BringsItsPlan):
        return []
    plan = pairs.plan_of_pairs(facts.model)
    while plan and not proof.obstacle and patient.mesh.size > 1:
        found, _ = over_ranks(compared(patient, proof, "tp", {"plan": plan}), {}, patient.mesh)
        if found.verdict is Verdict.EXACT:
            written = pairs.written(facts.model, plan)
            return [f"a plan that was tried and is exact, by {found.error:.1e}: plan={written}"]
        if found.verdict is not Verdict.REFUSED:
            return []
        shorter = pairs.without(plan, found.reason)
        plan = shorter if len(shorter) < len(plan) else {}
    return []


def summary(patient: Patient, proof: Proof, built: nn.Module) -> str:
    """The first line of the report."""
    parameters = list(built.parameters())
    count, total = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    dtypes = " and ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters))
    ranks = f"{patient.mesh.size} rank{'s' * (patient.mesh.size > 1)}"
    words = [f"{patient.subject.name} on {ranks}: {count:,} parameters ({size(total)}, {dtypes})"]
    if patient.subject.batch is not None and not proof.obstacle:
        rows = batches.rows_in(patient.subject.batch[0])
        dtype = "float64" if proof.wide else "its own dtype"
        words.append(f"{patient.steps} steps of {rows} rows against one process, in {dtype}")
    return "; ".join(words)
