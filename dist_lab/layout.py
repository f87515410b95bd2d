"""Where a parameter lies, by its name. Initialisation, norms, clipping and checkpoints read only this.

    W[D, F]                           every rank holds all of it           Laid(shape, dtype)
    W[D_fsdp, F]                      rows are split over an axis          splits=((fsdp, Shard(0)),)
    W[(D_tp)_fsdp, F]                 tp splits first, then fsdp           splits=((tp, Shard(0)), (fsdp, Shard(0)))
    a range of a bucket's elements    where zero1 and zero2 step           splits=((dp, Flat(offset, piece)),)
    on one stage of a pipeline alone  the others have nothing of it        splits=((pp, On(2)),)
    dW{U_tp}                          each rank has a part of the gradient sum_over=(tp,)

A split takes pieces of ceil(length / size), as torch.chunk does: the last may be short, or empty.
So under Shard a rank always holds a box of the whole tensor, which is what checkpoints and
resharding need. Under Flat it holds a range of elements, as a vector.
"""  # noqa: E501

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
class Flat:
    """A range of the elements, because many tensors lie side by side and are cut as one.

    Element 0 of this tensor is element `offset` of all of them; rank i has [i piece, (i+1) piece).
    """

    offset: int
    piece: int

    def range(self, numel: int, index: int) -> tuple[int, int]:
        """Start and stop of the elements of this tensor that the rank at `index` has.

        >>> [Flat(3, 4).range(6, i) for i in range(4)]
        [(0, 1), (1, 5), (5, 6), (6, 6)]
        """
        start, stop = (min(max(k * self.piece - self.offset, 0), numel) for k in (index, index + 1))
        return start, stop


@dataclass(frozen=True)
class On:
    """Whole, at this position of the axis; what others have of it, if anything, is a copy."""

    index: int


Placement = Shard | Flat | On
TOGETHER = 16 * 2**20  # bytes: beyond that a tensor's own size is what it costs


@dataclass(frozen=True)
class Laid:
    """How one parameter lies.

    shape, dtype   of the whole tensor
    splits         in the order they were applied; an axis that is not named holds copies; On is the
                   first, if it is there, and Flat the last
    sum_over       axes over which its gradient is partial and owed a sum
    alias_of       tied: the name under which the tensor is counted
    """

    shape: torch.Size
    dtype: torch.dtype
    splits: tuple[tuple[Axis, Placement], ...] = ()
    sum_over: tuple[Axis, ...] = ()
    alias_of: str | None = None

    @property
    def here(self) -> bool:
        """Whether this rank holds it, or a part of it, and not just a copy."""
        return all(not isinstance(how, On) or axis.index == how.index for axis, how in self.splits)

    @property
    def box(self) -> tuple[slice, ...]:
        """The part of the whole tensor that this rank holds, one slice for each dim."""
        return self._box(len(self.splits))

    def _box(self, applied: int) -> tuple[slice, ...]:
        box = [slice(0, length) for length in self.shape]
        for axis, shard in self.splits[:applied]:
            if isinstance(shard, On):
                continue
            assert isinstance(shard, Shard), f"a range of elements is no box: {shard}"
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


def local_part(tensor: Tensor) -> Tensor:
    """What of it lies on this rank: all of a plain tensor, the inside of one that a library splits.

    PyTorch's own shards are DTensors, which speak of the whole and communicate when asked for it.
    """
    to_local = getattr(tensor, "to_local", None)  # no isinstance: importing DTensor takes a second
    if to_local is None:
        return tensor
    with torch.no_grad():
        inside: Tensor = to_local()
    return inside


def slice_local(whole: Tensor, laid: Laid) -> Tensor:
    """This rank's part of a whole tensor; a view if it is contiguous. Undone by `gather_full`."""
    if laid.splits and isinstance(flat := laid.splits[-1][1], Flat):
        box = whole[laid._box(len(laid.splits) - 1)].flatten()
        start, stop = flat.range(len(box), laid.splits[-1][0].index)
        return box[start:stop]
    return whole[laid.box]


def gather_full(local: Tensor | None, laid: Laid) -> Tensor:
    """The whole of one tensor: see gather_all."""
    return gather_all({"": local}, {"": laid})[""]


def gather_all(
    parts: Mapping[str, Tensor | None], laid: Mapping[str, Laid], together: int = TOGETHER
) -> dict[str, Tensor]:
    """Whole tensors from everyone's parts: W[D_X] -> W[D] for each split, last applied first.

    What is split alike travels as one: of a thousand small tensors each alone would cost as much
    as a large one. Results have memory of their own, in which there is no padding. Collective over
    the axes of the splits.

    Args:
        parts: by name, the same names in one order on every rank. None is for a rank that is
            `laid.here` for nothing of it.
        together: bytes of whole tensors that travel as one; a larger tensor goes alone.
    """
    now = {
        name: local_part(part) if part is not None and laid[name].here else None
        for name, part in parts.items()
    }
    for applied in reversed(range(max((len(laid[name].splits) for name in now), default=0))):
        for names in _alike(now, laid, applied, together):
            axis, how = laid[names[0]].splits[applied]
            if isinstance(how, On):
                now |= _from_one(names, now, laid, axis, how.index)
            elif laid[names[0]].here:  # otherwise all of this axis are at that other position
                now |= _from_all(names, now, laid, axis, applied)
    return {
        name: _known(name, now) if laid[name].splits else _known(name, now).clone() for name in now
    }


