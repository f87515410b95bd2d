"""The comparison engine: is a parallel run equal to one process?

Agreement among ranks is not enough, and a falling loss is not enough. The reference is a dozen
lines of plain PyTorch on the whole batch, with nothing of ours in it: see reference.py. Every rank
runs it, and compares with it what the job under test has after every step: the loss, every gradient
(summed, before clipping), the global gradient norm and every weight after the update. How far two
tensors are apart, and what is rounding, says compare.py.

In float64 a bug shows at 1e-10 and rounding does not; that is the dtype to verify in.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.compose import parallelize
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import TOLERANCE, State, compare, worst_over_ranks
from dist_lab.programs.verify.reference import agreed, check_model, one_process, state
from dist_lab.programs.verify.repeat import repeated, weights_and_buffers
from dist_lab.programs.verify.report import Comparison, VerifyReport
from dist_lab.step.protocol import Apply


def verify(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Pair],
    mesh: Mesh,
    strategy: str | Apply = "dp",
    impl: str = "hand",
    *,
    steps: int = 3,
    microbatches: int = 1,
    clip: float | None = 1.0,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,
    loss_sum: LossFn = cross_entropy_sum,
    units: Iterable[type[nn.Module] | str] = (),
    param_dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    sync_batchnorm: bool = False,
    reference: Iterable[tuple[Pair, State]] | None = None,
    **strategy_options: Any,
) -> VerifyReport:
    """Train a model twice, in parallel and in one process, and compare. Collective over the mesh.

    Args:
        build_model: gives the same weights at every call on every rank; its dtype is the dtype of
            the comparison, the coarsest if it has several.
        build_batch: step -> (inputs, targets), the whole global batch: tensors, or dicts, tuples,
            lists and dataclasses of tensors, rows first in each. The same at every call on every
            rank; each takes its rows, so any number of rows is right.
        microbatches: in how many pieces a rank accumulates.
        options: of the optimizer; default lr=1e-3.
        loss_sum: (output, target) -> the sum over the rows; the engine divides by the number of
            targets: the elements of the target tensor, of a structure those of its first tensor.
        param_dtype: see `parallelize`; the reference then computes in it too.
        tolerance: default by dtype, see TOLERANCE.
        reference: the steps of the one process, where they are known: see `one_process`. They are
            not run again to see whether they come out the same.
        sync_batchnorm, strategy_options: see `parallelize`.

    Raises:
        UserError: on every rank, where no strategy is to blame. Rows that are all alike (a
            forgotten sum over ranks would go unseen); dropout, or whatever else one process does
            otherwise the second time, see `repeated`; a batch that ranks do not have in common, or
            that cannot be cut by rows; nothing to train; a reference that is not finite.
    """
    options = {"lr": 1e-3} if options is None else options
    if min(steps, microbatches) < 1:
        raise UserError(f"steps={steps} and microbatches={microbatches} are 1 at least")
    with together(mesh.world):
        tested = build_model()
        check_model(tested)
        dtype = coarsest(tested, param_dtype, tolerance)
    tested = tested.to(mesh.device)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    built = weights_and_buffers(tested) if reference is None else {}
    job = parallelize(
        tested, mesh, strategy, impl, units=units, param_dtype=param_dtype,
        broadcast=False, sync_batchnorm=sync_batchnorm, **strategy_options,
    )  # fmt: skip
    ours = job.optimizer(optimizer, **options)
    if reference is None:
        made: dict[str, Any] = {
            "microbatches": microbatches, "loss_sum": loss_sum, "param_dtype": param_dtype,
            "sync_batchnorm": sync_batchnorm,
        }  # fmt: skip
        where = build_model, build_batch, mesh.data.size, mesh.device
        reference = one_process(
            *where, steps=steps, clip=clip, optimizer=optimizer, options=options, **made
        )
        reference = repeated(
            reference, built, *where, dtype=dtype,
            tolerance=max(tolerance, TOLERANCE.get(dtype, 0.0)), **made,
        )  # fmt: skip
    found: list[Comparison] = []
    rounding: dict[str, Tensor] = {}
    for step, (batch, expected) in enumerate(agreed(reference, mesh)):
        if step == 0 and mesh.data.size > 1 and batches.rows_are_alike(batch[0]):
            raise UserError("every row of the batch is alike; ranks need different data to verify")
        after = _tested_step(job, ours, batches.copy(batch), microbatches, clip, loss_sum)
        found += compare(step, after, expected, rounding, dtype)
    label = f"{strategy}@{impl}" if isinstance(strategy, str) else strategy.__qualname__
    return VerifyReport(
        label, str(mesh), str(dtype).removeprefix("torch."), tolerance,
        worst_over_ranks(found, mesh),
    )  # fmt: skip


def _tested_step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    batch: Pair,
    microbatches: int,
    clip: float | None,
    loss_sum: LossFn,
) -> State:
    """The same step as a user of the library would write it."""
    data = job.mesh.data
    mine = batches.slice_rows(batch, data.size)[data.index]
    total = job.count(batches.count(mine[1]))
    loss = job.run(
        batches.slice_rows(mine, microbatches),
        lambda output, target: loss_sum(output, target) / total,
    )
    job.finish()
    gradients = job.full_gradients()
    norm = job.clip_grad_norm(clip)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    weights = job.full_state_dict()
    return state(loss, gradients, norm, weights, weights)


def coarsest(
    model: nn.Module, param_dtype: torch.dtype | None, tolerance: float | None
) -> torch.dtype:
    """The dtype whose rounding is the largest of those that the model computes in."""
    named = reversed([*model.named_parameters()])
    of = {p.dtype: name for name, p in named if p.is_floating_point()}  # the first that has it
    dtypes = [param_dtype] if param_dtype is not None else list(of)
    coarsest = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, math.inf))
    if coarsest not in TOLERANCE and tolerance is None:
        name = str(coarsest).removeprefix("torch.")
        raise UserError(
            f"{of.get(coarsest, 'param_dtype')} is {name}, for which no tolerance is known; build "
            "the model in float64 to verify, or give tolerance="
        )
    return coarsest
