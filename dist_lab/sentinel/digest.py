"""A 64-bit digest of a tensor's bits, at the speed of memory.

    digest = sum over elements i of  bits_i * (2 w_i + 1)    modulo 2^64

The weights are odd, so they have inverses: a change of one element always changes the digest. w_i
are the bits of mix64(i), so that several changes cancel with a chance of 2^-64, also if elements
have exchanged their places. Integers wrap around, so the sum does not depend on its order.
"""

from functools import cache

import torch
from torch import Tensor

from dist_lab.comm.anything import pieces
from dist_lab.randomness.bits import mix64
from dist_lab.torch_private import of_plain_tensors

CHUNK = 2**16  # elements at a time: their products stay in the processor's cache
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def digest(tensor: Tensor) -> int:
    """A signed 64-bit number that depends on every bit of the tensor, also of a sparse one."""
    return int(of_plain_tensors(_digest, tensor))


@torch.no_grad()
def _digest(tensor: Tensor) -> int:
    total = 0
    for dense in pieces(tensor.detach()):
        plain = dense.resolve_conj().resolve_neg()
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        flat = plain.contiguous().flatten()
        bits = flat.view(torch.uint8) if flat.dtype is torch.bool else flat
        bits = bits.view(INTEGERS[bits.dtype.itemsize])
        weights = _weights(bits.device)
        sums = [(chunk * weights[: len(chunk)]).sum() for chunk in bits.split(CHUNK)]
        if sums:
            of_chunks = mix64(torch.stack(sums) + torch.arange(len(sums), device=bits.device))
            total += int(of_chunks.sum())
    return int(mix64(torch.tensor(_wrapped(total))))


@cache
def _weights(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return mix64(torch.arange(CHUNK, device=device)) * 2 + 1


def _wrapped(value: int) -> int:
    """
    >>> _wrapped(2**63)
    -9223372036854775808
    """
    return (value + 2**63) % 2**64 - 2**63
