"""A hash of a model's weights: two runs with equal hashes have equal bits."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def sha256(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of all weights, by name, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