def _known(name: str, now: Mapping[str, Tensor | None]) -> Tensor:
    part = now[name]
    assert part is not None, f"a rank that has {name}, or a part of it, has given None"
    return part


def _alike(
    names: Iterable[str], laid: Mapping[str, Laid], applied: int, together: int
) -> Iterator[list[str]]:
    """Names whose tensors come over one axis, from one rank or from all, in one dtype."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        where = laid[name]
        if applied < len(where.splits):
            axis, how = where.splits[applied]
            whose = how.index if isinstance(how, On) else None
            groups.setdefault((axis, whose, where.dtype, where.here), []).append(name)
    for group in groups.values():
        sizes = [laid[name].shape.numel() * laid[name].dtype.itemsize for name in group]
        first, total = 0, 0
        for i, size in enumerate(sizes):
            if total + size > together and i > first:
                yield group[first:i]
                first, total = i, 0
            total += size
        yield group[first:]


def _from_one(
    names: Sequence[str],
    now: Mapping[str, Tensor | None],
    laid: Mapping[str, Laid],
    axis: Axis,
    index: int,
) -> dict[str, Tensor]:
    """Tensors that lie whole on one rank of the axis."""
    lengths = [laid[name].shape.numel() for name in names]
    if axis.index == index:
        flat = torch.cat([_known(name, now).flatten() for name in names])
        assert flat.dtype == laid[names[0]].dtype, f"{names} come in {flat.dtype}"
    else:
        flat = torch.empty(sum(lengths), dtype=laid[names[0]].dtype, device=axis.wire.device)
    whole = ops.broadcast_into(flat, axis, index).wait().split(lengths)
    return {name: x.view(laid[name].shape).clone() for name, x in zip(names, whole, strict=True)}


def _from_all(
    names: Sequence[str],
    now: Mapping[str, Tensor | None],
    laid: Mapping[str, Laid],
    axis: Axis,
    applied: int,
) -> dict[str, Tensor]:
    """Tensors of which each rank of the axis has a piece."""
    padded = [_padded(_known(name, now), laid[name], applied) for name in names]
    flat = torch.cat([x.flatten() for x in padded])
    assert flat.dtype == laid[names[0]].dtype, f"{names} come in {flat.dtype}"
    rows = ops.all_gather(flat[None], axis)  # (size, L)
    pieces = rows.split([x.numel() for x in padded], 1)
    return {
        name: _joined(each.unflatten(1, x.shape), laid[name], applied)
        for name, x, each in zip(names, padded, pieces, strict=True)
    }


def _padded(local: Tensor, laid: Laid, applied: int) -> Tensor:
    """This rank's piece, as long as the longest of any rank."""
    dim, _, bounds = _cut(laid, applied)
    shape = list(local.shape)
    shape[dim] = max(stop - start for start, stop in bounds)
    padded = local.new_zeros(shape)
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    return padded


def _joined(pieces: Tensor, laid: Laid, applied: int) -> Tensor:
    """(size, ...) with everyone's padded piece -> what the tensor was before this split."""
    dim, shape, bounds = _cut(laid, applied)
    own = [x.narrow(dim, 0, b - a) for x, (a, b) in zip(pieces, bounds, strict=True)]
    return torch.cat(own, dim).view(shape)


def _cut(laid: Laid, applied: int) -> tuple[int, list[int], list[tuple[int, int]]]:
    """Along which dim a split cuts, the shape before it, and where each rank's piece begins and
    ends. Under Flat it cuts the tensor as a vector.
    """
    axis, how = laid.splits[applied]
    shape = [box.stop - box.start for box in laid._box(applied)]
    if isinstance(how, Flat):
        return 0, shape, [how.range(math.prod(shape), i) for i in range(axis.size)]
    assert isinstance(how, Shard)
    return how.dim, shape, [piece(shape[how.dim], axis.size, i) for i in range(axis.size)]


def global_norm(gradients: Mapping[str, Tensor | None], laid: Mapping[str, Laid]) -> Tensor:
    """The 2-norm of the gradient of the whole model, the same 0-dim number on every rank.

    Copies count once, shards are added up over the axes that split them, a tied tensor counts
    under one name, and what is On one position there alone. Gradients must be complete; a name
    without one counts as zero.
    """
    squares: dict[tuple[Axis, ...], list[Tensor]] = {}
    for name, where in laid.items():  # the same order, hence the same collectives, on every rank
        if where.alias_of is None:
            group = squares.setdefault(tuple(dict.fromkeys(axis for axis, _ in where.splits)), [])
            gradient = gradients.get(name)
            if gradient is not None and where.here:
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
