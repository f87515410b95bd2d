"""Three collectives on memory that all ranks map: they copy and add, and send no message.

    all_reduce      x{U_X} -> x         rank i sums chunk i of every rank's buffer, and writes the
                                        sum into all of them: 2 (N-1)/N S bytes, half of them read
                                        from other ranks' memory, half written to it
    all_gather      x[D_X] -> x[D]      each rank copies from every rank's buffer: (N-1)/N S
    reduce_scatter  x[D]{U_X} -> x[D_X]   rank i sums chunk i of every rank's buffer: (N-1)/N S

This is `direct` of `algorithms`, without copying every byte into the kernel and out again.

The caller passes views of the buffers in a window, in order of position. Each collective is a
generator, as in `algorithms`: it yields the barriers that it must wait for. It returns the number
of bytes that it read from other ranks' memory and wrote to it.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from dist_lab.comm.by_hand.algorithms import Work
from dist_lab.comm.by_hand.pairwise import add_in_pairs
from dist_lab.comm.shared.memory import ARRIVED, DEPARTED, Array, Barrier, SharedWindow, as_array

Moves = Generator[Sequence[Work], None, int]
AddUp = Callable[..., Array]  # add_up or add_up_in_pairs
BLOCK = 1 << 15  # elements summed at once: few enough to stay in the cache


def all_reduce(window: SharedWindow, chunks: Sequence[Array], add: AddUp) -> Moves:
    """Overwrite chunks[j], this rank's chunk of rank j's buffer, with the sum of all of them.

    Each chunk is summed by one rank, in the order of `add`, so all ranks get the same bits.
    """
    number = window.arrive()
    # A rank that has departed from the previous collective no longer reads what we overwrite.
    yield [Barrier(window, ARRIVED, number), Barrier(window, DEPARTED, number - 1)]
    window.move(partial(_sum_everywhere, add), chunks)
    window.depart(number)
    yield [Barrier(window, DEPARTED, number)]  # all ranks have written their sums to our buffer
    return 2 * (window.size - 1) * chunks[0].nbytes


def reduce_scatter(
    window: SharedWindow, addends: Sequence[Array], out: Array | Tensor, add: AddUp | None = None
) -> Moves:
    """Write the sum of the addends to out. All have shape (outer, inner).

    Args:
        addends: this rank's shard of every rank's buffer.
        add: the order of the additions; default: add_up.
        out: an array of the same type that shares no memory with the addends, or any tensor. For a
            tensor we sum in a spare block, then copy the sum, which casts it to its dtype.
    """
    add = add or add_up
    number = window.arrive()
    yield [Barrier(window, ARRIVED, number)]
    if isinstance(out, Tensor):
        like = torch.from_numpy(addends[0][:0])
        spare = like.new_empty(min(BLOCK, addends[0].shape[1]))  # a tensor, so that it is counted
        window.move(partial(_sum_and_copy, add), addends, out, spare)
    else:
        window.move(partial(_sum_into, add), addends, out)
    window.depart(number)
    return (window.size - 1) * addends[0].nbytes


def all_gather(
    window: SharedWindow,
    sources: Sequence[Sequence[Array]],
    targets: Sequence[Sequence[Array]],
    *,
    own: bool = True,
) -> Moves:
    """Copy every sources[j][k], which is in rank j's buffer, to targets[j][k].

    Args:
        own: whether to copy this rank's own sources; False if they are already in place.
    """
    number = window.arrive()
    yield [Barrier(window, ARRIVED, number)]
    copies = [
        [target, source]
        for j, (sources_of_j, targets_of_j) in enumerate(zip(sources, targets, strict=True))
        if j != window.index or own
        for target, source in zip(targets_of_j, sources_of_j, strict=True)
    ]
    window.move(_copy_all, copies)
    window.depart(number)
    return sum(s.nbytes for j, of_j in enumerate(sources) if j != window.index for s in of_j)


def _sum_everywhere(add: AddUp, chunks: Sequence[Array]) -> None:
    for start in range(0, len(chunks[0]), BLOCK):
        blocks = [chunk[start : start + BLOCK] for chunk in chunks]
        total = add(blocks)
        for block in blocks:
            block[:] = total


def _sum_into(add: AddUp, addends: Sequence[Array], out: Array) -> None:
    outer, inner = addends[0].shape
    for row in range(outer):
        for start in range(0, inner, BLOCK):
            blocks = [addend[row, start : start + BLOCK] for addend in addends]
            add(blocks, out[row, start : start + BLOCK])


def _sum_and_copy(add: AddUp, addends: Sequence[Array], out: Tensor, spare: Tensor) -> None:
    array = as_array(spare)
    outer, inner = addends[0].shape
    for row in range(outer):
        for start in range(0, inner, BLOCK):
            blocks = [addend[row, start : start + BLOCK] for addend in addends]
            add(blocks, array[: len(blocks[0])])
            out.data[row, start : start + BLOCK].copy_(spare[: len(blocks[0])])


def _copy_all(copies: Sequence[Sequence[Array]]) -> None:
    for target, source in copies:
        target[...] = source


def add_up(blocks: Sequence[Array], out: Array | None = None) -> Array:
    """Returns the sum of two or more blocks, added in the order of the ranks."""
    total: Array = np.add(blocks[0], blocks[1], out=out)
    for block in blocks[2:]:
        total += block
    return total


def add_up_in_pairs(blocks: Sequence[Array], out: Array | None = None) -> Array:
    """Returns the sum of two or more blocks, added in the order of by_hand/pairwise.py."""
    return add_in_pairs(blocks, np.add, out)


def slices(lengths: Sequence[int]) -> list[slice]:
    """Returns consecutive slices of these lengths.

    >>> slices([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
