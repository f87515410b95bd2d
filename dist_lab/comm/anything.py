"""Tensors of every make as what a transport can send.

    sparse                          -> its indices and its values
    expanded: many elements, one    -> that one
      place in memory
    conjugated or negated lazily    -> the numbers that it stands for
    of a dtype unknown to gloo      -> its bytes

An ordinary tensor is sent as it is. Whatever arrives is written in place: dtype, shape, layout and
strides stay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis

SENT_AS_THEY_ARE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)


def broadcast_anything(tensor: Tensor, axis: Axis, source: int = 0) -> None:
    """The tensor of the rank at that position overwrites everyone's, in place."""
    for piece in pieces(tensor.detach()):
        plain = piece.resolve_conj().resolve_neg()
        if plain.dtype in SENT_AS_THEY_ARE:
            ops.broadcast_into(plain, axis, source).wait()
        else:
            plain = plain.contiguous()
            ops.broadcast_into(sendable(plain.flatten()), axis, source).wait()
        if plain is not piece:
            piece.copy_(plain)


def sendable(flat: Tensor) -> Tensor:
    """A vector as it can be sent: itself, or its bytes, in the same memory."""
    return flat if flat.dtype in SENT_AS_THEY_ARE else flat.view(torch.uint8)


def pieces(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor consists of, in its memory; none has a place in it twice."""
    if tensor.layout is torch.sparse_coo:
        return [tensor.indices(), *pieces(tensor.values())]
    if tensor.layout is not torch.strided:
        rows = tensor.layout in COMPRESSED_ROWS
        ends = tensor.crow_indices() if rows else tensor.ccol_indices()
        return [ends, tensor.col_indices() if rows else tensor.row_indices(), tensor.values()]
    index = distinct(tensor)
    return [tensor if index is None else tensor[index]]


def distinct(tensor: Tensor) -> tuple[int | slice, ...] | None:
    """Where each element of an expanded tensor is once; None of a tensor that is not expanded."""
    if tensor.layout is not torch.strided:
        return None
    sides = zip(tensor.stride(), tensor.shape, strict=True)
    once = [stride == 0 and length > 1 for stride, length in sides]
    return tuple(0 if same else slice(None) for same in once) if any(once) else None


def kind(tensor: Tensor) -> str:
    """What must be the same on all ranks."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    layout = str(tensor.layout).removeprefix("torch.").replace("_", " ")
    extra = ", expanded" if distinct(tensor) else ""
    if tensor.layout is not torch.strided:
        extra = f", {layout} of {tensor.values().shape[0]}"
    return f"{dtype} {list(tensor.shape)}{extra}"


def refuse_what_cannot_be_sent(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for what has no such pieces."""
    for name, tensor in tensors.items():
        if tensor.layout is torch.sparse_coo and not tensor.is_coalesced():
            raise UserError(f"{name} is sparse and has entries twice; give {name}.coalesce()")
        if tensor.layout is torch.strided and _overlaps(pieces(tensor)[0]):
            raise UserError(f"elements of {name} share their memory; give {name}.clone()")


def _overlaps(tensor: Tensor) -> bool:
    """Whether windows of a tensor lie over each other, as `unfold` makes them."""
    reach = 0
    sides = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, length in sorted(side for side in sides if side[1] > 1):
        if stride <= reach and tensor.numel():
            return True
        reach += stride * (length - 1)
    return False
