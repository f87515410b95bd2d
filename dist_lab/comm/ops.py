"""The collectives. Each takes the axis it runs along, and is counted.

Two forms of each:

    y = all_reduce(x, axis)                      out of place, blocking; returns the result
    pending = all_reduce_into(buffer, axis)      into memory the caller owns, returns at once;
    ...                                          other work
    buffer = pending.wait()                      blocks until the buffer may be read

`_into` is for buckets and gather buffers, where a second copy costs more than the sum itself. A
buffer must not be touched before `wait()`, and every rank waits for its calls in the same order: a
collective by hand sends its first messages at the call and, if it has more rounds than one, the
others from inside `wait()`. On an axis of size 1 every operation is the identity,
and an out-of-place form then returns its argument itself.

Who carries one is set for a whole mesh (`init_mesh(collectives=...)`), or by `algorithm` for one
call: "backend", a family of `algorithms.py`, or "auto", which is the fastest as measured. Any of
them gives every rank the same bits; in floating point, two of them may round differently.

Notation: `x[D_X]` is sharded over axis X, `x{U_X}` is a partial sum over X (The Scaling Book, ch.
3).
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm import shared
from dist_lab.comm.calls import Pending, describe, start, start_shared
from dist_lab.comm.ledger import backend_bytes
from dist_lab.comm.messages import Message
from dist_lab.comm.wire import CollectiveError, CollectiveMismatch
from dist_lab.mesh import Axis

Reduce = Literal["sum", "max"]
REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
COMBINE = {"sum": torch.add, "max": torch.maximum}


# --- out of place ---------------------------------------------------------------------------------


def all_reduce(
    x: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Tensor:
    """x{U_X} -> x: every rank gets the sum (or maximum) over the axis. Any shape."""
    if axis.size == 1:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    return all_reduce_into(copy, axis, reduce, algorithm=algorithm).wait()


def all_gather(x: Tensor, axis: Axis, dim: int = 0, *, algorithm: str | None = None) -> Tensor:
    """x[D_X] -> x[D]: everyone's piece, concatenated along `dim`. Equal shapes, not 0-dim."""
    if axis.size == 1:
        return x
    out = x.new_empty(axis.size, *x.shape)
    all_gather_into(out, x, axis, algorithm=algorithm).wait()  # (size, ..., D_X, ...)
    return out.flatten(0, 1) if dim == 0 else torch.cat(out.unbind(0), dim)


