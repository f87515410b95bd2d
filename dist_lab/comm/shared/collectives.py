"""The three collectives on memory that all ranks map: they copy and add, and send no message.

    all_reduce      x{U_X} -> x         rank i sums piece i of every rank's buffer, and writes the
                                        sum into all of them: 2 (N-1)/N S bytes, half of them read
                                        from other ranks' memory, half written to it
    all_gather      x[D_X] -> x[D]      each rank copies from every rank's buffer: (N-1)/N S
    reduce_scatter  x[D]{U_X} -> x[D_X]   rank i sums piece i of every rank's buffer: (N-1)/N S

This is `direct` of `algorithms`, without the copies of every byte into the kernel and out again.

The caller chooses the memory: `theirs` are views of all ranks' buffers, in order of position, which
this rank reads; `mine` is where this rank's result goes. Each collective is a generator that yields
the barriers to wait for, as in `algorithms`, and returns how many bytes it read from other ranks'
memory and wrote to it.
"""

from collections.abc import Generator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from dist_lab.comm.by_hand.algorithms import Work
from dist_lab.comm.shared.memory import ARRIVED, DEPARTED, Array, Barrier, SharedWindow

Moves = Generator[Sequence[Work], None, int]
BLOCK = 1 << 15  # elements summed at once: few enough to stay in the cache


def all_reduce(window: SharedWindow, theirs: Sequence[Array]) -> Moves:
    """Every theirs[j], flat, becomes their sum: piece `index` of every rank's buffer.

    Ranks are added in one order, and only once: all ranks get the same bits.
    """
    number = window.arrive()
    # A rank that has departed from the collective before no longer reads what is overwritten here.
    yield [Barrier(window, ARRIVED, number), Barrier(window, DEPARTED, number - 1)]
    for start in range(0, len(theirs[0]), BLOCK):
        blocks = [piece[start : start + BLOCK] for piece in theirs]
        total = add_up(blocks)
        for block in blocks:
            block[:] = total
    window.depart(number)
    yield [Barrier(window, DEPARTED, number)]  # the other ranks have written their sums here
    return 2 * (window.size - 1) * theirs[0].nbytes


def reduce_scatter(window: SharedWindow, theirs: Sequence[Array], mine: Array | Tensor) -> Moves:
    """mine becomes the sum of theirs, each (outer, inner).

    Args:
        mine: an array of the same type that shares no memory with theirs, or any tensor: sums are
            then made in a spare block and copied, which casts them.
    """
    number = window.arrive()
    yield [Barrier(window, ARRIVED, number)]
    outer, inner = theirs[0].shape
    spare = np.empty(min(BLOCK, inner) if isinstance(mine, Tensor) else 0, theirs[0].dtype)
    for row in range(outer):
        for start in range(0, inner, BLOCK):
            blocks = [part[row, start : start + BLOCK] for part in theirs]
            if isinstance(mine, Tensor):
                total = add_up(blocks, spare[: len(blocks[0])])
                mine.data[row, start : start + BLOCK].copy_(torch.from_numpy(total))
            else:
                add_up(blocks, mine[row, start : start + BLOCK])
    window.depart(number)
    return (window.size - 1) * theirs[0].nbytes


def all_gather(
    window: SharedWindow,
    theirs: Sequence[Sequence[Array]],
    mine: Sequence[Sequence[Array]],
    *,
    own: bool = True,
) -> Moves:
    """mine[j][k] becomes a copy of theirs[j][k], which is in rank j's buffer.

    Args:
        own: whether to copy this rank's too; False if they are in place already.
    """
    number = window.arrive()
    yield [Barrier(window, ARRIVED, number)]
    moved = 0
    for j, (sources, targets) in enumerate(zip(theirs, mine, strict=True)):
        if j == window.index and not own:
            continue
        for source, target in zip(sources, targets, strict=True):
            target[...] = source
            moved += source.nbytes if j != window.index else 0
    window.depart(number)
    return moved


def add_up(blocks: Sequence[Array], out: Array | None = None) -> Array:
    """The sum of two or more blocks, in the order of the ranks."""
    total: Array = np.add(blocks[0], blocks[1], out=out)
    for block in blocks[2:]:
        total += block
    return total


def slices(lengths: Sequence[int]) -> list[slice]:
    """Consecutive slices of these lengths.

    >>> slices([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
