"""The collectives. Each takes the axis it runs along, and is counted.

Two forms of each:

    y = all_reduce(x, axis)                      out of place, blocking; returns the result
    pending = all_reduce_into(buffer, axis)      into memory the caller owns, returns at once;
    ...                                          other work
    buffer = pending.wait()                      blocks until the buffer may be read

`_into` is for buckets and gather buffers, where a second copy costs more than the sum itself. A
buffer must not be touched before `wait()`. On an axis of size 1 every operation is the identity,
and an out-of-place form then returns its argument itself.

Notation: `x[D_X]` is sharded over axis X, `x{U_X}` is a partial sum over X (The Scaling Book, ch.
3).
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.ledger import Call, formula_bytes
from dist_lab.comm.wire import CollectiveError, CollectiveMismatch
from dist_lab.mesh import Axis

Reduce = Literal["sum", "max"]
REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Pending:
    """A collective on its way. `wait()` blocks until its result may be read, and returns it."""

    def __init__(
        self, result: Tensor, works: Sequence[dist.Work] = (), call: Call | None = None,
        axis: Axis | None = None, staging: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._result, self._works, self._call, self._axis = result, works, call, axis
        self._staging = staging  # where the result arrives, if not in place

    def wait(self) -> Tensor:
        """Raises CollectiveError, naming rank, call and line, if a peer died or did not arrive."""
        if self._call is not None and self._axis is not None:
            wire, call, began = self._axis.wire, self._call, time.perf_counter()
            try:
                for work in self._works:
                    work.wait()
            except RuntimeError as error:
                raise wire.failure(call, error) from error
            wire.ledger.waited(call, time.perf_counter() - began)
            if self._staging is not None:
                self._result.copy_(self._staging)
            self._call = None  # a second wait() neither blocks nor counts
        return self._result


# --- out of place ---------------------------------------------------------------------------------


def all_reduce(x: Tensor, axis: Axis, reduce: Reduce = "sum") -> Tensor:
    """x{U_X} -> x: every rank gets the sum (or maximum) over the axis. Any shape."""
    if axis.size == 1:
        return x
    return all_reduce_into(x.clone(memory_format=torch.contiguous_format), axis, reduce).wait()


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """x[D_X] -> x[D]: everyone's piece, concatenated along `dim`. Equal shapes, not 0-dim."""
    if axis.size == 1:
        return x
    out = all_gather_into(x.new_empty(axis.size, *x.shape), x, axis).wait()  # (size, ..., D_X, ...)
    return out.flatten(0, 1) if dim == 0 else torch.cat(out.unbind(0), dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """x[D]{U_X} -> x[D_X]: rank i gets the i-th of `size` equal pieces of the sum along `dim`.

    Raises ValueError if `dim` does not divide by the axis size.
    """
    if axis.size == 1:
        return x
    pieces = _pieces(x, axis, dim)  # (size, ..., D/size, ...)
    return reduce_scatter_into(torch.empty_like(pieces[0]), pieces, axis).wait()


def all_to_all(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """x[A_X, B] -> x[A, B_X]: piece j along `split_dim` goes to rank j, which concatenates.

    Raises ValueError if `split_dim` does not divide by the axis size.
    """
    if axis.size == 1:
        return x
    pieces = _pieces(x, axis, split_dim)
    out = all_to_all_into(torch.empty_like(pieces), pieces, axis).wait()
    return torch.cat(out.unbind(0), concat_dim)


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Every rank gets the tensor of the rank at position `source` of the axis."""
    if axis.size == 1:
        return x
    return broadcast_into(x.clone(memory_format=torch.contiguous_format), axis, source).wait()


def all_gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """The bytes of every rank, in order of position. For small things of unequal length."""
    if axis.size == 1:
        return [data]
    device = axis.wire.device
    lengths = all_gather(torch.tensor([len(data)], device=device), axis).tolist()
    padded = bytearray(data.ljust(max(*lengths, 1), b"\0"))
    rows = all_gather(torch.frombuffer(padded, dtype=torch.uint8)[None].to(device), axis)
    return [bytes(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]


# --- into memory of the caller, asynchronous ------------------------------------------------------


def all_reduce_into(buffer: Tensor, axis: Axis, reduce: Reduce = "sum") -> Pending:
    """buffer{U_X} -> buffer, in place."""
    flat = buffer.contiguous()  # the transport reads memory in order, whatever the strides say
    return _start(
        "all_reduce", axis, buffer, flat, reduce,
        lambda: dist.all_reduce(flat, REDUCE[reduce], axis.group, async_op=True),
    )  # fmt: skip


def all_gather_into(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """out, of `size` times the elements of x, gets the pieces one after another."""
    if axis.size == 1:
        return Pending(out.copy_(x.view_as(out)))
    x = x.contiguous()
    return _start(
        "all_gather", axis, out, x, "",
        lambda: dist.all_gather_single(out.view(-1), x.view(-1), axis.group, async_op=True),
    )  # fmt: skip


def reduce_scatter_into(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """out gets piece `index` of the sum of x, which has `size` times its elements."""
    if axis.size == 1:
        return Pending(out.copy_(x.view_as(out)))
    x = x.contiguous()
    return _start(
        "reduce_scatter", axis, out, x, "sum",
        lambda: dist.reduce_scatter_single(
            out.view(-1), x.view(-1), group=axis.group, async_op=True
        ),
        payload=x.nbytes,
    )  # fmt: skip


def all_to_all_into(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """Slice j of x (along dim 0) goes to rank j; slice i of out comes from rank i."""
    if axis.size == 1:
        return Pending(out.copy_(x))
    x = x.contiguous()
    return _start(
        "all_to_all", axis, out, x, "",
        lambda: dist.all_to_all_single(out, x, group=axis.group, async_op=True),
    )  # fmt: skip


def broadcast_into(buffer: Tensor, axis: Axis, source: int = 0) -> Pending:
    """buffer of the rank at position `source` overwrites everyone's."""
    flat = buffer.contiguous()
    return _start(
        "broadcast", axis, buffer, flat, f"from {source}",
        lambda: dist.broadcast(flat, axis.ranks[source], axis.group, async_op=True),
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
    pendings = []
    sends = [(x.contiguous(), to) for x, to in sends]
    for posts, post, verb in ((receives, dist.irecv, "recv"), (sends, dist.isend, "send")):
        for x, peer in posts:
            assert peer != axis.index, f"rank {axis.ranks[peer]} cannot {verb} to itself"
            call = axis.wire.call(
                verb, axis.name, axis.size, f"{_about(x)}, peer {peer}",
                *((x.nbytes, x.nbytes) if verb == "send" else (0, 0)),
            )  # fmt: skip
            axis.wire.ledger.enter(call)
            try:
                work = post(x, axis.ranks[peer], axis.group)
            except RuntimeError as error:
                raise axis.wire.failure(call, error) from error
            assert work is not None
            pendings.append(Pending(x, [work], call, axis))
    return pendings


# --- what every collective goes through -----------------------------------------------------------


def _start(
    op: str,
    axis: Axis,
    out: Tensor,
    given: Tensor,
    detail: str,
    begin: Callable[[], dist.Work | None],
    *,
    payload: int | None = None,
    source: int = 0,
) -> Pending:
    if axis.size == 1:
        return Pending(out)
    payload = out.nbytes if payload is None else payload
    about = ", ".join(filter(None, [_about(given), detail]))
    position = (axis.index - source) % axis.size
    sent = backend_bytes(op, axis.size, position, payload, axis.wire.backend)
    call = axis.wire.call(op, axis.name, axis.size, about, payload, sent)
    if axis.wire.check:
        _compare(call, axis)
    axis.wire.ledger.enter(call)
    try:
        work = begin()
    except RuntimeError as error:
        raise axis.wire.failure(call, error) from error
    in_place = op in ("all_reduce", "broadcast")
    staging = given if in_place and given is not out else None
    return Pending(out, [work] if work is not None else [], call, axis, staging)


def backend_bytes(op: str, size: int, position: int, payload: int, backend: str = "gloo") -> int:
    """Bytes that the backend's own algorithm makes one rank send.

    all_reduce and all_gather are rings, all_to_all is direct. gloo's reduce_scatter is an
    all_reduce of which most is thrown away, and its broadcast a binomial tree rooted at position
    0: in round i every rank below 2^i hands the whole on to the rank 2^i after it. nccl's are
    rings: the broadcast goes from each rank to the next.

    >>> [backend_bytes("broadcast", 4, i, 100) for i in range(4)]
    [200, 100, 0, 0]
    """
    if op == "broadcast" and backend == "nccl":
        return payload if position < size - 1 else 0
    if op == "broadcast":
        rounds = (1 << i for i in range((size - 1).bit_length()))
        return payload * sum(position < step and position + step < size for step in rounds)
    wasted = 2 if op == "reduce_scatter" and backend == "gloo" else 1
    return int(wasted * formula_bytes(op, size, payload))


def _compare(call: Call, axis: Axis) -> None:
    """Refuse a collective that the other ranks of the axis are not about to call as well.

    [Note: the order check] Collectives have no names on the network: ranks that call different
    ones hang, or read each other's bytes as something else. With `check` every rank first sends a
    description of fixed length, which is the same collective whatever the ranks were about to do.
    A rank that calls nothing at all is still a time-out, which names the line that waited.
    """
    width = 256
    mine = f"{call.op}({call.about}) at {call.where}, phase {call.phase}, {call.unit}"
    text = bytearray(mine.encode()[:width].ljust(width))
    row = torch.frombuffer(text, dtype=torch.uint8).to(axis.wire.device)
    rows = row.new_empty(axis.size, width)
    size, wire = axis.size, axis.wire
    sent = backend_bytes("all_gather", size, axis.index, rows.nbytes, wire.backend)
    wire.ledger.enter(wire.call("all_gather", axis.name, size, "order check", rows.nbytes, sent))
    try:
        dist.all_gather_single(rows.view(-1), row, axis.group)
    except RuntimeError as error:
        raise axis.wire.failure(call, error) from error
    said = [bytes(r.tolist()).decode(errors="replace").rstrip() for r in rows]
    if len({text.split(" at ")[0] for text in said}) > 1:
        each = "; ".join(f"rank {r} calls {t}" for r, t in zip(axis.ranks, said, strict=True))
        raise CollectiveMismatch(
            f"call #{call.number}: the ranks of {axis.name} disagree, and would have hung: {each}"
        )


def _about(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


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
    "reduce_scatter_into",
]  # fmt: skip
