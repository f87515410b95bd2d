"""What one process shows of a model before any strategy is compared with it.

The steps of the one process are run by the comparison engine, which runs the first one twice and
refuses what is the model's own and no strategy's fault. In float64 a bug shows and rounding does
not, so the model and the batch are cast to it; a model that cannot compute in it keeps its dtype.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import check_shapes_agree, check_tensors_agree, together
from dist_lab.errors import MachineError, UserError
from dist_lab.loss import Pair
from dist_lab.programs.doctor.findings import findings, without_dropout
from dist_lab.programs.doctor.subject import Subject, in_a_line, seeded
from dist_lab.programs.doctor.trial import Trial
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import TOLERANCE, State, compare
from dist_lab.programs.verify.engine import coarsest
from dist_lab.programs.verify.reference import (
    agreed,
    check_model,
    has_batchnorm,
    loss_and_gradients,
    one_process,
)
from dist_lab.programs.verify.repeat import repeated, weights_and_buffers
from dist_lab.step.hooks import map_tensors

Steps = list[tuple[Pair, State]]
ADAM = {"lr": 1e-3}

SEE_ABOVE = "not compared, for the reason that stands first"
NO_BATCH = "no batch was given: parallelize() alone was tried, and nothing computed"


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


def prove_in_one_process(trial: Trial) -> Proof:
    """Run the steps in one process, the first twice. Collective: what one rank finds, all find."""
    subject, mesh = trial.subject, trial.mesh
    built = subject.build()
    dropped = without_dropout(subject.build())
    said = findings(built, dropped, None, None, mesh.size)
    narrow = Proof(tuple(said), wide=False)
    if subject.batch is None:
        return replace(narrow, obstacle=NO_BATCH)
    try:
        with together(mesh.world):
            check_model(narrow.build(subject))
        state = dict(built.named_parameters()) | dict(built.named_buffers())
        check_shapes_agree(state, mesh.world)
        check_tensors_agree(state, mesh.world)
    except UserError as error:
        return replace(narrow, findings=(str(error), *said), obstacle=SEE_ABOVE)
    proof = Proof() if computes(trial, Proof()) else narrow
    obstacle, steps = "", None
    try:
        steps = list(reference(trial, proof))
    except UserError as error:
        obstacle = str(error)
    said = findings(built, dropped, subject.batch, steps, mesh.size)
    if obstacle:
        return replace(proof, findings=(obstacle, *said), obstacle=SEE_ABOVE)
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


def computes(trial: Trial, proof: Proof) -> bool:
    """Whether forward and backward run as they are to be compared, on every rank. Collective."""
    subject = trial.subject
    assert subject.batch is not None
    model, batch = proof.build(subject).to(trial.mesh.device), proof.batch(subject.batch)
    try:
        with seeded():
            loss_and_gradients(
                model, [batches.take(lambda step: batch, 0, trial.mesh.device)], subject.loss_sum
            )
        runs = b"yes"
    except Exception:
        runs = b""
    return set(ops.all_gather_bytes(runs, trial.mesh.world)) == {b"yes"}


def reference(trial: Trial, proof: Proof) -> Iterator[tuple[Pair, State]]:
    """The steps of one process, of which the first is run again. Copied, as the next changes it."""
    subject, mesh = trial.subject, trial.mesh
    assert subject.batch is not None
    batch = proof.batch(subject.batch)
    if mesh.size > 1 and batches.rows_are_alike(batch[0]):
        raise UserError("every row of the batch is alike; ranks need different data to verify")
    model = proof.build(subject).to(mesh.device)
    dtype = coarsest(model, None, None)
    told: dict[str, Any] = {
        "microbatches": trial.microbatches, "loss_sum": subject.loss_sum, "param_dtype": None,
        "sync_batchnorm": False,
    }  # fmt: skip
    where = lambda: proof.build(subject), lambda step: batch, mesh.size, mesh.device
    steps = one_process(
        *where, steps=trial.steps, clip=1.0, optimizer=torch.optim.AdamW, options=ADAM, **told
    )
    built = weights_and_buffers(model)
    again = repeated(steps, built, *where, dtype=dtype, tolerance=TOLERANCE[dtype], **told)
    pieces = mesh.size * trial.microbatches if has_batchnorm(model) else 1
    for step in agreed(_in_our_words(again, pieces), mesh):
        yield copy.deepcopy(step)


def _in_our_words(steps: Iterable[tuple[Pair, State]], pieces: int) -> Iterator[tuple[Pair, State]]:
    try:
        yield from steps
    except (UserError, MachineError):
        raise
    except Exception as error:
        cut = f", in the {pieces} pieces that BatchNorm sees" if pieces > 1 else ""
        said = f"in one process it fails on the batch{cut}: {in_a_line(error)}"
        raise UserError(said) from error


def rounding_grows(trial: Trial, proof: Proof, ranks: int, microbatches: int) -> dict[int, float]:
    """How far one process gets from itself, by step, if its weights differ in the last digit.

    Layers that divide by next to nothing, such as BatchNorm of two rows, turn rounding into large
    numbers, in whatever order they are summed up.

    Args:
        ranks, microbatches: the pieces that BatchNorm sees, of the run that is compared.
    """
    subject = trial.subject
    assert subject.batch is not None
    batch = proof.batch(subject.batch)

    def nudged() -> nn.Module:
        model = proof.build(subject)
        generator = torch.Generator().manual_seed(0)
        for p in (p.detach() for p in model.parameters() if p.is_floating_point()):
            sign = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
            p.mul_(1 + sign * torch.finfo(p.dtype).eps)
        return model

    def steps(build: Callable[[], nn.Module]) -> Iterator[tuple[Pair, State]]:
        return one_process(
            build, lambda step: batch, ranks, trial.mesh.device, steps=trial.steps,
            microbatches=microbatches, clip=1.0, optimizer=torch.optim.AdamW, options=ADAM,
            loss_sum=subject.loss_sum,
        )  # fmt: skip

    dtype, rounding = coarsest(nudged(), None, None), dict[str, Tensor]()
    both = zip(steps(lambda: proof.build(subject)), steps(nudged), strict=True)
    return {
        step: max(c.error for c in compare(step, other, one, rounding, dtype) if c.judged)
        for step, ((_, one), (_, other)) in enumerate(both)
    }
