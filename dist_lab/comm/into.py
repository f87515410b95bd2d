"""The collectives into memory of the caller, which return at once: see `ops`."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm import shared
from dist_lab.comm.calls import Pending, describe, start, start_shared, until_all_have_read
from dist_lab.comm.messages import Message
from dist_lab.mesh import Axis

Reduce = Literal["sum", "max"]
REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
COMBINE = {"sum": torch.add, "max": torch.maximum}


def all_reduce_into(
    buffer: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Pending:
    """buffer{U_X} -> buffer, in place."""
    window = window_of(buffer, axis) if reduce == "sum" and algorithm is None else None
    if window is not None and buffer.dtype in shared.SUMMED:
        due = shared.shared_sent(axis.size, axis.index, buffer.numel()) * buffer.element_size()
        return start_shared(
            "all_reduce", axis, buffer, buffer, reduce, window, buffer.nbytes, due,
            shared.shared_all_reduce,
        )  # fmt: skip
    given = buffer.contiguous()  # the transport reads memory in order, whatever the strides say
    flat = given.detach().view(-1)
    return start(
        "all_reduce", axis, buffer, given, reduce, algorithm,
        lambda: dist.all_reduce(flat, REDUCE[reduce], axis.group, async_op=True),
        lambda steps, post: steps(post, flat, COMBINE[reduce]),
    )  # fmt: skip


def all_gather_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """out, of `size` times the elements of x, gets the pieces one after another.

    If out is a `shared_buffer` and x this rank's piece of it, that is all the memory there need be;
    nobody may write to x before `until_read`.
    """
    if axis.size == 1:
        return Pending(out.copy_(x.view_as(out)))
    window = window_of(out, axis) if algorithm is None else None
    if window is not None and x.data_ptr() == out.data_ptr() + axis.index * x.nbytes:
        return start_shared(
            "all_gather", axis, out, x, "", window, out.nbytes, (axis.size - 1) * x.nbytes,
            shared.shared_all_gather_in_place,
        )  # fmt: skip
    x = x.contiguous()
    whole, piece = out.detach().view(-1), x.detach().view(-1)
    return start(
        "all_gather", axis, out, x, "", algorithm,
        lambda: dist.all_gather_single(whole, piece, axis.group, async_op=True),
        lambda steps, post: steps(post, whole, piece),
    )  # fmt: skip


def reduce_scatter_into(
    out: Tensor, x: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None,
    memory: Tensor | None = None,
) -> Pending:  # fmt: skip
    """out gets piece `index` of the sum of x, which has `size` times its elements.

    If x is a `shared_buffer`, or the beginning of one, `memory`, the ranks add up without a
    message, and nobody may write to it before `until_read`.
    """
    if axis.size == 1:
        return Pending(out.copy_(x.view_as(out)))
    buffer = x if memory is None else memory
    window = window_of(buffer, axis) if reduce == "sum" and algorithm is None else None
    if window is not None and x.dtype in shared.SUMMED:
        assert x.data_ptr() == buffer.data_ptr(), "x is not the beginning of that memory"
        due = (axis.size - 1) * out.numel() * x.element_size()
        return start_shared(
            "reduce_scatter", axis, out, x, reduce, window, x.nbytes, due,
            partial(shared.shared_reduce_scatter, out.detach().view(-1)),
        )  # fmt: skip
    x = x.contiguous()
    piece, whole = out.detach().view(-1), x.detach().view(-1)
    return start(
        "reduce_scatter", axis, out, x, reduce, algorithm,
        lambda: dist.reduce_scatter_single(piece, whole, REDUCE[reduce], axis.group, async_op=True),
        lambda steps, post: steps(post, piece, whole, COMBINE[reduce]),
        payload=x,
    )  # fmt: skip


def all_to_all_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """Slice j of x (along dim 0) goes to rank j; slice i of out comes from rank i."""
    if axis.size == 1:
        return Pending(out.copy_(x))
    x = x.contiguous()
    into, give = out.detach().view(-1), x.detach().view(-1)
    return start(
        "all_to_all", axis, out, x, "", algorithm,
        lambda: dist.all_to_all_single(into, give, group=axis.group, async_op=True),
        lambda steps, post: steps(post, into, give),
    )  # fmt: skip


def broadcast_into(
    buffer: Tensor, axis: Axis, source: int = 0, *, algorithm: str | None = None
) -> Pending:
    """buffer of the rank at position `source` overwrites everyone's."""
    given = buffer.contiguous()
    flat = given.detach().view(-1)
    return start(
        "broadcast", axis, buffer, given, f"from {source}", algorithm,
        lambda: dist.broadcast(flat, axis.ranks[source], axis.group, async_op=True),
        lambda steps, post: steps(post, flat, source),
        source=source,
    )  # fmt: skip


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
    pendings, limit = [], timedelta(seconds=axis.wire.timeout)
    sends = [(x.contiguous(), to) for x, to in sends]
    for posts, post, verb in ((receives, dist.irecv, "recv"), (sends, dist.isend, "send")):
        for x, peer in posts:
            assert peer != axis.index, f"rank {axis.ranks[peer]} cannot {verb} to itself"
            call = axis.wire.call(
                verb, axis.name, axis.size, f"{describe(x)}, peer {peer}",
                *((x.nbytes, x.nbytes) if verb == "send" else (0, 0)),
            )  # fmt: skip
            axis.wire.ledger.enter(call)
            try:
                work = post(x, axis.ranks[peer], axis.group)
            except RuntimeError as error:
                raise axis.wire.failure(call, error) from error
            assert work is not None
            pendings.append(Pending(x, [[Message(work, limit)]], call, axis))
    return pendings


def until_read(buffer: Tensor, axis: Axis) -> None:
    """Wait until all ranks have read what they were to read of a shared buffer.

    To be called before its owner writes to it again. For any other tensor there is nothing to do.
    """
    window = window_of(buffer, axis)
    if window is not None:
        until_all_have_read(window, axis)


def window_of(buffer: Tensor, axis: Axis) -> shared.Window | None:
    """The memory of all ranks of this axis, if the buffer is part of that."""
    window: shared.Window | None = axis.wire.shared.get(buffer)
    return window if window is not None and window.ranks == axis.ranks else None
