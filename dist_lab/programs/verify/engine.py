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
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.compose import parallelize
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.loss import cross_entropy_sum
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify.report import Comparison, Report
from dist_lab.step.protocol import Apply
from dist_lab.torch_private import AnyBatchNorm, AnyDropout
from dist_lab.transforms.precision import compute_in

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
    reference = Reference(
        build_model, build_batch, steps=steps, microbatches=microbatches, clip=clip,
        optimizer=optimizer, options={"lr": 1e-3} if options is None else options,
        loss_sum=loss_sum, param_dtype=param_dtype, sync_batchnorm=sync_batchnorm,
    )  # fmt: skip
    return reference.compare(
        mesh, strategy, impl, units=units, tolerance=tolerance, **strategy_options
    )


Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Wanted:
    """What one process has after a step on this batch, gradients summed and not yet clipped."""

    batch: Batch
    loss: float
    gradients: Gradients
    norm: float
    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """What is trained, on what and how: by one process, and by every job that is held against it.

    A job is told by the reference what to train, so it cannot be held against another's numbers.

    Attributes:
        keep: the steps of the one process, for the next job; else it takes them with each, and of
            one step after another there is one in memory.
    """

    build_model: Callable[[], nn.Module]
    build_batch: Callable[[int], Batch]
    steps: int
    microbatches: int
    clip: float | None
    optimizer: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    loss_sum: LossSum = cross_entropy_sum
    param_dtype: torch.dtype | None = None
    sync_batchnorm: bool = False
    keep: bool = False
    kept: dict[tuple[int, torch.device], list[Wanted]] = field(default_factory=dict, init=False)

    def compare(
        self,
        mesh: Mesh,
        strategy: str | Apply,
        impl: str,
        *,
        units: Iterable[type[nn.Module] | str] = (),
        tolerance: float | None = None,
        **strategy_options: Any,
    ) -> Report:
        """Train in parallel, and compare after every step: see `verify`."""
        tested = self.build_model().to(mesh.device)
        _refuse_dropout(tested)
        dtype = self.param_dtype or next(tested.parameters()).dtype
        kind = _normalization(tested, self.sync_batchnorm)
        job = parallelize(
            tested, mesh, strategy, impl, units=units, param_dtype=self.param_dtype,
            broadcast=False, sync_batchnorm=self.sync_batchnorm, **strategy_options,
        )  # fmt: skip
        ours = job.optimizer(self.optimizer, **self.options)
        found: list[Comparison] = []
        for step, wanted in enumerate(self._trained(mesh.data.size, kind, mesh.device)):
            inputs, targets = wanted.batch
            if step == 0 and mesh.data.size > 1 and len(inputs) > 1 and _are_alike(inputs):
                raise UserError(
                    "every row of the batch is alike; ranks need different data to verify"
                )
            loss, gradients, norm = _tested_step(
                job, ours, inputs, targets, self.microbatches, self.clip, self.loss_sum
            )
            weights = job.full_state_dict()
            buffers = {name: b for name, b in wanted.buffers.items() if name in weights}
            noise = _only_rounding(wanted.gradients, dtype)
            found += _compare_scalar(step, "loss", loss, wanted.loss)
            found += _compare(step, "gradient", gradients, wanted.gradients, set())
            found += _compare_scalar(step, "grad norm", norm, wanted.norm)
            found += _compare(step, "weight", weights, wanted.weights, noise)
            if kind != "by rank" or mesh.data.size == 1:
                found += _compare(step, "buffer", weights, buffers, set())
        label = f"{strategy}@{impl}" if isinstance(strategy, str) else strategy.__qualname__
        return Report(
            label, str(mesh), str(dtype).removeprefix("torch."),
            TOLERANCE[dtype] if tolerance is None else tolerance, _worst_over_ranks(found, mesh),
        )  # fmt: skip

    def _trained(self, ranks: int, kind: str, device: torch.device) -> Iterable[Wanted]:
        """Its steps, in the pieces of so many ranks where that makes a difference."""
        if not self.keep:
            return self._train(ranks, kind, device)
        key = (1 if kind == "none" else ranks), device
        if key not in self.kept:
            self.kept[key] = [deepcopy(wanted) for wanted in self._train(ranks, kind, device)]
        return self.kept[key]

    def _train(self, ranks: int, kind: str, device: torch.device) -> Iterator[Wanted]:
        """One process, PyTorch alone, the whole batch at once or in pieces."""
        model = self.build_model().to(device)
        if self.param_dtype is not None:
            compute_in(model, self.param_dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.optimizer(trained, **self.options)
        for step in range(self.steps):
            inputs, targets = (tensor.to(device) for tensor in self.build_batch(step))
            loss = 0.0
            for x, y in _normalized_together(inputs, targets, ranks, self.microbatches, kind):
                share = self.loss_sum(model(x), y) / targets.numel()
                share.backward()
                loss += float(share.detach())
            gradients = {
                name: None if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
            }
            limit = math.inf if self.clip is None else self.clip
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
            optimizer.step()
            optimizer.zero_grad()
            weights = {name: p.detach() for name, p in model.named_parameters()}
            buffers = dict(model.named_buffers())
            yield Wanted((inputs, targets), loss, gradients, norm, weights, buffers)


# --- the step of a job ----------------------------------------------------------------------------


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
    if not any(isinstance(module, AnyBatchNorm) for module in model.modules()):
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


def _are_alike(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AnyDropout) and module.p > 0:
            raise UserError(
                f"{name} drops with p={module.p}: every layout draws other masks, so no two runs "
                "are equal; set p=0 to verify"
            )
