"""The one process that a parallel run is compared with: plain PyTorch on the whole batch.

What would make a right run look wrong is refused in one line on every rank: here a model of which
nothing can be compared, a step that is not finite, a batch that ranks do not have in common; in
repeat.py what does not come out the same when one process runs it twice.

[Note: BatchNorm] It makes the gradient depend on which rows are normalized together. So the one
process then takes the batch in the same pieces: each rank's micro-batches one by one, or, where
SyncBatchNorm is asked for, the micro-batches of all ranks together. In the second case the buffers
are compared as well; in the first there is nothing to compare those of several ranks with.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair, cross_entropy_sum, one_number
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import State, Tensors
from dist_lab.torch_private import AnyBatchNorm, AnyDropout
from dist_lab.transforms.precision import compute_in


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
    model = build(build_model, device, param_dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    stepped = optimizer(trained, **options)
    for step in range(steps):
        batch = batches.take(build_batch, step, device)
        pieces = normalized_together(model, batch, ranks, microbatches, sync_batchnorm)
        loss, gradients = loss_and_gradients(model, pieces, loss_sum)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        stepped.step()
        stepped.zero_grad()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        comparable = sync_batchnorm or ranks == 1 or not has_batchnorm(model)
        kept = model.state_dict() if comparable else {}
        buffers = {name: b for name, b in model.named_buffers() if name in kept}
        yield batch, state(loss, gradients, float(norm), weights, buffers)


def state(
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


def build(
    build_model: Callable[[], nn.Module], device: torch.device, param_dtype: torch.dtype | None
) -> nn.Module:
    model = build_model().to(device)
    if param_dtype is not None:
        compute_in(model, param_dtype)
    return model


def loss_and_gradients(
    model: nn.Module, pieces: list[Pair], loss_sum: LossFn
) -> tuple[float, dict[str, Tensor | None]]:
    """Of the whole batch, whose pieces are run one by one. Leaves the gradients in `.grad`."""
    total, loss, reached = sum(batches.count(y) for _, y in pieces), 0.0, False
    for piece in pieces:
        x, y = batches.copy(piece)
        share = one_number(loss_sum(model(x), y)) / total
        if share.requires_grad:
            share.backward()
            reached = True
        loss += float(share.detach())
    if not reached:
        raise UserError("the loss depends on no parameter that is trained; was it detached?")
    return loss, {
        name: None if p.grad is None else p.grad.clone()
        for name, p in reversed(list(model.named_parameters()))  # in the order of backward
    }


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, AnyBatchNorm) for module in model.modules())


def normalized_together(
    model: nn.Module, batch: Pair, ranks: int, microbatches: int, over_ranks: bool
) -> list[Pair]:
    """The global batch in the pieces whose rows depend on each other: see [Note: BatchNorm]."""
    if not has_batchnorm(model):  # the rows do not depend on each other: the batch is one piece
        return [batch]
    by_rank = [batches.slice_rows(part, microbatches) for part in batches.slice_rows(batch, ranks)]
    if not over_ranks:
        return [pair for pairs in by_rank for pair in pairs if batches.rows_in(pair[0])]
    return [batches.join(list(pairs)) for pairs in zip(*by_rank, strict=True)]


# --- what is refused ------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Raises UserError for a model of which nothing can be compared."""
    if not isinstance(model, nn.Module):
        raise UserError(f"build_model() gives a module that has been built, not {model!r:.60}")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise UserError("the model has no parameter; there is nothing to train and to compare")
    for name, parameter in parameters.items():
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            raise UserError(f"{name} has no values yet; build_model() gives a model that has all")
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(
            "every parameter of the model is frozen; leave requires_grad=True for what is trained"
        )
    for name, module in model.named_modules():
        if isinstance(module, AnyDropout) and module.p > 0 and module.training:
            raise UserError(
                f"{name or 'the model'} drops with p={module.p}: every layout draws other masks, "
                "so no two runs are equal; set p=0 to verify"
            )


def agreed(reference: Iterable[tuple[Pair, State]], mesh: Mesh) -> Iterator[tuple[Pair, State]]:
    """Each step of the reference, once it is found finite and of one batch on all ranks.

    Collective. What a rank refuses, all refuse.
    """
    steps = iter(reference)
    for step in count():
        with together(mesh.world):
            taken = next(steps, None)
        if taken is None:
            return
        batches.check_ranks_agree(taken[0], step, mesh)
        with together(mesh.world):
            _check_finite(step, taken[1])
        yield taken


def _check_finite(step: int, expected: State) -> None:
    trained = {name for name, g in expected["gradient"].items() if g is not None}
    for quantity, tensors in expected.items():
        for name, tensor in tensors.items():
            may_be_infinite = quantity == "buffer" or (quantity == "weight" and name not in trained)
            if tensor is not None and not may_be_infinite and not bool(tensor.isfinite().all()):
                raise UserError(
                    f"the reference itself is not finite at step {step}: the {quantity}"
                    f"{' of ' * bool(name)}{name} in one process; lower the learning rate or look "
                    "at the model and the batch"
                )
