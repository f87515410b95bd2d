"""The reference that a parallel run is compared with: one process, plain PyTorch, the whole batch.

A problem that would make a correct run look wrong is a one-line error on every rank. This file
checks for a model without anything to compare, a step that is not finite, and a batch that differs
between ranks. repeat.py checks for a step that one process cannot repeat.

[Note: BatchNorm] BatchNorm makes the gradient depend on which rows are normalized together. So the
reference splits the batch as the ranks do: it runs each rank's micro-batches one by one, or with
SyncBatchNorm the i-th micro-batches of all ranks as one. With SyncBatchNorm the buffers are
compared too. Without it each rank has buffers of its own, and one process has no counterpart.

[Note: rows that are rounded] A recipe that rounds inputs with one scale per tensor takes the scale
over all rows of a micro-batch, on all ranks. So the reference runs the i-th micro-batches of all
ranks as one, as it does with SyncBatchNorm.

[Note: dropout] Exact dropout is the one random layer that a comparison can have. Its mask is a
function of the step and of a row's number in the batch (randomness/dropout.py). One process has all
rows, so here their numbers are simply counted.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair, cross_entropy_sum, one_number
from dist_lab.mesh.mesh import Mesh
from dist_lab.optim.matrices import Groups
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import State, Tensors
from dist_lab.randomness.dropout import Dropout, bind, named_dropouts, use_exact_dropout
from dist_lab.randomness.place import Place
from dist_lab.step.optimizer_options import groups_of
from dist_lab.torch_private import AnyBatchNorm, AnyDropout
from dist_lab.transforms.precision import compute_in
from dist_lab.transforms.recipe import Recipe


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
    groups: Groups | None = None,
    loss_sum: LossFn = cross_entropy_sum,
    param_dtype: torch.dtype | None = None,
    sync_batchnorm: bool = False,
    dropout: str | None = None,
    recipe: "OnModel | None" = None,
    seed: int = 0,
) -> Iterator[tuple[Pair, State]]:
    """Train in one process with PyTorch alone; yield each step's batch and the state after it.

    The next step changes the state in place: copy it to compare several jobs with one reference.

    Args:
        ranks: how many ranks split the batch. Only a model with BatchNorm needs it.
        groups: as for `job.optimizer`.
        dropout, recipe, seed: see `parallelize`.
    """
    model = build(build_model, device, param_dtype, dropout, recipe)
    reference_optimizer = optimizer(groups_of(model, groups), **options)
    for step in range(steps):
        batch = batches.checked_batch(build_batch, step, device)
        how = ranks, microbatches, sync_batchnorm, recipe
        pieces, numbers = rows_together(model, batch, *how), row_numbers(model, batch, *how)
        loss, gradients = loss_and_gradients(model, pieces, loss_sum, numbers, step=step, seed=seed)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        weights, buffers = weights_and_buffers_of(model, sync_batchnorm or ranks == 1)
        yield batch, state(loss, gradients, float(norm), weights, buffers)


def weights_and_buffers_of(model: nn.Module, has_statistics: bool) -> tuple[Tensors, Tensors]:
    """The weights, and the buffers that are compared: those that are saved.

    Args:
        has_statistics: one process takes BatchNorm's statistics over the rows that a rank does.
    """
    comparable = has_statistics or not has_batchnorm(model)
    persistent = model.state_dict() if comparable else {}
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: p.detach() for name, p in model.named_parameters()}, buffers


def state(
    loss: float, gradients: Tensors, norm: float, weights: Tensors, buffers: Tensors
) -> State:
    """The state after a step. The gradients are summed over ranks and not clipped."""

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
    build_model: Callable[[], nn.Module],
    device: torch.device,
    param_dtype: torch.dtype | None,
    dropout: str | None = None,
    recipe: "OnModel | None" = None,
) -> nn.Module:
    model = build_model().to(device)
    if dropout == "exact":
        use_exact_dropout(model)
    if param_dtype is not None:
        compute_in(model, param_dtype)
    return model if recipe is None else recipe.recipe.on(model, recipe.units)


@dataclass(frozen=True)
class OnModel:
    """A recipe, and the units that `parallelize` is given: see [Note: rows that are rounded]."""

    recipe: Recipe
    units: tuple[type[nn.Module] | str, ...]


def loss_and_gradients(
    model: nn.Module,
    pieces: list[Pair],
    loss_sum: LossFn,
    numbers: Sequence[Tensor] | None = None,
    *,
    step: int = 0,
    seed: int = 0,
) -> tuple[float, dict[str, Tensor | None]]:
    """Loss and gradients of the whole batch, run piece by piece. Leaves gradients in `.grad`.

    Args:
        numbers: of each piece, the numbers of its rows in the batch; default: in order.
        step, seed: of exact dropout.
    """
    place = Place()
    place.step, place.seed = step, seed
    bind(named_dropouts(model), place)
    if numbers is None:
        rows = [batches.rows_in(x) for x, _ in pieces]
        numbers = torch.arange(sum(rows)).split(rows)
    total, loss, has_gradient = sum(batches.count(y) for _, y in pieces), 0.0, False
    for piece, samples in zip(pieces, numbers, strict=True):
        x, y = batches.copy(piece)
        with place.microbatch(samples, last=True):
            piece_loss = one_number(loss_sum(model(x), y)) / total
            if piece_loss.requires_grad:
                piece_loss.backward()
                has_gradient = True
        loss += float(piece_loss.detach())
    if not has_gradient:
        raise UserError(
            "the loss does not depend on any trained parameter; check that it is not detached"
        )
    return loss, {
        name: None if p.grad is None else p.grad.clone()
        for name, p in reversed(list(model.named_parameters()))  # in the order of backward
    }


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, AnyBatchNorm) for module in model.modules())


def rows_together(
    model: nn.Module, batch: Pair, ranks: int, microbatches: int, over_ranks: bool,
    recipe: OnModel | None = None,
) -> list[Pair]:  # fmt: skip
    """Splits the global batch into the rows that are computed together: [Note: BatchNorm]."""
    rounds_together = recipe is not None and recipe.recipe.mixes_rows
    if not has_batchnorm(model) and not rounds_together:
        return [batch]  # no row depends on another, so the batch stays in one piece
    by_rank = [batches.slice_rows(rows, microbatches) for rows in batches.slice_rows(batch, ranks)]
    if not over_ranks and not rounds_together:
        return [pair for pairs in by_rank for pair in pairs if batches.rows_in(pair[0])]
    return [batches.join(list(pairs)) for pairs in zip(*by_rank, strict=True)]


def row_numbers(
    model: nn.Module, batch: Pair, ranks: int, microbatches: int, over_ranks: bool,
    recipe: OnModel | None = None,
) -> list[Tensor]:  # fmt: skip
    """The numbers of the rows of each of `rows_together`."""
    numbers = torch.arange(batches.rows_in(batch[0]))
    both = numbers, numbers
    pieces = rows_together(model, both, ranks, microbatches, over_ranks, recipe)
    return [piece for piece, _ in pieces]


def batchnorm_in_words(model: nn.Module, ranks: int, microbatches: int, over_ranks: bool) -> str:
    """The rows that the reference normalizes together; "" for the whole batch or no BatchNorm."""
    if not has_batchnorm(model) or microbatches * (1 if over_ranks else ranks) == 1:
        return ""
    rows = "the same micro-batch of all ranks" if over_ranks else "one micro-batch of one rank"
    return f"in both, BatchNorm normalizes over {rows}, not over the whole batch"


# --- checks ---------------------------------------------------------------------------------------


def check_model(
    model: nn.Module, dropout: str | None = None, recipe: Recipe | None = None, *,
    sync_batchnorm: bool = False,
) -> None:  # fmt: skip
    """Raises UserError if the model has nothing to compare, active dropout that is not exact, or
    two layers of which each needs other rows together.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"build_model() must return a built module, not {model!r:.60}")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise UserError("the model has no parameters; give one that has something to train")
    for name, parameter in parameters.items():
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            raise UserError(
                f"{name} has no values yet; build_model() must return an initialized model"
            )
    mixes_rows = recipe is not None and recipe.mixes_rows
    if mixes_rows and has_batchnorm(model) and not sync_batchnorm:
        raise UserError(
            "BatchNorm takes statistics over one rank's rows, and the recipe ranges over all "
            "ranks' (recipe=), so one process has no counterpart; give sync_batchnorm=True, or one "
            "scale per token"
        )
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(
            "every parameter of the model is frozen; set requires_grad=True on those to train"
        )
    for name, module in model.named_modules():
        exact = dropout == "exact" or isinstance(module, Dropout)
        if isinstance(module, AnyDropout) and module.p > 0 and module.training and not exact:
            raise UserError(
                f"{name or 'the model'} is dropout with p={module.p}: every layout draws different "
                'masks, so no two runs are equal; give dropout="exact", or set p=0 to verify'
            )


def checked_steps(
    reference: Iterable[tuple[Pair, State]], mesh: Mesh
) -> Iterator[tuple[Pair, State]]:
    """Yields the reference's steps, each checked: it is finite, and all ranks have its batch.

    Collective: if one rank refuses a step, all ranks raise.
    """
    steps = iter(reference)
    for step in count():
        with together(mesh.world):
            reference_step = next(steps, None)
        if reference_step is None:
            return
        batches.check_ranks_agree(reference_step[0], step, mesh)
        with together(mesh.world):
            _check_finite(step, reference_step[1])
        yield reference_step


def _check_finite(step: int, expected: State) -> None:
    trained = {name for name, g in expected["gradient"].items() if g is not None}
    for quantity, tensors in expected.items():
        for name, tensor in tensors.items():
            may_be_infinite = quantity == "buffer" or (quantity == "weight" and name not in trained)
            if tensor is not None and not may_be_infinite and not bool(tensor.isfinite().all()):
                raise UserError(
                    f"the reference itself is not finite at step {step}: the {quantity}"
                    f"{' of ' * bool(name)}{name} in one process; lower the learning rate, or "
                    "check the model and the batch"
                )
