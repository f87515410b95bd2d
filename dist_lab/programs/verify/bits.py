"""Is a parallel run equal to one process to the bit? For `--reduce-order fixed`.

The reference is plain PyTorch. It runs forward and backward of one virtual shard after another, and
adds their gradients up along one binary tree, which is the recursion of `sum_of_shards`. The order
is part of what is compared: any other gives other last digits, in one process too.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair
from dist_lab.optim.matrices import Groups
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.compare import State, error
from dist_lab.programs.verify.reference import (
    OnModel,
    build,
    state,
    weights_and_buffers_of,
)
from dist_lab.programs.verify.report import Comparison
from dist_lab.randomness.dropout import bind, named_dropouts
from dist_lab.randomness.place import Place
from dist_lab.step.optimizer_options import groups_of

Gradients = dict[str, Tensor | None]


def one_process_by_shards(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Pair],
    ranks: int,
    device: torch.device,
    *,
    shards: int,
    steps: int,
    clip: float | None,
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    groups: Groups | None = None,
    loss_sum: LossFn,
    dropout: str | None = None,
    recipe: OnModel | None = None,
    seed: int = 0,
) -> Iterator[tuple[Pair, State]]:
    """Train in one process, shard by shard; yield each step's batch and the state after it.

    The next step changes the state in place. The arguments are those of `one_process`.
    """
    model = build(build_model, device, None, dropout, recipe)
    place = Place()
    place.seed = seed
    bind(named_dropouts(model), place)
    reference_optimizer = optimizer(groups_of(model, groups), **options)
    for step in range(steps):
        batch = batches.checked_batch(build_batch, step, device)
        check_rows(batch, shards)
        pieces, total = batches.slice_rows(batch, shards), batches.count(batch[1])
        place.step = step
        losses, gradients = sum_of_shards(model, pieces, loss_sum, total, place)
        norm = exact_norm(gradients.values())
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for name, parameter in model.named_parameters():
            gradient = gradients[name]
            parameter.grad = None if gradient is None else gradient * factor
        reference_optimizer.step()
        weights, buffers = weights_and_buffers_of(model, ranks == 1)
        yield batch, state(math.fsum(losses), gradients, norm, weights, buffers)


def sum_of_shards(
    model: nn.Module, shards: list[Pair], loss_sum: LossFn, total: int, place: Place, first: int = 0
) -> tuple[list[float], Gradients]:
    """The losses of some neighbouring shards, and the sum of their gradients along the tree.

    Args:
        place: of exact dropout; `first` is the number of the first row.
    """
    rows = [batches.rows_in(inputs) for inputs, _ in shards]
    if len(shards) == 1:
        inputs, targets = batches.copy(shards[0])
        model.zero_grad()
        with place.microbatch(range(first, first + rows[0]), last=True):
            loss = loss_sum(model(inputs), targets) / total
            loss.backward()
        return [float(loss.detach())], {name: p.grad for name, p in model.named_parameters()}
    half = len(shards) // 2
    middle = first + sum(rows[:half])
    losses, left = sum_of_shards(model, shards[:half], loss_sum, total, place, first)
    more_losses, right = sum_of_shards(model, shards[half:], loss_sum, total, place, middle)
    return losses + more_losses, {name: _add(left[name], right[name]) for name in left}


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of two gradients. One that did not come is zeros, unless neither came."""
    if left is None or right is None:
        present = left if right is None else right
        return None if present is None else present + 0.0
    return left + right


def exact_norm(gradients: Iterable[Tensor | None]) -> float:
    """The norm, rounded once: squares of float32 are exact in float64, and fsum adds exactly."""
    each = (g.double().square().flatten().tolist() for g in gradients if g is not None)
    return math.sqrt(math.fsum(square for squares in each for square in squares))


def check_rows(batch: Pair, shards: int) -> None:
    """Raise UserError if a virtual shard would have no row."""
    rows = batches.rows_in(batch[0])
    if rows < shards:
        most = 1 << (rows.bit_length() - 1)
        raise UserError(
            f"{rows} rows are fewer than {shards} virtual shards (reduce_order=); give "
            f'reduce_order="fixed:{most}", or more rows'
        )


def compare_bits(step: int, ours: State, theirs: State) -> list[Comparison]:
    """Compares every quantity of one step: the error is 0 only if all bits are equal."""
    comparisons = []
    for quantity, tensors in theirs.items():
        for name, tensor in tensors.items():
            other = ours[quantity].get(name)
            difference = 0.0
            if not equal_bits(other, tensor):
                difference = error(other, tensor, 0.0) or math.ulp(0.0)  # the sign of a zero
            comparisons.append(Comparison(step, quantity, name, difference, 0, judged=True))
    return comparisons


def equal_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
