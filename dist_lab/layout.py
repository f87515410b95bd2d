"""Where a parameter lies, by its name. Initialisation, norms, clipping and checkpoints read only this.

    W[D, F]                           every rank holds all of it           Laid(shape, dtype)
    W[D_fsdp, F]                      rows are split over an axis          splits=((fsdp, Shard(0)),)
    W[(D_tp)_fsdp, F]                 tp splits first, then fsdp           splits=((tp, Shard(0)), (fsdp, Shard(0)))
    dW{U_tp}                          each rank has a part of the gradient sum_over=(tp,)

A split takes pieces of ceil(length / size), as torch.chunk does: the last may be short, or empty.
So a rank always holds a box of the whole tensor, which is what checkpoints and resharding need.
"""  # noqa: E501

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh import Axis


@dataclass(frozen=True)
class Shard:
    """Split along this dim of the tensor."""

    dim: int


@dataclass(frozen=True)
class Laid:
    """How one parameter lies.

    shape, dtype   of the whole tensor
    splits         in the order they were applied; an axis that is not named holds copies
    sum_over       axes over which its gradient is partial and owed a sum
    alias_of       tied: the name under which the tensor is counted
    """

    shape: torch.Size
    dtype: torch.dtype
    splits: tuple[tuple[Axis, Shard], ...] = ()
    sum_over: tuple[Axis, ...] = ()
    alias_of: str | None = None

    @property
    def box(self) -> tuple[slice, ...]:
        """The part of the whole tensor that this rank holds, one slice for each dim."""
        return self._box(len(self.splits))

    def _box(self, applied: int) -> tuple[slice, ...]:
        box = [slice(0, length) for length in self.shape]
        for axis, shard in self.splits[:applied]:
            whole = box[shard.dim]
            start, stop = piece(whole.stop - whole.start, axis.size, axis.index)
            box[shard.dim] = slice(whole.start + start, whole.start + stop)
        return tuple(box)


def piece(length: int, size: int, index: int) -> tuple[int, int]:
    """Start and stop of the index-th of `size` pieces.

    >>> [piece(10, 4, i) for i in range(4)], piece(2, 4, 3)
    ([(0, 3), (3, 6), (6, 9), (9, 10)], (2, 2))
    """
    step = -(-length // size)
    return min(index * step, length), min((index + 1) * step, length)


def slice_local(whole: Tensor, laid: Laid) -> Tensor:
    """This rank's part of a whole tensor; a view. Undone by `gather_full`."""
    return whole[laid.box]


def gather_full(local: Tensor, laid: Laid) -> Tensor:
    """The whole tensor from everyone's parts: W[D_X] -> W[D] for each split, last applied first.

    Collective over the axes of the splits. Padding never appears in the result.
    """
    for applied in reversed(range(len(laid.splits))):
        axis, shard = laid.splits[applied]
        before = laid._box(applied)[shard.dim]
        length = before.stop - before.start
        longest, _ = piece(length, axis.size, 1) if axis.size > 1 else (length, 0)
        padded = local.new_zeros(*local.shape[: shard.dim], longest, *local.shape[shard.dim + 1 :])
        padded.narrow(shard.dim, 0, local.shape[shard.dim]).copy_(local)
        parts = ops.all_gather(padded[None], axis)  # (size, ..., longest, ...)
        bounds = [piece(length, axis.size, i) for i in range(axis.size)]
        local = torch.cat(
            [part.narrow(shard.dim, 0, b - a) for part, (a, b) in zip(parts, bounds, strict=True)],
            shard.dim,
        )
    return local


def global_norm(gradients: Mapping[str, Tensor | None], laid: Mapping[str, Laid]) -> Tensor:
    """The 2-norm of the gradient of the whole model, the same 0-dim number on every rank.

    Copies count once, shards are added up over the axes that split them, a tied tensor counts
    under one name. Gradients must be complete; a name without one counts as zero.
    """
    squares: dict[tuple[Axis, ...], list[Tensor]] = {}
    for name, where in laid.items():  # the same order, hence the same collectives, on every rank
        if where.alias_of is None:
            group = squares.setdefault(tuple(dict.fromkeys(axis for axis, _ in where.splits)), [])
            gradient = gradients.get(name)
            if gradient is not None:
                group.append(torch.linalg.vector_norm(gradient).double().square())
    device = next((g.device for g in gradients.values() if g is not None), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for axes, parts in squares.items():
        part = torch.stack(parts).sum() if parts else torch.zeros_like(total)
        for axis in axes:
            part = ops.all_reduce(part, axis)
        total = total + part
    return total.sqrt()


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    torch's rule, to the last digit: factor = min(1, max_norm / (norm + 1e-6)).
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(gradients, factor)
