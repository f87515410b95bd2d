"""Coalesced collectives: many small tensors travel in one call.

With shard lengths l_k, L = sum of l_k, and N ranks, the payload is a matrix (N, L). Row r is rank
r's input to an all_gather, or its output of a reduce_scatter: its shards, one after another.

    all_gather        row r = [ shard 0 of rank r | shard 1 | ... ]         -> outs[k]: (N, l_k)
    reduce_scatter    row r = [ elements r l_0 .. (r+1) l_0 of x_0 | ... ]  -> out: (L,) on rank r

An x_k with fewer elements than N l_k is padded with zeros.
"""

from collections.abc import Sequence

from torch import Tensor

from dist_lab.comm.calls import Pending, Spec, start_shared
from dist_lab.comm.into import all_gather_into, reduce_scatter_into, wait_for_readers, window_of
from dist_lab.comm.shared.collectives import all_gather, slices
from dist_lab.comm.shared.memory import as_array
from dist_lab.mesh.mesh import Axis


def all_gather_coalesced(outs: Sequence[Tensor], x: Tensor, axis: Axis) -> Pending:
    """Many small all_gathers in one. x holds this rank's shards one after another.

    Args:
        outs: (size, length_k) each, contiguous, of the dtype of x. Row j gets shard k of rank j.
        x: flat, the shards in the order of `outs`. If it is a `shared_buffer`, no other memory is
            needed, and it must not be written to before `wait_for_readers`. Any other x needs
            extra memory of `size` times its own.

    Returns:
        A Pending whose `wait()` returns x once all of `outs` are filled.
    """
    lengths = [out.shape[1] for out in outs]
    assert sum(lengths) == x.numel(), f"shards of {lengths}, but {x.numel()} elements"
    assert all(out.dtype == x.dtype and out.is_contiguous() for out in outs)
    if window := window_of(x, axis):
        sources = [[array[shard] for shard in slices(lengths)] for array in window.arrays]
        arrays = [as_array(out) for out in outs]
        targets = [[array[j] for array in arrays] for j in range(axis.size)]
        spec = Spec("all_gather", axis, x, f"{len(lengths)} shards")
        moves = all_gather(window, sources, targets)
        return start_shared(spec, x, (axis.size - 1) * x.nbytes, window, moves)
    matrix = x.new_empty(axis.size, x.numel())

    def unpack_all(matrix: Tensor) -> Tensor:
        unpack(outs, matrix)
        return x

    return all_gather_into(matrix, x, axis).then(unpack_all)


def reduce_scatter_coalesced(
    out: Tensor,
    xs: Sequence[Tensor | None],
    lengths: Sequence[int],
    staging: Tensor,
    axis: Axis,
) -> Pending:
    """Many small reduce_scatters in one. The caller may free `xs` after the call.

    Args:
        out: flat, sum(lengths) elements, of any dtype. Gets this rank's shards in order. Shard k is
            elements i lengths[k] .. (i+1) lengths[k] of the sum of all ranks' xs[k], where i is
            this rank's position.
        xs: at most size * lengths[k] elements each, any shape, padded with zeros. None is zeros.
        staging: flat, size * sum(lengths) elements or more, of the dtype of the sum. It must not be
            touched before `wait()`. If it is a `shared_buffer`, it must not be written to before
            `wait_for_readers`; the next call of this function waits by itself.
    """
    wait_for_readers(staging, axis)
    packed = staging.data[: axis.size * sum(lengths)]
    pack(packed.view(axis.size, -1), xs, lengths)
    if out.dtype == staging.dtype or window_of(staging, axis, "sum"):
        return reduce_scatter_into(out, packed, axis, memory=staging)
    shards = staging.new_empty(out.numel())
    return reduce_scatter_into(shards, packed, axis).then(out.copy_)


def unpack(outs: Sequence[Tensor], matrix: Tensor) -> None:
    """(N, L) -> every outs[k], (N, l_k). `.data` hides this first write from autograd."""
    for out, columns in zip(outs, matrix.split([out.shape[1] for out in outs], 1), strict=True):
        out.data.copy_(columns)


def pack(matrix: Tensor, xs: Sequence[Tensor | None], lengths: Sequence[int]) -> None:
    """Every xs[k], of any shape -> (N, L), cast to the dtype of `matrix`."""
    for x, rows in zip(xs, matrix.split(list(lengths), 1), strict=True):
        _copy_padded(rows, rows.new_empty(0) if x is None else x.detach())


def _copy_padded(rows: Tensor, x: Tensor) -> None:
    """Copy the elements of x into the rows, one row after another; fill the rest with zeros.

    >>> import torch
    >>> rows = torch.ones(3, 2)
    >>> _copy_padded(rows, torch.tensor([5.0, 6.0, 7.0]))
    >>> rows.tolist()
    [[5.0, 6.0], [7.0, 0.0], [0.0, 0.0]]
    """
    length, count = rows.shape[1], x.numel()
    assert count <= rows.numel(), f"{count} elements for {tuple(rows.shape)}"
    if not length:
        return
    flat = x.reshape(-1)
    full, rest = divmod(count, length)
    rows[:full].copy_(flat[: full * length].view(full, length))
    if count < rows.numel():
        rows[full, :rest].copy_(flat[full * length :])
        rows[full, rest:].zero_()
        rows[full + 1 :].zero_()
