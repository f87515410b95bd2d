"""Collectives on activations, through memory that all ranks map.

    scratch = Scratch(axis)
    y = scratch.all_reduce(x).wait()              x{U_X} -> y
    y = scratch.reduce_scatter(x, dim).wait()     x[D]{U_X} -> y[D_X]
    x = scratch.all_gather(y, dim).wait()         y[D_X] -> x[D]

Gradients and parameters have permanent shared buffers, in which they are summed and gathered. An
activation is a new tensor each time, and the result of its collective lives until backward has read
it. So `Scratch` copies the input into shared memory, and writes the result to a new tensor.

It has two buffers and uses them in turn: while the slowest rank still reads from one, the others
fill the other. If ranks cannot share memory, and for sums of 16-bit numbers, it uses
messages.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.by_hand.costs import lengths
from dist_lab.comm.calls import Pending, Spec, start_shared
from dist_lab.comm.into import window_of
from dist_lab.comm.shared.collectives import Moves, all_gather, reduce_scatter, slices
from dist_lab.comm.shared.memory import SUMMED, SharedWindow, as_array
from dist_lab.mesh.mesh import Axis


class Scratch:
    """Shared memory for the inputs of collectives along one axis. All ranks use it in one order."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._turn = 0

    def all_reduce(self, x: Tensor) -> Pending:
        """x{U_X} -> x, in a new tensor. All ranks get the same bits."""
        n, i = self.axis.size, self.axis.index
        if n == 1:
            return Pending(x)
        if x.is_meta:  # only its shape is asked for
            return Pending(torch.empty_like(x))
        buffer = self._next(x.numel(), x.dtype)
        x, window = buffer[: x.numel()].view(x.shape).copy_(x), window_of(buffer, self.axis, "sum")
        if window is None:
            # The backend's thread may keep a tensor alive for a moment after the sum. So we pass
            # it the buffer, and return a copy.
            return ops.all_reduce_into(x, self.axis).then(torch.clone)
        out = torch.empty_like(x)
        due = ((n - 2) * lengths(x.numel(), n)[i] + x.numel()) * x.element_size()
        spec = Spec("all_reduce", self.axis, x, "sum")
        return start_shared(spec, out, due, window, _all_reduce(window, out.view(-1)))

    def reduce_scatter(self, x: Tensor, dim: int) -> Pending:
        """x[D]{U_X} -> x[D_X]: rank i gets shard i of the sum, which is split along `dim`."""
        n, i = self.axis.size, self.axis.index
        if n == 1:
            return Pending(x)
        assert x.shape[dim] % n == 0, (tuple(x.shape), dim, n)
        x, window = self._shared(x, "sum")
        if window is None:
            chunks = torch.stack(x.chunk(n, dim))
            return ops.reduce_scatter_into(torch.empty_like(chunks[0]), chunks, self.axis)
        shape = list(x.shape)
        shape[dim] //= n
        out = x.new_empty(shape)
        outer = math.prod(x.shape[: dim % x.dim()])
        arrays = [array[: x.numel()].reshape(outer, n, -1) for array in window.arrays]
        target = as_array(out).reshape(outer, -1)
        moves = reduce_scatter(window, [array[:, i] for array in arrays], target)
        spec = Spec("reduce_scatter", self.axis, x, f"sum along {dim}")
        return start_shared(spec, out, (n - 1) * out.nbytes, window, moves)

    def all_gather(self, x: Tensor, dim: int) -> Pending:
        """x[D_X] -> x[D]: all ranks' x, of equal shapes, concatenated along `dim`."""
        n = self.axis.size
        if n == 1:
            return Pending(x)
        x, window = self._shared(x)
        if window is None:
            rows = x.new_empty(n, *x.shape)
            return ops.all_gather_into(rows, x, self.axis).then(
                lambda rows: torch.cat(rows.unbind(0), dim)
            )
        shape = list(x.shape)
        shape[dim] *= n
        out = x.new_empty(shape)
        outer = math.prod(x.shape[: dim % x.dim()])
        sources = [[array[: x.numel()].reshape(outer, -1)] for array in window.arrays]
        full = as_array(out).reshape(outer, n, -1)
        moves = all_gather(window, sources, [[full[:, j]] for j in range(n)])
        spec = Spec("all_gather", self.axis, x, f"along {dim}")
        return start_shared(spec, out, (n - 1) * x.nbytes, window, moves)

    def extra_memory(self) -> Iterator[Tensor]:
        """Yields the buffers, for `Sync.extra_memory`."""
        for buffers in self._buffers.values():
            yield from buffers

    def _shared(self, x: Tensor, reduce: str = "") -> tuple[Tensor, SharedWindow | None]:
        """Returns x copied into shared memory, and the window; x and None if x needs messages."""
        if x.is_meta or (reduce and x.dtype not in SUMMED):
            return x, None
        buffer = self._next(x.numel(), x.dtype)
        window = window_of(buffer, self.axis)
        return x if window is None else buffer[: x.numel()].view(x.shape).copy_(x), window

    def _next(self, length: int, dtype: torch.dtype) -> Tensor:
        """Returns the next buffer, once no rank reads from it any more."""
        buffers = self._buffers.setdefault(dtype, [])
        self._turn = 1 - self._turn
        if len(buffers) < 2:
            buffers.append(ops.shared_buffer(length, dtype, self.axis))
            self._turn = len(buffers) - 1
        buffer = buffers[self._turn]
        ops.wait_for_readers(buffer, self.axis)
        if len(buffer) < length:
            buffers[self._turn] = buffer = ops.shared_buffer(length, dtype, self.axis)
        return buffer


def _all_reduce(window: SharedWindow, out: Tensor) -> Moves:
    """x{U_X} -> x[D_X] -> x: rank i sums chunk i, and reads the sums of the other chunks.

    The sum of chunk i overwrites rank i's addend in its own buffer, which no other rank reads.
    """
    full, i = as_array(out), window.index
    chunks = slices(lengths(len(out), window.size))
    addends = [array[None, chunks[i]] for array in window.arrays]
    moved = yield from reduce_scatter(window, addends, full[None, chunks[i]])
    window.move(np.copyto, window.arrays[i][chunks[i]], full[chunks[i]])
    sums = [[array[chunk]] for array, chunk in zip(window.arrays, chunks, strict=True)]
    targets = [[full[chunk]] for chunk in chunks]
    return moved + (yield from all_gather(window, sums, targets, own=False))
