"""Layout: how a parameter is sharded over the axes of a mesh.

    W[D, F]                           every rank holds a replica           Layout(shape, dtype)
    W[D_fsdp, F]                      rows are split over an axis          splits=(("fsdp", Shard(0)),)
    W[(D_tp)_fsdp, F]                 tp splits first, then fsdp           splits=(("tp", Shard(0)), ("fsdp", Shard(0)))
    a range of a bucket's elements    optimizer shards of zero1 and zero2  splits=(("dp", FlatShard(offset, length)),)
    on one pipeline stage only        the other stages hold nothing        splits=(("pp", OnlyOn((2,))),)
    dW{U_tp}                          the gradient is partial over tp      partial=(Owed("tp"),)

A layout is plain data. It holds no process group, and tells for any rank of any mesh what that rank
holds. `sizes` are the sizes of the mesh's axes by name; `coordinates` are a rank's positions along
them (topology.coordinates). An axis missing from `sizes` has size 1. Initialization, norms,
clipping, gathering and checkpoints depend on layouts only.

Shards have ceil(length / size) rows, like torch.chunk's: the last ones may be short or empty. So
under Shard a rank always holds a box of the full tensor. Under FlatShard it holds a range of
elements, as a vector.
"""  # noqa: E501

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]  # axis -> number of positions
Coordinates = Mapping[str, int]  # axis -> a rank's position
Box = tuple[slice, ...]  # a slice for each dim of the full tensor


@dataclass(frozen=True)
class Shard:
    """The tensor is split along `dim` into size / copies shards.

    `copies` neighbouring positions of the axis hold the same shard. It is more than 1 where there
    are fewer key and value heads than ranks.
    """

    dim: int
    copies: int = 1


@dataclass(frozen=True)
class FlatShard:
    """A range of the tensor's elements. The flat bucket that contains the tensor is split evenly.

    Element 0 of this tensor is element `offset` of the bucket. The rank at position i holds the
    bucket's elements [i length, (i+1) length).
    """

    offset: int
    length: int

    def range(self, numel: int, index: int) -> tuple[int, int]:
        """Start and stop of the elements of this tensor that position `index` holds.

        >>> [FlatShard(3, 4).range(6, i) for i in range(4)]
        [(0, 1), (1, 5), (5, 6), (6, 6)]
        """
        ends = (index * self.length, (index + 1) * self.length)
        start, stop = (min(max(end - self.offset, 0), numel) for end in ends)
        return start, stop


@dataclass(frozen=True)
class OnlyOn:
    """The unsplit tensor, on these positions of the axis only. All but the first hold copies."""

    positions: tuple[int, ...]


Placement = Shard | FlatShard | OnlyOn


@dataclass(frozen=True)
class Owed:
    """A sum that a gradient still needs: over all positions of an axis, over each group of
    `neighbours` adjacent positions, or over the listed `positions`.
    """

    axis: str
    neighbours: int | None = None
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """The layout of one parameter.

    shape, dtype   of the full tensor
    splits         in the order applied, FlatShard last; over all other axes it is replicated
    partial        the sums that its gradient, which is partial, still needs
    """

    shape: torch.Size
    dtype: torch.dtype
    splits: tuple[tuple[str, Placement], ...] = ()
    partial: tuple[Owed, ...] = ()

    def split(self, axis: str, how: Placement) -> "Layout":
        """The same layout, with one more split."""
        return replace(self, splits=(*self.splits, (axis, how)))

    def owing(self, *sums: Owed) -> "Layout":
        """The same layout, with these sums appended to `partial`."""
        return replace(self, partial=(*self.partial, *sums))

    def extends(self, before: "Layout") -> bool:
        """Whether this is `before` with splits and sums appended, the only legal change."""
        return (
            (self.shape, self.dtype) == (before.shape, before.dtype)
            and self.splits[: len(before.splits)] == before.splits
            and self.partial[: len(before.partial)] == before.partial
        )


