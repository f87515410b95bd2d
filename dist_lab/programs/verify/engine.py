"""The comparison engine: is a parallel run equal to one process?

Agreement among ranks is not enough, and a falling loss is not enough. The reference is a dozen
lines of plain PyTorch on the whole batch, with nothing of ours in it. Every rank runs it, and
compares with it what the job under test has after every step: the loss, every gradient (summed,
before clipping), the global gradient norm and every weight after the update.

    error = max|a - b| / max(max|b|, 1e-3 x the median over tensors of max|b|)

The floor is for tensors that are nearly zero: relative to nothing, rounding is everything. A tensor
whose true gradient is zero (the key bias of attention: softmax does not see it) holds only
rounding, which Adam divides by itself and turns into a full step; the weights of such tensors are
listed and not judged.

In float64 a bug shows at 1e-10 and rounding does not; that is the dtype to verify in.

[Note: BatchNorm] It makes the gradient depend on which rows are normalized together. So the one
process then takes the batch in the same pieces: each rank's micro-batches one by one, or, where
SyncBatchNorm is asked for, the micro-batches of all ranks together. In the second case the buffers
are compared as well; in the first there is nothing to compare those of several ranks with.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.compose import parallelize
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify.report import Comparison, Report
from dist_lab.step.protocol import Apply
from dist_lab.torch_private import AnyBatchNorm, AnyDropout
from dist_lab.transforms.precision import compute_in

# The largest error that rounding explains, by the dtype of compute: sums in another order, through
# a few optimizer steps. A bug is larger than any of them by orders of magnitude in float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}
Tensors = Mapping[str, Tensor | None]
State = dict[str, Tensors]  # quantity -> name -> its value after a step, in the order of comparison


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
) -> Report:
    """Train a model twice, in parallel and in one process, and compare. Collective over the mesh.

    Args:
        build_model: gives the same weights at every call on every rank; its dtype is the dtype of
            the comparison.
        build_batch: step -> (inputs, targets), the whole global batch, rows first. The same on
            every rank; each takes its rows, so any number of rows is right.
        microbatches: in how many pieces a rank accumulates.
        options: of the optimizer; default lr=1e-3.
        loss_sum: (output, target) -> the sum over the rows; the engine divides by the number of
            targets.
        param_dtype: see `parallelize`; the reference then computes in it too.
        tolerance: default by dtype, see TOLERANCE.
        reference: the steps of the one process, where they are known: see `one_process`.
        sync_batchnorm, strategy_options: see `parallelize`.

    Raises:
        UserError: rows that are all alike (a forgotten sum over ranks would go unseen), dropout.
    """
    options = {"lr": 1e-3} if options is None else options
    tested = build_model().to(mesh.device)
    _refuse_dropout(tested)
    dtype = param_dtype or next(tested.parameters()).dtype
    job = parallelize(
        tested, mesh, strategy, impl, units=units, param_dtype=param_dtype,
        broadcast=False, sync_batchnorm=sync_batchnorm, **strategy_options,
    )  # fmt: skip
    ours = job.optimizer(optimizer, **options)
    if reference is None:
        reference = one_process(
            build_model, build_batch, mesh.data.size, mesh.device, steps=steps,
            microbatches=microbatches, clip=clip, optimizer=optimizer, options=options,
            loss_sum=loss_sum, param_dtype=param_dtype, sync_batchnorm=sync_batchnorm,
        )  # fmt: skip
    found: list[Comparison] = []
    for step, (batch, expected) in enumerate(reference):
        inputs, _ = batch
        alike = len(inputs) > 1 and bool((inputs == inputs[:1]).all())
        if step == 0 and mesh.data.size > 1 and alike:
            raise UserError("every row of the batch is alike; ranks need different data to verify")
        state = _tested_step(job, ours, batch, microbatches, clip, loss_sum)
        found += _compare(step, state, expected, dtype)
    label = f"{strategy}@{impl}" if isinstance(strategy, str) else strategy.__qualname__
    return Report(
        label, str(mesh), str(dtype).removeprefix("torch."),
        TOLERANCE[dtype] if tolerance is None else tolerance, _worst_over_ranks(found, mesh),
    )  # fmt: skip


def one_process(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Pair],
    ranks: int,
    device: torch.device,
    *,
    steps: int,
    microbatches: int,
    clip: float | None,
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    loss_sum: LossFn = cross_entropy_sum,
    param_dtype: torch.dtype | None = None,
    sync_batchnorm: bool = False,
) -> Iterator[tuple[Pair, State]]:
    """Train in one process, by PyTorch alone; yield each step's batch and the state after it.

    The next step changes a state in place: copy it to compare several jobs with one reference.

    Args:
        ranks: a model with BatchNorm takes the batch in their pieces; to others it does not matter.
    """
    model = build_model().to(device)
    if not any(isinstance(module, AnyBatchNorm) for module in model.modules()):
        ranks = microbatches = 1  # the rows do not depend on each other: the batch is one piece
    if param_dtype is not None:
        compute_in(model, param_dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    stepped = optimizer(trained, **options)
    for step in range(steps):
        inputs, targets = (tensor.to(device) for tensor in build_batch(step))
        loss = 0.0
        for x, y in _normalized_together(inputs, targets, ranks, microbatches, sync_batchnorm):
            share = loss_sum(model(x), y) / targets.numel()
            share.backward()
            loss += float(share.detach())
        gradients = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in reversed(list(model.named_parameters()))  # in the order of backward
        }
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        stepped.step()
        stepped.zero_grad()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        comparable = sync_batchnorm or ranks == 1
        kept = model.state_dict() if comparable else {}
        buffers = {name: b for name, b in model.named_buffers() if name in kept}
        yield (inputs, targets), _state(loss, gradients, float(norm), weights, buffers)


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
    mine = slice_rows(*batch, data.size)[data.index]
    total = job.count(mine[1].numel())
    loss = job.run(
        slice_rows(*mine, microbatches),
        lambda output, target: loss_sum(output, target) / total,
    )
    job.finish()
    gradients = job.full_gradients()
    norm = job.clip_grad_norm(clip)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    weights = job.full_state_dict()
    return _state(loss, gradients, norm, weights, weights)


def _state(
    loss: float, gradients: Tensors, norm: float, weights: Tensors, buffers: Tensors
) -> State:
    """The state after a step. Gradients are summed over ranks, and not yet clipped."""

    def number(value: float) -> Tensors:
        return {"": torch.tensor(value, dtype=torch.float64)}

    return {
        "loss": number(loss),
        "gradient": gradients,
        "grad norm": number(norm),
        "weight": weights,
        "buffer": buffers,
    }


def _normalized_together(
    inputs: Tensor, targets: Tensor, ranks: int, microbatches: int, over_ranks: bool
) -> list[Pair]:
    """The global batch in the pieces whose rows depend on each other: see [Note: BatchNorm]."""
    by_rank = [slice_rows(*rows, microbatches) for rows in slice_rows(inputs, targets, ranks)]
    if not over_ranks:
        return [pair for pairs in by_rank for pair in pairs if len(pair[0])]
    return [
        (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        for pairs in zip(*by_rank, strict=True)
    ]


def slice_rows(inputs: Tensor, targets: Tensor, parts: int) -> list[Pair]:
    """A batch in consecutive parts that differ by a row at most."""
    return list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))


# --- comparing ------------------------------------------------------------------------------------


def _compare(step: int, ours: State, theirs: State, dtype: torch.dtype) -> list[Comparison]:
    noise = _only_rounding(theirs["gradient"], dtype)
    found = []
    for quantity, tensors in theirs.items():
        floor = 1e-3 * statistics.median([*_largest(tensors).values()] or [0.0])
        for name, tensor in tensors.items():
            error = _error(ours[quantity][name], tensor, floor)
            judged = quantity != "weight" or name not in noise
            found.append(Comparison(step, quantity, name, error, 0, judged))
    return found


def _error(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf  # one has a gradient where the other has none
    if b.numel() == 0:
        return 0.0
    largest = float((a - b).abs().max())
    scale = max(float(b.abs().max()), floor)
    return largest / scale if scale else math.inf if largest else 0.0


def _only_rounding(gradients: Tensors, dtype: torch.dtype) -> set[str]:
    """Tensors whose gradient is so small beside the others' that it may be rounding alone."""
    sizes = _largest(gradients)
    below = min(64 * torch.finfo(dtype).eps, 1e-2) * statistics.median(sizes.values())
    return {name for name, size in sizes.items() if 0 < size <= below}


def _largest(tensors: Tensors) -> dict[str, float]:
    """The largest magnitude in each tensor that has elements."""
    return {n: float(t.abs().max()) for n, t in tensors.items() if t is not None and t.numel()}


def _worst_over_ranks(found: list[Comparison], mesh: Mesh) -> list[Comparison]:
    """One report for all: of each comparison, the rank that is furthest off."""
    errors = torch.tensor([[c.error for c in found]], dtype=torch.float64)
    errors = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    worst, rank = ops.all_gather(errors, mesh.world).max(0)
    return [
        replace(c, error=float(e), rank=int(r)) for c, e, r in zip(found, worst, rank, strict=True)
    ]


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AnyDropout) and module.p > 0:
            raise UserError(
                f"{name} drops with p={module.p}: every layout draws other masks, so no two runs "
                "are equal; set p=0 to verify"
            )
