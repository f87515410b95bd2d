"""Which ranks hold the same data: a pure function of layouts and coordinates.

    W under ddp, dp=4                          ranks 0 1 2 3
    W under fsdp, dp=2 x fsdp=2 (hsdp)         ranks 0 2 | 1 3
    a norm under tp, fsdp=2 x tp=2             ranks 0 1 | 2 3
    an embedding tied to the head, pp=3        ranks 0 2

Two ranks hold the same data if their boxes of the full tensor are equal. It does not matter which
strategy has split it.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from dist_lab.layout.layout import FlatShard, Layout, OnlyOn, boxes
from dist_lab.mesh.topology import coordinates

Groups = tuple[tuple[int, ...], ...]  # of ranks that hold the same data, two or more in each


def replicas(layout: Layout, sizes: Mapping[str, int]) -> Groups:
    """The groups of ranks that hold the same part of a tensor. A rank alone is in no group.

    >>> import torch
    >>> w = Layout(torch.Size([4]), torch.float32)
    >>> replicas(w, {"dp": 2, "tp": 2})
    ((0, 1, 2, 3),)
    """
    holders: dict[str, list[int]] = {}
    for rank in range(prod(sizes.values())):
        held = boxes(layout, sizes, coordinates(rank, sizes))
        if held:
            holders.setdefault(repr(held), []).append(rank)
    return tuple(tuple(ranks) for ranks in holders.values() if len(ranks) > 1)


def same_along(axes: set[str], sizes: Mapping[str, int]) -> Groups:
    """The groups of ranks whose positions along these axes are equal."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(prod(sizes.values())):
        position = coordinates(rank, sizes)
        key = tuple(position[axis] for axis in sizes if axis in axes)
        groups.setdefault(key, []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values() if len(ranks) > 1)


def without_flat(layout: Layout) -> Layout:
    """The layout of the full tensor in the model, of which optimizers step on a range of elements.

    A FlatShard splits what an optimizer steps on. The forward computes with all elements.
    """
    kept = tuple((axis, how) for axis, how in layout.splits if not isinstance(how, FlatShard))
    return replace(layout, splits=kept)


def stage_axes(layouts: Mapping[str, Layout]) -> set[str]:
    """The axes whose positions hold different parameters, so that their ranks do other work."""
    splits = [split for layout in layouts.values() for split in layout.splits]
    return {axis for axis, how in splits if isinstance(how, OnlyOn)}
