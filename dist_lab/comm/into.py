"""The collectives that write into the caller's memory and return at once: see `ops`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.by_hand.costs import lengths
from dist_lab.comm.by_hand.messages import Message
from dist_lab.comm.calls import Pending, Spec, describe, start, start_shared, start_uneven, wait_for
from dist_lab.comm.check import message_check
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
        chunk = collectives.slices(lengths(len(buffer), n))[i]
        chunks = [array[chunk] for array in window.arrays]
        due = 2 * (n - 1) * chunks[i].nbytes
        moves = collectives.all_reduce(window, chunks, order_of_sums(axis))
        return start_shared(Spec("all_reduce", axis, buffer, reduce), buffer, due, window, moves)
    x = buffer.contiguous()  # the transport ignores strides and reads memory in order
    flat = x.detach().view(-1)
    spec = Spec("all_reduce", axis, x, reduce)
    pending = start(spec, x, algorithm, (flat, COMBINE[reduce]), (flat, REDUCE[reduce]))
    return pending if x is buffer else pending.then(buffer.copy_)


def all_gather_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """out gets the x of all ranks, one after another. It has `size` times the elements of x.

    If out is a `shared_buffer` and x this rank's shard of it, no other memory is needed. In that
    case call `wait_for_readers` before writing to x.
    """
    n, i = axis.size, axis.index
    if n == 1:
        return Pending(out.copy_(x.view_as(out)))
    window = window_of(out, axis, algorithm=algorithm)
    if window and x.data_ptr() == out.data_ptr() + i * x.nbytes:
        buffers = [array.reshape(n, -1) for array in window.arrays]
        sources = [[shards[j]] for j, shards in enumerate(buffers)]
        targets = [[shard] for shard in buffers[i]]
        moves = collectives.all_gather(window, sources, targets, own=False)
        return start_shared(Spec("all_gather", axis, x), out, (n - 1) * x.nbytes, window, moves)
    x = x.contiguous()
    arguments = out.detach().view(-1), x.detach().view(-1)
    return start(Spec("all_gather", axis, x), out, algorithm, arguments, arguments)


def reduce_scatter_into(
    out: Tensor,
    x: Tensor,
    axis: Axis,
    reduce: Reduce = "sum",
    *,
    algorithm: str | None = None,
    memory: Tensor | None = None,
) -> Pending:
    """out gets this rank's shard of the sum of x. x has `size` times the elements of out.

    If x is a `shared_buffer`, or the beginning of the shared buffer `memory`, the ranks sum without
    a message. In that case call `wait_for_readers` before writing to the buffer.
    """
    n, i = axis.size, axis.index
    if n == 1:
        return Pending(out.copy_(x.view_as(out)))
    shard, buffer = out.detach().view(-1), x if memory is None else memory
    if window := window_of(buffer, axis, reduce, algorithm):
        first, stop = i * len(shard), (i + 1) * len(shard)
        if len(shard):  # an empty tensor has no address
            assert x.data_ptr() == buffer.data_ptr(), "x is not the beginning of `memory`"
        addends = [array[None, first:stop] for array in window.arrays]
        target: Array | Tensor = shard[None]  # summed in a spare block, then copied
        # Sum straight into `out`, unless that needs a cast or would overwrite an addend.
        if out.dtype == x.dtype and not np.may_share_memory(as_array(shard), addends[i]):
            target = as_array(shard)[None]
        moves = collectives.reduce_scatter(window, addends, target, order_of_sums(axis))
        due = (n - 1) * addends[i].nbytes
        return start_shared(Spec("reduce_scatter", axis, x, reduce), out, due, window, moves)
    x = x.contiguous()
    flat = x.detach().view(-1)
    by_hand, by_backend = (shard, flat, COMBINE[reduce]), (shard, flat, REDUCE[reduce])
    return start(Spec("reduce_scatter", axis, x, reduce), out, algorithm, by_hand, by_backend)


def all_to_all_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """Row j of x (along dim 0) goes to rank j. Row j of out comes from rank j."""
    if axis.size == 1:
        return Pending(out.copy_(x))
    x = x.contiguous()
    arguments = out.detach().view(-1), x.detach().view(-1)
    return start(Spec("all_to_all", axis, x), out, algorithm, arguments, arguments)


def all_to_all_uneven_into(
    out: Tensor, x: Tensor, axis: Axis, out_lengths: Sequence[int], lengths: Sequence[int]
) -> Pending:
    """x is flat: `lengths[j]` elements for each rank j. out gets `out_lengths[j]` from rank j.

    By the backend, without padding. Only the bytes for other ranks count as sent.
    """
    assert (x.numel(), out.numel()) == (sum(lengths), sum(out_lengths)), (lengths, out_lengths)
    if axis.size == 1:
        return Pending(out.copy_(x))
    return start_uneven(out, x.contiguous(), axis, out_lengths, lengths)


def broadcast_into(
    buffer: Tensor, axis: Axis, source: int = 0, *, algorithm: str | None = None
) -> Pending:
    """The buffer of the rank at position `source` overwrites that of every other rank."""
    if axis.size == 1:
        return Pending(buffer)
    x = buffer.contiguous()
    flat = x.detach().view(-1)
    spec = Spec("broadcast", axis, x, f"from {source}", source)
    pending = start(spec, x, algorithm, (flat, source), (flat, axis.ranks[source]))
    return pending if x is buffer else pending.then(buffer.copy_)


def exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], axis: Axis
) -> list[Pending]:
    """Send each (tensor, to) and receive each (buffer, from), point to point.

    `to` and `from` are positions on the axis. Everything is posted at once, so no order of sends
    and receives can deadlock. Between two ranks, messages arrive in the order they were sent. A
    receive must have the size and dtype of its message.

    Returns:
        One Pending for each receive, then one for each send. Wait for all of them: a sent tensor
        must not change before its wait returns, and a send might never complete without a wait. The
        ledger counts the bytes of the sends.
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
            ends = (axis.index, peer) if verb == "send" else (peer, axis.index)
            call.group = (axis.ranks[ends[0]], axis.ranks[ends[1]]), axis.channel
            check = message_check(call, axis, x, *ends)
            axis.comm.ledger.enter(call)
            try:
                work = post(x, axis.ranks[peer], axis.group)
            except RuntimeError as error:
                raise axis.comm.failure(call, error) from error
            assert work is not None
            pendings.append(Pending(x, [check, [Message(work, limit)]], call, axis))
    return pendings


def wait_for_readers(buffer: Tensor, axis: Axis) -> None:
    """Wait until no rank reads from this shared buffer any more. Call it before writing to it.

    Returns at once for any other tensor. The time is charged to the last collective on the buffer.
    """
    window = window_of(buffer, axis)
    if window is None or window.call is None:
        return
    assert not window.in_use, f"{axis.comm.describe(window.call)} was not waited for"
    wait_for([[Barrier(window, DEPARTED, window.last())]], window.call, axis)


def order_of_sums(axis: Axis) -> collectives.AddUp:
    """Returns the function that adds up the ranks' blocks in shared memory."""
    return collectives.add_up_in_pairs if axis.pairwise else collectives.add_up


def window_of(
    buffer: Tensor, axis: Axis, reduce: str = "", algorithm: str | None = None
) -> SharedWindow | None:
    """Returns the window of a shared buffer; None if the collective must use messages.

    Messages are needed if the caller names an algorithm, or if the reduction is not a sum of
    float32 or float64.
    """
    if algorithm is not None or (reduce and (reduce != "sum" or buffer.dtype not in SUMMED)):
        return None
    window: SharedWindow | None = axis.comm.shared.get(buffer)
    return window if window is not None and window.ranks == axis.ranks else None
