"""A 64-bit digest of a tensor's bits, at the speed of memory.

    sum of a chunk = sum over its words i of  word_i * (2 mix64(i) + 1)       modulo 2^64
    digest         = mix64(sum over chunks c of  mix64(sum of chunk c + c))   words of 8 bytes

The weights are odd, so they have inverses: a change within one word always changes the digest. They
are mixed bits of the place, so that several changes cancel with a chance of 2^-64, also if elements
or chunks have exchanged their places. Integers wrap around: no sum depends on its order.
"""

from functools import cache

import torch
from torch import Tensor

from dist_lab.comm.anything import pieces
from dist_lab.randomness.bits import mix64
from dist_lab.torch_private import of_plain_tensors

CHUNK = 2**16  # words at a time: their products stay in the processor's cache
WORD = 8  # bytes


def digest(tensor: Tensor) -> int:
    """A signed 64-bit number that depends on every bit of the tensor, also of a sparse one."""
    return int(of_plain_tensors(_digest, tensor))


@torch.no_grad()
def _digest(tensor: Tensor) -> int:
    total = 0
    for dense in pieces(tensor.detach()):
        plain = dense.resolve_conj().resolve_neg().contiguous().flatten()
        if plain.storage_offset() * plain.dtype.itemsize % WORD:  # words must be aligned
            plain = plain.clone()
        of_bytes = plain.view(torch.uint8)
        rest = len(of_bytes) % WORD
        words = of_bytes[: len(of_bytes) - rest].view(torch.int64)
        weights = _weights(words.device)
        sums = [(chunk * weights[: len(chunk)]).sum() for chunk in words.split(CHUNK)]
        if rest:
            tail = bytes(of_bytes[-rest:].tolist()).ljust(WORD, b"\0")
            sums.append(words.new_tensor(int.from_bytes(tail, "little", signed=True)))
        of_chunks = mix64(torch.stack(sums) + torch.arange(len(sums), device=words.device))
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
