"""Sums and gathers of activations, by way of memory that all ranks see.

    scratch = Scratch(axis)
    y = scratch.all_reduce(x).wait()              x{U_X} -> y
    y = scratch.reduce_scatter(x, dim).wait()     x[D]{U_X} -> y[D_X]
    x = scratch.all_gather(y, dim).wait()         y[D_X] -> x[D]

Gradients and parameters have a buffer each, for good, in which they are summed and gathered. An
activation is new each time, and what a collective makes of it stays until backward has read it. So
here the result is a fresh tensor, and the memory that ranks share is only passed through: what is
given is copied in.

There are two buffers, used in turn: while the slowest rank still reads from one, others fill the
other. Where ranks cannot share memory, and for sums of 16-bit numbers, messages do the same.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.algorithms import Steps, lengths
from dist_lab.comm.calls import Pending, start_shared
from dist_lab.comm.into import window_of
from dist_lab.comm.shared import BLOCK, CAME, SUMMED, Array, Until, Window, add_up, as_array
from dist_lab.mesh import Axis


class Scratch:
    """Memory to pass through, along one axis. All ranks use it in one order."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._turn = 0

    def all_reduce(self, x: Tensor) -> Pending:
        """x{U_X} -> x, in a new tensor. Every rank gets the same bits."""
        if self.axis.size == 1:
            return Pending(x)
        buffer = self._next(x.numel(), x.dtype)
        x, window = buffer[: x.numel()].view(x.shape).copy_(x), window_of(buffer, self.axis)
        if window is None or x.dtype not in SUMMED:
            # Here too by way of the buffer: a backend's thread may hold on to what it has summed
            # for a moment after it is done, and with a result of our own its memory.
            return ops.all_reduce_into(x, self.axis).then(torch.clone)
        n, i, out = self.axis.size, self.axis.index, torch.empty_like(x)
        own = lengths(x.numel(), n)[i]
        due = ((n - 2) * own + x.numel()) * x.element_size()
        steps = partial(_all_reduce, as_array(out).reshape(-1))
        return start_shared("all_reduce", self.axis, out, x, "sum", window, x.nbytes, due, steps)

    def reduce_scatter(self, x: Tensor, dim: int) -> Pending:
        """x[D]{U_X} -> x[D_X]: rank i gets the i-th of `size` equal pieces along `dim`."""
        n = self.axis.size
        if n == 1:
            return Pending(x)
        assert x.shape[dim] % n == 0, (tuple(x.shape), dim, n)
        x, window = self._shared(x, summed=True)
        if window is None:
            pieces = torch.stack(x.chunk(n, dim))
            return ops.reduce_scatter_into(torch.empty_like(pieces[0]), pieces, self.axis)
        shape = list(x.shape)
        shape[dim] //= n
        out = x.new_empty(shape)
        outer = math.prod(x.shape[: dim % x.dim()])
        steps = partial(_reduce_scatter, as_array(out).reshape(outer, -1))
        due = (n - 1) * out.nbytes
        about = f"sum along {dim}"
        return start_shared(
            "reduce_scatter", self.axis, out, x, about, window, x.nbytes, due, steps
        )

    def all_gather(self, x: Tensor, dim: int) -> Pending:
        """x[D_X] -> x[D]: everyone's piece, one after another along `dim`. Equal shapes."""
        n = self.axis.size
        if n == 1:
            return Pending(x)
        x, window = self._shared(x, summed=False)
        shape = list(x.shape)
        shape[dim] *= n
        if window is None:
            rows = x.new_empty(n, *x.shape)
            return ops.all_gather_into(rows, x, self.axis).then(
                lambda rows: torch.cat(rows.unbind(0), dim)
            )
        out = x.new_empty(shape)
        outer = math.prod(x.shape[: dim % x.dim()])
        steps = partial(_all_gather, as_array(out).reshape(outer, n, -1))
        about = f"along {dim}"
        return start_shared(
            "all_gather", self.axis, out, x, about, window, out.nbytes, (n - 1) * x.nbytes, steps
        )

    def held(self) -> Iterator[Tensor]:
        for buffers in self._buffers.values():
            yield from buffers

    def _shared(self, x: Tensor, *, summed: bool) -> tuple[Tensor, Window | None]:
        """x where all ranks see it, and their memory; None: it will have to be sent."""
        if summed and x.dtype not in SUMMED:
            return x, None
        buffer = self._next(x.numel(), x.dtype)
        window = window_of(buffer, self.axis)
        return x if window is None else buffer[: x.numel()].view(x.shape).copy_(x), window

    def _next(self, length: int, dtype: torch.dtype) -> Tensor:
        """The buffer whose turn it is, when nobody reads from it any more."""
        buffers = self._buffers.setdefault(dtype, [])
        self._turn = 1 - self._turn
        if len(buffers) < 2:
            buffers.append(ops.shared_buffer(length, dtype, self.axis))
            self._turn = len(buffers) - 1
        buffer = buffers[self._turn]
        ops.until_read(buffer, self.axis)
        if len(buffer) < length:
            buffers[self._turn] = buffer = ops.shared_buffer(length, dtype, self.axis)
        return buffer


# --- the steps, on everyone's memory: see comm/shared.py ------------------------------------------


def _all_reduce(out: Array, window: Window, limit: float, moved: Callable[[int], None]) -> Steps:
    """Rank i adds up piece i, and leaves the sum where piece i of its own lay, which only it read.

    So a second meeting is enough, and then everyone copies the sums of the others.
    """
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    n, i = window.size, window.index
    own = lengths(len(out), n)
    starts = [sum(own[:j]) for j in range(n)]
    _sum_pieces(
        [array[starts[i] : starts[i] + own[i]] for array in window.arrays],
        out[starts[i] : starts[i] + own[i]],
    )
    window.arrays[i][starts[i] : starts[i] + own[i]] = out[starts[i] : starts[i] + own[i]]
    window.done(number)
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    for j, (start, length) in enumerate(zip(starts, own, strict=True)):
        if j != i:
            out[start : start + length] = window.arrays[j][start : start + length]
    moved(((n - 2) * own[i] + len(out)) * out.itemsize)
    window.done(number)


def _reduce_scatter(
    out: Array, window: Window, limit: float, moved: Callable[[int], None]
) -> Steps:
    """out (outer, inner) is the sum of everyone's x[:, i], seen as (outer, size, inner)."""
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    outer, inner = out.shape
    n, i = window.size, window.index
    seen = [array[: outer * n * inner].reshape(outer, n, inner) for array in window.arrays]
    for row in range(outer):
        _sum_pieces([x[row, i] for x in seen], out[row])
    moved((n - 1) * out.nbytes)
    window.done(number)


def _all_gather(out: Array, window: Window, limit: float, moved: Callable[[int], None]) -> Steps:
    """out (outer, size, inner): out[:, j] is what rank j has, (outer, inner)."""
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    outer, n, inner = out.shape
    for j, array in enumerate(window.arrays):
        out[:, j] = array[: outer * inner].reshape(outer, inner)
    moved((n - 1) * outer * inner * out.itemsize)
    window.done(number)


def _sum_pieces(pieces: list[Array], into: Array) -> None:
    """In order of the ranks, block by block: few enough to stay in the cache meanwhile."""
    for start in range(0, len(into), BLOCK):
        add_up([piece[start : start + BLOCK] for piece in pieces], into[start : start + BLOCK])
