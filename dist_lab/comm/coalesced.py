"""Many small pieces in one collective: how they lie side by side, and how they get there and back.

With lengths l_k, L = sum of l_k, and N ranks, what a collective carries is (N, L), row by row: row
r is what rank r has to give, or is to get, its pieces one after another.

    all_gather        row r = [ piece 0 of rank r | piece 1 | ... ]         -> outs[k]: (N, l_k)
    reduce_scatter    row r = [ elements r l_0 .. (r+1) l_0 of x_0 | ... ]  -> out: (L,) on rank r

An x_k that has fewer elements than N l_k counts as one with zeros at its end.
"""

from collections.abc import Sequence

from torch import Tensor

from dist_lab.comm.calls import Pending, Spec, start_shared
from dist_lab.comm.into import all_gather_into, reduce_scatter_into, until_read, window_of
from dist_lab.comm.shared import as_array
from dist_lab.comm.shared_collectives import all_gather, slices
from dist_lab.mesh import Axis


def all_gather_coalesced(outs: Sequence[Tensor], x: Tensor, axis: Axis) -> Pending:
    """Many small all_gathers in one: x has this rank's pieces side by side, flat.

    Args:
        outs: (size, length_k) each, contiguous, of the dtype of x; row j gets piece k of rank j.
        x: the pieces, in the order of `outs`. If it is a `shared_buffer` nothing else is needed,
            and nobody may write to it before `until_read`; otherwise `size` times its memory.

    Returns:
        A Pending whose `wait()` returns x, when all of `outs` are filled.
    """
    lengths = [out.shape[1] for out in outs]
    assert sum(lengths) == x.numel(), f"pieces of {lengths}, and {x.numel()} elements"
    assert all(out.dtype == x.dtype and out.is_contiguous() for out in outs)
    if window := window_of(x, axis):
        cuts = slices(lengths)
        theirs = [[array[cut] for cut in cuts] for array in window.arrays]
        arrays = [as_array(out) for out in outs]
        mine = [[array[j] for array in arrays] for j in range(axis.size)]
        spec = Spec("all_gather", axis, x, f"{len(lengths)} pieces")
        moves = all_gather(window, theirs, mine)
        return start_shared(spec, x, (axis.size - 1) * x.nbytes, window, moves)
    whole = x.new_empty(axis.size, x.numel())

    def arrived(whole: Tensor) -> Tensor:
        unpack(outs, whole)
        return x

    return all_gather_into(whole, x, axis).then(arrived)


def reduce_scatter_coalesced(
    out: Tensor,
    xs: Sequence[Tensor | None],
    lengths: Sequence[int],
    staging: Tensor,
    axis: Axis,
) -> Pending:
    """Many small reduce_scatters in one. `xs` are not needed any more when it returns.

    Args:
        out: flat, sum(lengths) elements, of any dtype: gets elements [i lengths[k] : (i+1)
            lengths[k]] of the sum of everyone's xs[k], i this rank's position, side by side.
        xs: at most size lengths[k] elements each, of any shape. What is missing at the end counts
            as zeros, and so does None.
        staging: flat, size sum(lengths) elements or more, of the dtype in which they are summed. It
            must not be touched before `wait()`, nor before `until_read` if it is a `shared_buffer`;
            another call of this waits for that by itself.
    """
    until_read(staging, axis)
    packed = staging.data[: axis.size * sum(lengths)]
    pack(packed.view(axis.size, -1), xs, lengths)
    if out.dtype == staging.dtype or window_of(staging, axis, "sum"):
        return reduce_scatter_into(out, packed, axis, memory=staging)
    piece = staging.new_empty(out.numel())
    return reduce_scatter_into(piece, packed, axis).then(out.copy_)


def unpack(outs: Sequence[Tensor], whole: Tensor) -> None:
    """(N, L) -> every outs[k], (N, l_k). Autograd does not see it: it is not an operation on outs,
    whose values were never there before."""
    for out, columns in zip(outs, whole.split([out.shape[1] for out in outs], 1), strict=True):
        out.data.copy_(columns)


def pack(whole: Tensor, xs: Sequence[Tensor | None], lengths: Sequence[int]) -> None:
    """Every xs[k], of any shape -> (N, L), cast to its dtype."""
    for x, rows in zip(xs, whole.split(list(lengths), 1), strict=True):
        _spread(rows, rows.new_empty(0) if x is None else x.detach())


def _spread(rows: Tensor, x: Tensor) -> None:
    """The elements of x from row to row, and zeros after the last.

    >>> import torch
    >>> rows = torch.ones(3, 2)
    >>> _spread(rows, torch.tensor([5.0, 6.0, 7.0]))
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