def shard_bounds(length: int, size: int, index: int) -> tuple[int, int]:
    """Start and stop of the index-th of `size` shards.

    >>> [shard_bounds(10, 4, i) for i in range(4)], shard_bounds(2, 4, 3)
    ([(0, 3), (3, 6), (6, 9), (9, 10)], (2, 2))
    """
    step = -(-length // size)
    return min(index * step, length), min((index + 1) * step, length)


# --- the shard of any rank of any mesh ------------------------------------------------------------


def holds(layout: Layout, coordinates: Coordinates) -> bool:
    """Whether a rank holds the tensor, or a shard of it that may be empty."""
    return all(
        not isinstance(how, OnlyOn) or coordinates.get(axis, 0) in how.positions
        for axis, how in layout.splits
    )


def is_counted(layout: Layout, coordinates: Coordinates) -> bool:
    """Whether a rank is at the first position of each OnlyOn. Copies on others do not count."""
    return all(
        not isinstance(how, OnlyOn) or coordinates.get(axis, 0) == how.positions[0]
        for axis, how in layout.splits
    )


def boxes(layout: Layout, sizes: Sizes, coordinates: Coordinates) -> list[Box]:
    """The boxes of the full tensor that a rank holds: one for a Shard, none if it is empty, and up
    to a few for a FlatShard, in the order of its elements.

    >>> w = Layout(torch.Size([5, 4]), torch.float32, (("tp", Shard(1)), ("fsdp", Shard(0))))
    >>> boxes(w, {"fsdp": 2, "tp": 2}, {"fsdp": 1, "tp": 0})
    [(slice(3, 5, None), slice(0, 2, None))]
    >>> flat = Layout(torch.Size([5, 4]), torch.float32, (("dp", FlatShard(0, 6)),))
    >>> boxes(flat, {"dp": 4}, {"dp": 1})
    [(slice(1, 2, None), slice(2, 4, None)), (slice(2, 3, None), slice(0, 4, None))]
    """
    if not holds(layout, coordinates):
        return []
    box = _box(layout, sizes, coordinates)
    lengths = [side.stop - side.start for side in box]
    start, stop = _range(layout, lengths, coordinates) or (0, math.prod(lengths))
    return [
        tuple(
            slice(outer.start + inner.start, outer.start + inner.stop)
            for outer, inner in zip(box, inner_box, strict=True)
        )
        for inner_box in _boxes_of_range(lengths, start, stop)
    ]


def is_first_holder(layout: Layout, sizes: Sizes, coordinates: Coordinates) -> bool:
    """Whether a rank is the first of those that hold the same data: it writes the checkpoint.

    Over all ranks of a mesh, the boxes of first holders cover the tensor exactly once.
    """
    split = dict(layout.splits)
    for axis in sizes:
        position, how = coordinates.get(axis, 0), split.get(axis)
        if isinstance(how, OnlyOn):
            first = position == how.positions[0]
        elif isinstance(how, Shard):
            first = position % how.copies == 0
        else:
            first = how is not None or position == 0
        if not first:
            return False
    return True


def local_numel(layout: Layout, sizes: Sizes, coordinates: Coordinates) -> int:
    """The number of elements of the tensor that a rank holds."""
    held_boxes = boxes(layout, sizes, coordinates)
    return sum(math.prod(side.stop - side.start for side in box) for box in held_boxes)


def slice_local(full: Tensor, layout: Layout, sizes: Sizes, coordinates: Coordinates) -> Tensor:
    """A rank's local shard of a full tensor; a view if it is contiguous."""
    shard = full[_box(layout, sizes, coordinates)]
    elements = _range(layout, shard.shape, coordinates)
    return shard if elements is None else shard.flatten()[slice(*elements)]


def shard_of(value: Tensor, how: Shard, size: int, index: int) -> Tensor:
    """The shard of a value at one position of an axis; a view."""
    start, stop = shard_bounds(value.shape[how.dim], size // how.copies, index // how.copies)
    return value.narrow(how.dim, start, stop - start)


def shape_before(layout: Layout, applied: int, sizes: Sizes, coordinates: Coordinates) -> list[int]:
    """The shape of a rank's shard after only the first `applied` splits."""
    return shard_shape(replace(layout, splits=layout.splits[:applied]), sizes, coordinates)


def shard_shape(layout: Layout, sizes: Sizes, coordinates: Coordinates | None = None) -> list[int]:
    """The shape of a rank's shard after all Shards. None: of the first one, the longest."""
    return [side.stop - side.start for side in _box(layout, sizes, coordinates or {})]


def _box(layout: Layout, sizes: Sizes, coordinates: Coordinates) -> Box:
    """The box that remains after all Shards. A FlatShard is a range of this box's elements."""
    box = [slice(0, length) for length in layout.shape]
    for axis, how in layout.splits:
        if isinstance(how, Shard):
            outer, size = box[how.dim], sizes.get(axis, 1) // how.copies
            index = coordinates.get(axis, 0) // how.copies
            start, stop = shard_bounds(outer.stop - outer.start, size, index)
            box[how.dim] = slice(outer.start + start, outer.start + stop)
    return tuple(box)


def _range(
    layout: Layout, shape: Sequence[int], coordinates: Coordinates
) -> tuple[int, int] | None:
    """The FlatShard's range of elements in a box of this shape, or None without a FlatShard."""
    axis, how = layout.splits[-1] if layout.splits else ("", None)
    if not isinstance(how, FlatShard):
        return None
    return how.range(math.prod(shape), coordinates.get(axis, 0))


def _boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of the elements from start to stop, row-major: the end of a row, full rows, the
    start of a row.

    >>> list(_boxes_of_range([], 0, 1)), list(_boxes_of_range([2, 3], 4, 5))
    ([()], [(slice(1, 2, None), slice(1, 2, None))])
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the full rows
    if first > last:
        yield from _boxes_within_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _boxes_within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (slice(first, last), *(slice(0, length) for length in shape[1:]))
    if last * row < stop:
        yield from _boxes_within_row(shape, last, last * row, stop)


def _boxes_within_row(shape: Sequence[int], r: int, start: int, stop: int) -> Iterator[Box]:
    row = math.prod(shape[1:])
    for inner in _boxes_of_range(shape[1:], start - r * row, stop - r * row):
        yield (slice(r, r + 1), *inner)


# --- as JSON --------------------------------------------------------------------------------------


def to_json(layout: Layout) -> dict[str, Any]:
    """A layout as JSON data, which `from_json` reads."""
    return {
        "shape": list(layout.shape),
        "dtype": str(layout.dtype).removeprefix("torch."),
        "splits": [[axis, _placement_to_json(how)] for axis, how in layout.splits],
        "partial": [
            {key: value for key, value in asdict(owed).items() if value is not None}
            for owed in layout.partial
        ],
    }


def from_json(data: Mapping[str, Any]) -> Layout:
    """The layout of data that `to_json` has written."""
    return Layout(
        torch.Size(data["shape"]),
        getattr(torch, data["dtype"]),
        tuple((axis, _placement_from_json(how)) for axis, how in data["splits"]),
        tuple(_owed_from_json(owed) for owed in data["partial"]),
    )


def _placement_to_json(how: Placement) -> dict[str, Any]:
    match how:
        case Shard(dim, copies):
            return {"shard": dim, "copies": copies}
        case FlatShard(offset, length):
            return {"flat_shard": [offset, length]}
        case OnlyOn(positions):
            return {"only_on": list(positions)}


def _placement_from_json(data: Mapping[str, Any]) -> Placement:
    match dict(data):
        case {"shard": dim, "copies": copies}:
            return Shard(dim, copies)
        case {"flat_shard": [offset, length]}:
            return FlatShard(offset, length)
        case {"only_on": positions}:
            return OnlyOn(tuple(positions))
    raise ValueError(f"not a placement: {data}")


def _owed_from_json(data: Mapping[str, Any]) -> Owed:
    positions = data.get("positions")
    return Owed(
        data["axis"], data.get("neighbours"), None if positions is None else tuple(positions)
    )
