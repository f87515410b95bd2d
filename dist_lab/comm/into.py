"""The collectives into memory of the caller, which return at once: see `ops`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.by_hand.costs import lengths
from dist_lab.comm.by_hand.messages import Message
from dist_lab.comm.calls import Pending, Spec, describe, start, start_shared, wait_for
from dist_lab.comm.shared import collectives
from dist_lab.comm.shared.memory import DEPARTED, SUMMED, Array, Barrier, SharedWindow, as_array
from dist_lab.mesh.mesh import Axis

Reduce = Literal["sum", "max"]
REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
COMBINE = {"sum": torch.add, "max": torch.maximum}


def all_reduce_into(
    buffer: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Pending:
    """buffer{U_X} -> buffer, in place."""
    n, i = axis.size, axis.index
    if n == 1:
        return Pending(buffer)
    if window := window_of(buffer, axis, reduce, algorithm):
        piece = collectives.slices(lengths(len(buffer), n))[i]
        pieces = [array[piece] for array in window.arrays]
        due = 2 * (n - 1) * pieces[i].nbytes
        moves = collectives.all_reduce(window, pieces)
        return start_shared(Spec("all_reduce", axis, buffer, reduce), buffer, due, window, moves)
    given = buffer.contiguous()  # the transport reads memory in order, whatever the strides say
    flat = given.detach().view(-1)
    spec = Spec("all_reduce", axis, given, reduce)
    pending = start(spec, given, algorithm, (flat, COMBINE[reduce]), (flat, REDUCE[reduce]))
    return pending if given is buffer else pending.then(buffer.copy_)


def all_gather_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """out, of `size` times the elements of x, gets the ranks' x one after another.

    If out is a `shared_buffer` and x this rank's piece of it, no other memory is needed; nobody may
    write to x before `wait_for_readers`.
    """
    n, i = axis.size, axis.index
    if n == 1:
        return Pending(out.copy_(x.view_as(out)))
    window = window_of(out, axis, algorithm=algorithm)
    if window and x.data_ptr() == out.data_ptr() + i * x.nbytes:
        rows = [array.reshape(n, -1) for array in window.arrays]
        theirs = [[row[j]] for j, row in enumerate(rows)]
        mine = [[row] for row in rows[i]]
        moves = collectives.all_gather(window, theirs, mine, own=False)
        return start_shared(Spec("all_gather", axis, x), out, (n - 1) * x.nbytes, window, moves)
    x = x.contiguous()
    both = out.detach().view(-1), x.detach().view(-1)
    return start(Spec("all_gather", axis, x), out, algorithm, both, both)


def reduce_scatter_into(
    out: Tensor,
    x: Tensor,
    axis: Axis,
    reduce: Reduce = "sum",
    *,
    algorithm: str | None = None,
    memory: Tensor | None = None,
) -> Pending:
    """out gets piece `index` of the sum of x, which has `size` times its elements.

    If x is a `shared_buffer`, or the beginning of one, `memory`, the ranks sum without a message,
    and nobody may write to it before `wait_for_readers`.
    """
    n, i = axis.size, axis.index
    if n == 1:
        return Pending(out.copy_(x.view_as(out)))
    piece, buffer = out.detach().view(-1), x if memory is None else memory
    if window := window_of(buffer, axis, reduce, algorithm):
        first, stop = i * len(piece), (i + 1) * len(piece)
        if len(piece):  # an empty tensor has no address
            assert x.data_ptr() == buffer.data_ptr(), "x is not the beginning of that memory"
        theirs = [array[None, first:stop] for array in window.arrays]
        mine: Array | Tensor = piece[None]
        # A spare block is needed to cast, and where the sum would overwrite an addend.
        if out.dtype == x.dtype and not np.may_share_memory(as_array(piece), theirs[i]):
            mine = as_array(piece)[None]
        moves = collectives.reduce_scatter(window, theirs, mine)
        due = (n - 1) * theirs[i].nbytes
        return start_shared(Spec("reduce_scatter", axis, x, reduce), out, due, window, moves)
    x = x.contiguous()
    whole = x.detach().view(-1)
    by_hand, by_backend = (piece, whole, COMBINE[reduce]), (piece, whole, REDUCE[reduce])
    return start(Spec("reduce_scatter", axis, x, reduce), out, algorithm, by_hand, by_backend)


def all_to_all_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """Slice j of x (along dim 0) goes to rank j; slice i of out comes from rank i."""
    if axis.size == 1:
        return Pending(out.copy_(x))
    x = x.contiguous()
    both = out.detach().view(-1), x.detach().view(-1)
    return start(Spec("all_to_all", axis, x), out, algorithm, both, both)


def broadcast_into(
    buffer: Tensor, axis: Axis, source: int = 0, *, algorithm: str | None = None
) -> Pending:
    """buffer of the rank at position `source` overwrites everyone's."""
    if axis.size == 1:
        return Pending(buffer)
    given = buffer.contiguous()
    flat = given.detach().view(-1)
    spec = Spec("broadcast", axis, given, f"from {source}", source)
    pending = start(spec, given, algorithm, (flat, source), (flat, axis.ranks[source]))
    return pending if given is buffer else pending.then(buffer.copy_)


def exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], axis: Axis
) -> list[Pending]:
    """Point to point: send each (tensor, to), receive each (buffer, from); positions on the axis.

    Everything is posted at once, so no order of sends and receives can block. Between two ranks
    messages arrive in the order they were sent; a receive must have its message's size and dtype.

    Returns:
        One Pending for each receive, then one for each send. Wait for all of them: until then a
        sent tensor must not change, and a send that nobody waits for may never leave. Payload and
        sent bytes are those of the sends.
    """
    pendings, limit = [], timedelta(seconds=axis.comm.timeout)
    sends = [(x.contiguous(), to) for x, to in sends]
    for posts, post, verb in ((receives, dist.irecv, "recv"), (sends, dist.isend, "send")):
        for x, peer in posts:
            assert peer != axis.index, f"rank {axis.ranks[peer]} cannot {verb} to itself"
            call = axis.comm.call(
                verb, axis.name, axis.size, f"{describe(x)}, peer {peer}",
                *((x.nbytes, x.nbytes) if verb == "send" else (0, 0)),
            )  # fmt: skip
            axis.comm.ledger.enter(call)
            try:
                work = post(x, axis.ranks[peer], axis.group)
            except RuntimeError as error:
                raise axis.comm.failure(call, error) from error
            assert work is not None
            pendings.append(Pending(x, [[Message(work, limit)]], call, axis))
    return pendings


def wait_for_readers(buffer: Tensor, axis: Axis) -> None:
    """Wait until no rank reads from this shared buffer any more, before its owner writes to it.

    For any other tensor there is nothing to wait for. The time is charged to the last collective
    on the buffer.
    """
    window = window_of(buffer, axis)
    if window is None or window.call is None:
        return
    assert not window.in_use, f"{axis.comm.describe(window.call)} was not waited for"
    wait_for([[Barrier(window, DEPARTED, window.last())]], window.call, axis)


def window_of(
    buffer: Tensor, axis: Axis, reduce: str = "", algorithm: str | None = None
) -> SharedWindow | None:
    """Every rank's memory, if the buffer is a shared one and the collective can work on it there.

    A reduction can if it sums float32 or float64, and any collective if no algorithm is asked for.
    """
    if algorithm is not None or (reduce and (reduce != "sum" or buffer.dtype not in SUMMED)):
        return None
    window: SharedWindow | None = axis.comm.shared.get(buffer)
    return window if window is not None and window.ranks == axis.ranks else None
