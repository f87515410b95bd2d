"""Train the model in one process first: the reference that every strategy is compared with.

The comparison engine runs these steps, the first one twice, and refuses problems of the model that
no strategy causes. The model and the batch are cast to float64, where a bug shows and rounding does
not. A model that cannot compute in float64 keeps its dtype.
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
from dist_lab.programs.doctor.subject import Subject, one_line, seeded
from dist_lab.programs.doctor.trial import Trial
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import TOLERANCE, State, compare
from dist_lab.programs.verify.engine import coarsest
from dist_lab.programs.verify.reference import (
    check_model,
    checked_steps,
    has_batchnorm,
    loss_and_gradients,
    one_process,
)
from dist_lab.programs.verify.repeat import repeat_first_step, weights_and_buffers
from dist_lab.step.hooks import map_tensors

Steps = list[tuple[Pair, State]]
ADAM = {"lr": 1e-3}

SEE_ABOVE = "not compared with one process; the first finding above says why"
NO_BATCH = (
    "no batch was given, so only parallelize() was tried and nothing was computed; let the "
    "function return model, (inputs, targets), or give batch=(inputs, targets)"
)


@dataclass(frozen=True)
class Proof:
    """The result of training in one process.

    Attributes:
        steps: the reference steps to compare with; None: each comparison runs its own reference.
        obstacle: why nothing can be compared; "" if it can.
        in_float64: whether it computed in float64, or in the model's own dtype.
        idle: the trained parameters that get no gradient on this batch.
    """

    findings: tuple[str, ...] = ()
    obstacle: str = ""
    steps: Steps | None = None
    in_float64: bool = True
    idle: tuple[str, ...] = ()

    def build(self, subject: Subject) -> nn.Module:
        """A fresh model, with dropout off and in the dtype of the comparison."""
        model = subject.build()
        without_dropout(model)
        return model.double() if self.in_float64 else model

    def batch(self, batch: Pair) -> Pair:
        """The batch in the dtype of the comparison."""
        if not self.in_float64:
            return batch
        return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)


def prove_in_one_process(trial: Trial) -> Proof:
    """Runs the steps in one process, the first twice. Collective: all ranks get the same result."""
    subject, mesh = trial.subject, trial.mesh
    built = subject.build()
    dropped = without_dropout(subject.build())
    messages = findings(built, dropped, None, None, mesh.size)
    own_dtype = Proof(tuple(messages), in_float64=False)
    if subject.batch is None:
        return replace(own_dtype, obstacle=NO_BATCH)
    try:
        with together(mesh.world):
            check_model(own_dtype.build(subject))
        state = dict(built.named_parameters()) | dict(built.named_buffers())
        check_shapes_agree(state, mesh.world)
        check_tensors_agree(state, mesh.world)
    except UserError as error:
        return replace(own_dtype, findings=(str(error), *messages), obstacle=SEE_ABOVE)
    proof = Proof() if can_compute(trial, Proof()) else own_dtype
    obstacle, steps = "", None
    try:
        steps = list(reference(trial, proof))
    except UserError as error:
        obstacle = str(error)
    messages = findings(built, dropped, subject.batch, steps, mesh.size)
    if obstacle:
        return replace(proof, findings=(obstacle, *messages), obstacle=SEE_ABOVE)
    assert steps is not None
    if not proof.in_float64:
        messages.append(
            "the model does not compute in float64, so it was compared in its own dtype, where "
            "rounding hides small errors; let it follow the dtype of its inputs"
        )
    gradients = steps[0][1]["gradient"]
    idle = [n for n, p in built.named_parameters() if p.requires_grad and gradients[n] is None]
    keep = None if has_batchnorm(built) else steps
    return replace(proof, findings=tuple(messages), steps=keep, idle=tuple(idle))


def can_compute(trial: Trial, proof: Proof) -> bool:
    """Whether forward and backward run on every rank in the dtype of `proof`. Collective."""
    subject = trial.subject
    assert subject.batch is not None
    model, batch = proof.build(subject).to(trial.mesh.device), proof.batch(subject.batch)
    try:
        with seeded():
            checked = batches.checked_batch(lambda step: batch, 0, trial.mesh.device)
            loss_and_gradients(model, [checked], subject.loss_sum)
        runs = b"yes"
    except Exception:
        runs = b""
    return set(ops.all_gather_bytes(runs, trial.mesh.world)) == {b"yes"}


def reference(trial: Trial, proof: Proof) -> Iterator[tuple[Pair, State]]:
    """Yields copies of the steps of one process, after running the first one a second time."""
    subject, mesh = trial.subject, trial.mesh
    assert subject.batch is not None
    batch = proof.batch(subject.batch)
    if mesh.size > 1 and batches.all_rows_equal(batch[0]):
        raise UserError(
            "all rows of the batch are equal, which would hide a missing sum over ranks; give rows "
            "that differ"
        )
    model = proof.build(subject).to(mesh.device)
    dtype = coarsest(model, None, None)
    run_options: dict[str, Any] = {
        "microbatches": trial.microbatches, "loss_sum": subject.loss_sum, "param_dtype": None,
        "sync_batchnorm": False,
    }  # fmt: skip
    source = lambda: proof.build(subject), lambda step: batch, mesh.size, mesh.device
    steps = one_process(
        *source, steps=trial.steps, clip=1.0, optimizer=torch.optim.AdamW, options=ADAM,
        **run_options,
    )  # fmt: skip
    built = weights_and_buffers(model)
    again = repeat_first_step(
        steps, built, *source, dtype=dtype, tolerance=TOLERANCE[dtype], **run_options
    )
    pieces = mesh.size * trial.microbatches if has_batchnorm(model) else 1
    for step in checked_steps(_as_user_error(again, pieces), mesh):
        yield copy.deepcopy(step)  # the next step changes the state in place


def _as_user_error(
    steps: Iterable[tuple[Pair, State]], pieces: int
) -> Iterator[tuple[Pair, State]]:
    try:
        yield from steps
    except (UserError, MachineError):
        raise
    except Exception as error:
        split = f", split into {pieces} as for BatchNorm" if pieces > 1 else ""
        raise UserError(
            f"the model fails on the batch in one process{split}: {one_line(error)}"
        ) from error


def amplified_rounding(
    trial: Trial, proof: Proof, ranks: int, microbatches: int
) -> dict[int, float]:
    """Step -> the error of one process against itself with weights changed in the last digit.

    Layers that divide by nearly zero, such as BatchNorm over two rows, amplify rounding, however it
    arises.

    Args:
        ranks, microbatches: how the compared run splits the batch; it matters for BatchNorm.
    """
    subject = trial.subject
    assert subject.batch is not None
    batch = proof.batch(subject.batch)

    def perturbed_model() -> nn.Module:
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

    dtype, rounding = coarsest(perturbed_model(), None, None), dict[str, Tensor]()
    pairs = zip(steps(lambda: proof.build(subject)), steps(perturbed_model), strict=True)
    return {
        step: max(c.error for c in compare(step, perturbed, plain, rounding, dtype) if c.judged)
        for step, ((_, plain), (_, perturbed)) in enumerate(pairs)
    }
