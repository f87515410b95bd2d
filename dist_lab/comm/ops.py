"""The collectives. Each runs along an axis of the mesh, and the ledger counts it.

Each has two forms:

    y = all_reduce(x, axis)                      out of place, blocking; returns the result
    pending = all_reduce_into(buffer, axis)      into the caller's memory; returns at once
    ...                                          other work, which overlaps with it
    buffer = pending.wait()                      blocks until the buffer may be read

`_into` is for buckets and gather buffers, where a second copy costs more than the sum itself. The
buffer must not be touched before `wait()`. All ranks must wait for their calls in the same order,
because a hand-written collective sends its first round of messages at the call, and all later
rounds inside `wait()`. On an axis of size 1 every operation is the identity, and the out-of-place
forms return their argument itself. A `_coalesced` form does many collectives in one.

The algorithm is set for a whole mesh (`init_mesh(collectives=...)`) or for one call (`algorithm=`):
"backend", "ring", "tree", "direct" or "pairwise" (by_hand/algorithms.py), or "auto", the fastest we
measured. An algorithm gives all ranks the same bits; two algorithms may round differently.

Notation: `x[D_X]` is sharded over axis X, `x{U_X}` is a partial sum over X (The Scaling Book, ch.
3).
"""

import torch
from torch import Tensor

from dist_lab.comm.calls import Pending
from dist_lab.comm.coalesced import all_gather_coalesced, reduce_scatter_coalesced
from dist_lab.comm.context import SHARED_MEMORY, CollectiveError, CollectiveMismatch
from dist_lab.comm.into import (
    Reduce,
    all_gather_into,
    all_reduce_into,
    all_to_all_into,
    all_to_all_uneven_into,
    broadcast_into,
    exchange,
    reduce_scatter_into,
    wait_for_readers,
)
from dist_lab.comm.ledger import backend_bytes
from dist_lab.comm.shared import memory as shared
from dist_lab.mesh.mesh import Axis


def all_reduce(
    x: Tensor, axis: Axis, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Tensor:
    """x{U_X} -> x: all ranks get the sum (or maximum) over the axis. Any shape."""
    if axis.size == 1:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    return all_reduce_into(copy, axis, reduce, algorithm=algorithm).wait()


def all_gather(x: Tensor, axis: Axis, dim: int = 0, *, algorithm: str | None = None) -> Tensor:
    """x[D_X] -> x[D]: all ranks' x, concatenated along `dim`. Shapes must be equal, not 0-dim."""
    if axis.size == 1:
        return x
    out = x.new_empty(axis.size, *x.shape)
    all_gather_into(out, x, axis, algorithm=algorithm).wait()  # (size, ..., D_X, ...)
    return out.flatten(0, 1) if dim == 0 else torch.cat(out.unbind(0), dim)


def reduce_scatter(
    x: Tensor, axis: Axis, dim: int = 0, reduce: Reduce = "sum", *, algorithm: str | None = None
) -> Tensor:
    """x[D]{U_X} -> x[D_X]: rank i gets shard i of the sum, which is split along `dim`.

    Raises ValueError if the length of `dim` is not divisible by the axis size.
    """
    if axis.size == 1:
        return x
    chunks = _stacked_chunks(x, axis, dim)  # (size, ..., D/size, ...)
    out = torch.empty_like(chunks[0])
    return reduce_scatter_into(out, chunks, axis, reduce, algorithm=algorithm).wait()


def all_to_all(
    x: Tensor, axis: Axis, split_dim: int, concat_dim: int, *, algorithm: str | None = None
) -> Tensor:
    """x[A_X, B] -> x[A, B_X]: chunk j along `split_dim` goes to rank j, which concatenates the
    chunks it gets along `concat_dim`.

    Raises ValueError if the length of `split_dim` is not divisible by the axis size.
    """
    if axis.size == 1:
        return x
    chunks = _stacked_chunks(x, axis, split_dim)
    out = all_to_all_into(torch.empty_like(chunks), chunks, axis, algorithm=algorithm).wait()
    return torch.cat(out.unbind(0), concat_dim)


def broadcast(x: Tensor, axis: Axis, source: int = 0, *, algorithm: str | None = None) -> Tensor:
    """All ranks get the tensor of the rank at position `source` of the axis."""
    if axis.size == 1:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    return broadcast_into(copy, axis, source, algorithm=algorithm).wait()


def all_gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """Returns the bytes of every rank, by position. For small data of unequal length."""
    if axis.size == 1:
        return [data]
    device = axis.device
    lengths = all_gather(torch.tensor([len(data)], device=device), axis).tolist()
    padded = bytearray(data.ljust(max(*lengths, 1), b"\0"))
    rows = all_gather(torch.frombuffer(padded, dtype=torch.uint8)[None].to(device), axis)
    return [row[:n].cpu().numpy().tobytes() for row, n in zip(rows, lengths, strict=True)]


@torch.inference_mode(False)  # the first call may be in inference mode; training writes to it
def shared_buffer(length: int, dtype: torch.dtype, axis: Axis) -> Tensor:
    """Returns a flat buffer of zeros, in memory that all ranks map if possible.

    If it is shared, these collectives send no messages: `all_reduce_into` on it, `all_gather_into`
    to it, `reduce_scatter_into` from it, `all_gather_coalesced` with it as input, and
    `reduce_scatter_coalesced` with it as staging. They recognise the buffer itself, not a view of
    it. Sums of 16-bit numbers still use messages.

    Ranks can share memory if `collectives` is "auto", the backend is gloo, all ranks run on one
    Linux machine with room in /dev/shm, and the dtype is float32, float64, bfloat16 or float16.
    Otherwise the buffer is ordinary memory. Collective: all ranks of the axis must call it.
    """
    comm = axis.comm
    if axis.size == 1 or comm.collectives != "auto" or comm.backend != "gloo":
        return torch.zeros(length, dtype=dtype, device=comm.device)
    files = comm.files
    with files.create(length, dtype) as own, comm.label(unit=SHARED_MEMORY):
        places = [place.decode() for place in all_gather_bytes(own.encode(), axis)]
        attached = {place: files.attach(place, length, dtype) for place in set(places)}
        memories = [memory for place in places if (memory := attached[place]) is not None]
        status = b"all" if len(memories) == axis.size else b"not all"
        statuses = all_gather_bytes(status, axis)
    if set(statuses) != {b"all"}:
        return torch.zeros(length, dtype=dtype)
    buffer = torch.from_numpy(memories[axis.index].data).view(dtype)
    comm.shared[buffer] = shared.SharedWindow(
        memories, axis.index, axis.ranks, comm.timeout, files.move
    )
    return buffer


def _stacked_chunks(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """(..., D, ...) -> (size, ..., D/size, ...), contiguous."""
    if x.shape[dim] % axis.size:
        raise ValueError(
            f"dim {dim} of {tuple(x.shape)} does not divide by {axis.size} ranks of {axis.name}"
        )
    return torch.stack(x.chunk(axis.size, dim))


__all__ = [
    "CollectiveError", "CollectiveMismatch", "Pending", "Reduce", "all_gather", "all_gather_bytes",
    "all_gather_coalesced", "all_gather_into", "all_reduce", "all_reduce_into", "all_to_all",
    "all_to_all_into", "all_to_all_uneven_into", "backend_bytes", "broadcast", "broadcast_into",
    "exchange", "reduce_scatter", "reduce_scatter_coalesced", "reduce_scatter_into",
    "shared_buffer", "wait_for_readers",
]  # fmt: skip
