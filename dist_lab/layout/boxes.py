"""Boxes of a tensor: a slice for each dim. A rank holds a tensor's elements as a list of boxes."""

from collections.abc import Sequence

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


def copy_boxes(target: Tensor, parts: Sequence[Box], elements: Tensor) -> None:
    """Copy elements, box after box, into the boxes of a tensor."""
    for box, values in zip(parts, elements.split([numel_of(box) for box in parts]), strict=True):
        target[box] = values.view(lengths(box))


def elements_of(tensor: Tensor, parts: Sequence[Box]) -> Tensor:
    """The elements of a tensor's boxes, box after box."""
    flat = [tensor[box].reshape(-1) for box in parts]
    return flat[0] if len(flat) == 1 else torch.cat([tensor.new_empty(0), *flat])
