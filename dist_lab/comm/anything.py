"""Broadcast tensors of any kind, although a transport can send only dense ones of some dtypes.

    tensor                                        sent as
    sparse                                        its indices and its values
    expanded: many elements at one address        one element for each address
    with a lazy conjugation or negation           the resolved values
    of a dtype unknown to gloo                    its bytes
    any other                                     itself

The values that arrive are written in place: dtype, shape, layout and strides stay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis

SENDABLE_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)


def broadcast_anything(tensor: Tensor, axis: Axis, source: int = 0) -> None:
    """The tensor of the rank at position `source` overwrites that of every rank, in place."""
    for dense in pieces(tensor.detach()):
        plain = dense.resolve_conj().resolve_neg()
        if plain.dtype in SENDABLE_DTYPES:
            ops.broadcast_into(plain, axis, source).wait()
        else:
            plain = plain.contiguous()
            ops.broadcast_into(sendable(plain.flatten()), axis, source).wait()
        if plain is not dense:
            dense.copy_(plain)


def sendable(flat: Tensor) -> Tensor:
    """Returns a vector that gloo can send, in the same memory: the vector itself, or its bytes."""
    return flat if flat.dtype in SENDABLE_DTYPES else flat.view(torch.uint8)


def pieces(tensor: Tensor) -> list[Tensor]:
    """Returns the dense tensors that a tensor consists of, as views, with every address once."""
    if tensor.layout is torch.sparse_coo:
        return [tensor.indices(), *pieces(tensor.values())]
    if tensor.layout is not torch.strided:
        by_rows = tensor.layout in COMPRESSED_ROWS
        ends = tensor.crow_indices() if by_rows else tensor.ccol_indices()
        return [ends, tensor.col_indices() if by_rows else tensor.row_indices(), tensor.values()]
    index = distinct(tensor)
    return [tensor if index is None else tensor[index]]


def distinct(tensor: Tensor) -> tuple[int | slice, ...] | None:
    """Returns an index that selects each address of an expanded tensor once; None if not expanded.

    >>> distinct(torch.ones(2, 1).expand(2, 6))
    (slice(None, None, None), 0)
    """
    if tensor.layout is not torch.strided:
        return None
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    expanded = [stride == 0 and length > 1 for stride, length in dims]
    return tuple(0 if same else slice(None) for same in expanded) if any(expanded) else None


def signature(tensor: Tensor) -> str:
    """Returns the dtype, shape and layout, which must be the same on all ranks, as text."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    layout = str(tensor.layout).removeprefix("torch.").replace("_", " ")
    extra = ", expanded" if distinct(tensor) else ""
    if tensor.layout is not torch.strided:
        extra = f", {layout} of {tensor.values().shape[0]}"
    return f"{dtype} {list(tensor.shape)}{extra}"


def refuse_what_cannot_be_sent(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for a tensor with repeated sparse entries, or elements that share memory."""
    for name, tensor in tensors.items():
        if tensor.layout is torch.sparse_coo and not tensor.is_coalesced():
            raise UserError(f"{name} is sparse and repeats entries; give {name}.coalesce()")
        if tensor.layout is torch.strided and _overlaps(pieces(tensor)[0]):
            raise UserError(f"elements of {name} share memory; give {name}.clone()")


def _overlaps(tensor: Tensor) -> bool:
    """Returns whether elements of a tensor share memory, as those of `unfold` do."""
    reach = 0
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, length in sorted(dim for dim in dims if dim[1] > 1):
        if stride <= reach and tensor.numel():
            return True
        reach += stride * (length - 1)
    return False