def reduce_scatter(
    x: Tensor, axis: Axis, dim: int = 0, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Tensor:
    """x[D]{U_X} -> x[D_X]: rank i gets the i-th of `size` equal pieces of the sum along `dim`.

    Raises ValueError if `dim` does not divide by the axis size.
    """
    if axis.size == 1:
        return x
    pieces = _pieces(x, axis, dim)  # (size, ..., D/size, ...)
    out = torch.empty_like(pieces[0])
    return reduce_scatter_into(out, pieces, axis, reduce, algorithm=algorithm).wait()


def all_to_all(
    x: Tensor, axis: Axis, split_dim: int, concat_dim: int, *, algorithm: str | None = None
) -> Tensor:
    """x[A_X, B] -> x[A, B_X]: piece j along `split_dim` goes to rank j, which concatenates.

    Raises ValueError if `split_dim` does not divide by the axis size.
    """
    if axis.size == 1:
        return x
    pieces = _pieces(x, axis, split_dim)
    out = all_to_all_into(torch.empty_like(pieces), pieces, axis, algorithm=algorithm).wait()
    return torch.cat(out.unbind(0), concat_dim)


def broadcast(x: Tensor, axis: Axis, source: int = 0, *, algorithm: str | None = None) -> Tensor:
    """Every rank gets the tensor of the rank at position `source` of the axis."""
    if axis.size == 1:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    return broadcast_into(copy, axis, source, algorithm=algorithm).wait()


def all_gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """The bytes of every rank, in order of position. For small things of unequal length."""
    if axis.size == 1:
        return [data]
    device = axis.wire.device
    lengths = all_gather(torch.tensor([len(data)], device=device), axis).tolist()
    padded = bytearray(data.ljust(max(*lengths, 1), b"\0"))
    rows = all_gather(torch.frombuffer(padded, dtype=torch.uint8)[None].to(device), axis)
    return [bytes(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]


def shared_buffer(length: int, dtype: torch.dtype, axis: Axis) -> Tensor:
    """Zeros, flat, to be summed by `all_reduce_into`: in memory that all ranks see, if they can.

    They can if `collectives` is "auto", the backend gloo, the ranks on one machine, that is Linux
    with room in /dev/shm, and the dtype float32 or float64. Otherwise it is memory like any other.
    Collective over the axis.
    """
    wire = axis.wire
    if axis.size == 1 or wire.collectives != "auto" or wire.backend != "gloo":
        return torch.zeros(length, dtype=dtype, device=wire.device)
    mine = shared.create(length, dtype)
    try:
        with wire.during(unit="shared memory"):
            paths = all_gather_bytes(str(mine or "").encode(), axis)
            found = [shared.attach(path.decode(), length, dtype) for path in paths]
            everyone = [array for array in found if array is not None]
            said = all_gather_bytes(b"all" if len(everyone) == axis.size else b"not all", axis)
    finally:
        if mine is not None:
            mine.unlink()  # what it names lives on until the last rank has let go of it
    if set(said) != {b"all"}:
        return torch.zeros(length, dtype=dtype)
    buffer = torch.from_numpy(everyone[axis.index])
    wire.shared[buffer] = everyone
    return buffer


# --- into memory of the caller, asynchronous ------------------------------------------------------


def all_reduce_into(
    buffer: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Pending:
    """buffer{U_X} -> buffer, in place."""
    everyone = axis.wire.shared.get(buffer) if reduce == "sum" and algorithm is None else None
    if everyone is not None and axis.size > 1:
        return start_shared("all_reduce", axis, buffer, reduce, everyone)
    given = buffer.contiguous()  # the transport reads memory in order, whatever the strides say
    flat = given.detach().view(-1)
    return start(
        "all_reduce", axis, buffer, given, reduce, algorithm,
        lambda: dist.all_reduce(flat, REDUCE[reduce], axis.group, async_op=True),
        lambda steps, post: steps(post, flat, COMBINE[reduce]),
    )  # fmt: skip


def all_gather_into(out: Tensor, x: Tensor, axis: Axis, *, algorithm: str | None = None) -> Pending:
    """out, of `size` times the elements of x, gets the pieces one after another."""
    if axis.size == 1:
        return Pending(out.copy_(x.view_as(out)))
    x = x.contiguous()
    whole, piece = out.detach().view(-1), x.detach().view(-1)
    return start(
        "all_gather", axis, out, x, "", algorithm,
        lambda: dist.all_gather_single(whole, piece, axis.group, async_op=True),
        lambda steps, post: steps(post, whole, piece),
    )  # fmt: skip


def reduce_scatter_into(
    out: Tensor, x: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Pending:
    """out gets piece `index` of the sum of x, which has `size` times its elements."""
    if axis.size == 1:
        return Pending(out.copy_(x.view_as(out)))
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


def _pieces(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """(..., D, ...) -> (size, ..., D/size, ...), contiguous."""
    if x.shape[dim] % axis.size:
        raise ValueError(
            f"dim {dim} of {tuple(x.shape)} does not divide by {axis.size} ranks of {axis.name}"
        )
    return torch.stack(x.chunk(axis.size, dim))


__all__ = [
    "CollectiveError", "CollectiveMismatch", "Pending", "Reduce", "all_gather", "all_gather_bytes",
    "all_gather_into", "all_reduce", "all_reduce_into", "all_to_all", "all_to_all_into",
    "backend_bytes", "broadcast", "broadcast_into", "exchange", "reduce_scatter",
    "reduce_scatter_into", "shared_buffer",
]  # fmt: skip
