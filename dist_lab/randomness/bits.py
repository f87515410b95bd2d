"""Random bits as a function of the place where they are used, whatever rank computes them.

    key  = hash(seed, step, module, call)        one number of 64 bits
    row  = mix64(key, sample, position, ...)     64 bits for each row of features
    bits = mix32(row, feature)                   32 bits for each element

A generator that keeps a state gives numbers in the order in which a rank asks for them. So every
layout gets other numbers. A counter-based generator has no state: it hashes the address of an
element, and any rank that holds the element gets the same bits (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). Their Philox would take ten rounds for each element. We spend
64-bit arithmetic on each row only, and two multiplications of 32 bits on each element.

`mix64` is the finalizer of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
number generators"). `mix32` is a hash of the same form with constants of Wellons 2018 ("Prospecting
for hash functions"), and takes both halves of the row's number as keys. Integer tensors wrap
around, so the results are exact on every device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key_of(seed: int, step: int, module: str, call: int) -> int:
    """The key of one call of a module: a signed 64-bit number."""
    address = f"{seed} {step} {call} {module}".encode()
    return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little", signed=True)


def random_bits(key: int, indices: Sequence[Tensor]) -> Tensor:
    """int32 random bits for each element of a tensor.

    Args:
        indices: for each dim, the numbers of its positions in the unsharded tensor, as int64
            vectors; the first dim's are the samples.

    Returns:
        A tensor whose dims are as long as these vectors.
    """
    *outer, features = indices
    rows = torch.full((), key, dtype=torch.int64, device=features.device)
    for index in outer:
        rows = mix64(rows[..., None] + (index + 1) * GAMMA)
    return mix32(rows, features)


def mix64(x: Tensor) -> Tensor:
    """A bijection of 64-bit numbers: to change one bit changes each other one with chance 1/2."""
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def mix32(rows: Tensor, features: Tensor) -> Tensor:
    """rows (...) of 64 bits, features (D,) -> int32 (..., D). In place, for speed."""
    first, second = rows.to(torch.int32), (rows >> 32).to(torch.int32)
    x = features.to(torch.int32) * _signed(0x9E3779B9, 32) + first[..., None]
    x ^= _shift(x, 16, 32)
    x *= 0x7FEB352D
    x ^= second[..., None]
    x ^= _shift(x, 15, 32)
    x *= _signed(0x846CA68B, 32)
    x ^= _shift(x, 16, 32)
    return x


def _shift(x: Tensor, by: int, bits: int) -> Tensor:
    """The logical shift to the right. torch's own repeats the sign bit."""
    return (x >> by) & ((1 << (bits - by)) - 1)


def _signed(value: int, bits: int) -> int:
    """The signed number with the same bits as an unsigned one.

    >>> _signed(0xFFFF_FFFF, 32), _signed(5, 32)
    (-1, 5)
    """
    return value - (1 << bits) if value >> (bits - 1) else value


GAMMA = _signed(0x9E3779B97F4A7C15, 64)  # 2^64 / golden ratio, odd: SplitMix64's step
