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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_lab.comm import ops
from dist_lab.compose import parallelize
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.loss import cross_entropy_sum
from dist_lab.mesh import Mesh
from dist_lab.parallel.sync import Apply
from dist_lab.parity_report import Comparison, Report
from dist_lab.precision import compute_in

# The largest error that rounding explains, by the dtype of compute: sums in another order, through
# a few optimizer steps. A bug is larger than any of them by orders of magnitude in float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}
Batch = tuple[Tensor, Tensor]
LossSum = Callable[[Tensor, Tensor], Tensor]


def verify(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Batch],
    mesh: Mesh,
    strategy: str | Apply = "dp",
    impl: str = "hand",
    *,
    steps: int = 3,
    microbatches: int = 1,
    clip: float | None = 1.0,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,
    loss_sum: LossSum = cross_entropy_sum,
    units: Iterable[type[nn.Module] | str] = (),
    param_dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    sync_batchnorm: bool = False,
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
        sync_batchnorm, strategy_options: see `parallelize`.

    Raises:
        UserError: rows that are all alike (a forgotten sum over ranks would go unseen), dropout.
    """
    reference, tested = (build_model().to(mesh.device) for _ in range(2))
    _refuse_dropout(reference)
    dtype = param_dtype or next(reference.parameters()).dtype
    job = parallelize(
        tested, mesh, strategy, impl, units=units, param_dtype=param_dtype, broadcast=False,
        sync_batchnorm=sync_batchnorm, **strategy_options,
    )  # fmt: skip
    if param_dtype is not None:
        compute_in(reference, param_dtype)
    options = {"lr": 1e-3} if options is None else options
    ours = job.optimizer(optimizer, **options)
    plain = optimizer([p for p in reference.parameters() if p.requires_grad], **options)

    kind = _normalization(reference, sync_batchnorm)
    found: list[Comparison] = []
    for step in range(steps):
        inputs, targets = (tensor.to(mesh.device) for tensor in build_batch(step))
        if step == 0 and mesh.data.size > 1 and len(inputs) > 1 and (inputs == inputs[:1]).all():
            raise UserError("every row of the batch is alike; ranks need different data to verify")
        pieces = _normalized_together(inputs, targets, mesh.data.size, microbatches, kind)
        wanted = _reference_step(reference, plain, pieces, clip, loss_sum)
        loss, gradients, norm = _tested_step(
            job, ours, inputs, targets, microbatches, clip, loss_sum
        )
        weights = job.full_state_dict()
        theirs = {name: p.detach() for name, p in reference.named_parameters()}
        buffers = {name: b for name, b in reference.named_buffers() if name in weights}
        noise = _only_rounding(wanted[1], dtype)
        found += _compare_scalar(step, "loss", loss, wanted[0])
        found += _compare(step, "gradient", gradients, wanted[1], set())
        found += _compare_scalar(step, "grad norm", norm, wanted[2])
        found += _compare(step, "weight", weights, theirs, noise)
        if kind != "by rank" or mesh.data.size == 1:
            found += _compare(step, "buffer", weights, buffers, set())
    label = f"{strategy}@{impl}" if isinstance(strategy, str) else strategy.__qualname__
    return Report(
        label, str(mesh), str(dtype).removeprefix("torch."),
        TOLERANCE[dtype] if tolerance is None else tolerance, _worst_over_ranks(found, mesh),
    )  # fmt: skip


# --- the two steps that must be equal -------------------------------------------------------------

Gradients = dict[str, Tensor | None]


def _reference_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Sequence[Batch],
    clip: float | None,
    loss_sum: LossSum,
) -> tuple[float, Gradients, float]:
    """One process, PyTorch alone, the whole batch at once or in the pieces given."""
    total, loss = sum(targets.numel() for _, targets in pieces), 0.0
    for inputs, targets in pieces:
        share = loss_sum(model(inputs), targets) / total
        share.backward()
        loss += float(share.detach())
    gradients = {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, gradients, float(norm)


def _tested_step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    microbatches: int,
    clip: float | None,
    loss_sum: LossSum,
) -> tuple[float, Gradients, float]:
    """The same step as a user of the library would write it."""
    data = job.mesh.data
    mine = slice_rows(inputs, targets, data.size)[data.index]
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
    return loss, gradients, norm


def _normalization(model: nn.Module, synchronized: bool) -> str:
    """Which rows a layer of the model normalizes together: see [Note: BatchNorm]."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return "none"
    return "over ranks" if synchronized else "by rank"


def _normalized_together(
    inputs: Tensor, targets: Tensor, ranks: int, microbatches: int, kind: str
) -> list[Batch]:
    """The global batch in the pieces whose rows depend on each other."""
    if kind == "none":
        return [(inputs, targets)]
    by_rank = [slice_rows(*rows, microbatches) for rows in slice_rows(inputs, targets, ranks)]
    if kind == "by rank":
        return [pair for pairs in by_rank for pair in pairs if len(pair[0])]
    return [
        (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        for pairs in zip(*by_rank, strict=True)
    ]


def slice_rows(inputs: Tensor, targets: Tensor, parts: int) -> list[Batch]:
    """A batch in consecutive parts that differ by a row at most."""
    return list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))


# --- comparing ------------------------------------------------------------------------------------


def _compare_scalar(step: int, quantity: str, a: float, b: float) -> list[Comparison]:
    return [Comparison(step, quantity, "", abs(a - b) / max(abs(b), 1e-300), 0, True)]


def _compare(
    step: int,
    quantity: str,
    ours: Mapping[str, Tensor | None],
    theirs: Mapping[str, Tensor | None],
    noise: set[str],
) -> list[Comparison]:
    sizes = [float(b.abs().max()) for b in theirs.values() if b is not None and b.numel()]
    floor = 1e-3 * statistics.median(sizes) if sizes else 0.0
    names = (
        reversed(list(theirs)) if quantity == "gradient" else theirs
    )  # backward ends at the first
    return [
        Comparison(step, quantity, n, _error(ours[n], theirs[n], floor), 0, n not in noise)
        for n in names
    ]


def _error(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf  # one has a gradient where the other has none
    if b.numel() == 0:
        return 0.0
    largest = float((a - b).abs().max())
    scale = max(float(b.abs().max()), floor)
    return largest / scale if scale else math.inf if largest else 0.0


def _only_rounding(gradients: Gradients, dtype: torch.dtype) -> set[str]:
    """Tensors whose gradient is so small beside the others' that it may be rounding alone."""
    sizes = {n: float(g.abs().max()) for n, g in gradients.items() if g is not None and g.numel()}
    below = min(64 * torch.finfo(dtype).eps, 1e-2) * statistics.median(sizes.values())
    return {name for name, size in sizes.items() if 0 < size <= below}


def _worst_over_ranks(found: list[Comparison], mesh: Mesh) -> list[Comparison]:
    """One report for all: of each comparison, the rank that is furthest off."""
    errors = torch.tensor([[c.error for c in found]], dtype=torch.float64)
    errors = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    worst, rank = ops.all_gather(errors, mesh.world).max(0)
    return [
        Comparison(c.step, c.quantity, c.tensor, float(e), int(r), c.judged)
        for c, e, r in zip(found, worst, rank, strict=True)
    ]


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UserError(
                f"{name} drops with p={module.p}: every layout draws other masks, so no two runs "
                "are equal; set p=0 to verify"
            )
