"""Boxes of a tensor: a slice for each dim. A rank holds a tensor's elements as a list of boxes."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from dist_lab.layout.layout import Box


def relative(box: Box, outer: Box) -> Box:
    """A box in the coordinates of a box around it."""
    return tuple(
        slice(side.start - around.start, side.stop - around.start)
        for side, around in zip(box, outer, strict=True)
    )


def lengths(box: Box) -> list[int]:
    return [side.stop - side.start for side in box]


def numel_of(box: Box) -> int:
    return torch.Size(lengths(box)).numel()


def intersection(a: Box, b: Box) -> Box:
    """The common part of two boxes; a side of length 0 where there is none."""
    sides = []
    for one, other in zip(a, b, strict=True):
        start = max(one.start, other.start)
        sides.append(slice(start, max(start, min(one.stop, other.stop))))
    return tuple(sides)


def overlap(boxes: Sequence[Box]) -> bool:
    """Whether two boxes have a common element.

    They are sorted into groups that lie apart along one dim, and each group along the next dim. So
    the shards of a grid are compared with few others.

    >>> rows = [(slice(i, i + 1), slice(0, 4)) for i in range(3)]
    >>> overlap(rows), overlap([*rows, (slice(2, 4), slice(3, 5))])
    (False, True)
    """
    groups = [[box for box in boxes if numel_of(box)]]
    for dim in range(len(boxes[0]) if boxes else 0):
        groups = [part for group in groups for part in _apart(group, dim)]
    return any(numel_of(intersection(a, b)) for group in groups for a, b in combinations(group, 2))


def _apart(boxes: Sequence[Box], dim: int) -> list[list[Box]]:
    """Boxes in groups, any two of which have no common index along a dim."""
    groups: list[list[Box]] = []
    end = 0
    for box in sorted(boxes, key=lambda box: box[dim].start):
        if not groups or box[dim].start >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box[dim].stop)
    return groups


def copy_boxes(target: Tensor, parts: Sequence[Box], elements: Tensor) -> None:
    """Copy elements, box after box, into the boxes of a tensor."""
    for box, values in zip(parts, elements.split([numel_of(box) for box in parts]), strict=True):
        target[box] = values.view(lengths(box))


def elements_of(tensor: Tensor, parts: Sequence[Box]) -> Tensor:
    """The elements of a tensor's boxes, box after box."""
    flat = [tensor[box].reshape(-1) for box in parts]
    return flat[0] if len(flat) == 1 else torch.cat([tensor.new_empty(0), *flat])
