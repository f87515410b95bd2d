"""Checks that all ranks have equal settings, shapes and weights. Errors name the differing rank.

Ranks that start with different settings or weights train without an error, and the result is wrong.
Comparing them before the first step costs a few bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.anything import pieces, signature
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import Axis


def check_settings_agree(settings: Mapping[str, object], axis: Axis) -> None:
    """Raises UserError on every rank if settings differ, with the first such key and rank.

    The value of most ranks counts as the right one. Values must be JSON.
    """
    if difference := _first_difference(settings, axis):
        rank, key, value, usual = difference
        raise UserError(
            f"rank {rank} was started with {key}={value}, the others with {usual}; start every "
            "rank with the same settings"
        )


def check_shapes_agree(tensors: Mapping[str, Tensor], axis: Axis) -> None:
    """Raises UserError on every rank if names, shapes or dtypes differ between ranks."""
    signatures = {name: signature(tensor) for name, tensor in tensors.items()}
    if difference := _first_difference(signatures, axis):
        rank, name, value, usual = difference
        raise UserError(
            f"rank {rank} has {name} as {value}, the others as {usual}; build the same model on "
            "every rank"
        )


def _first_difference(
    mapping: Mapping[str, object], axis: Axis
) -> tuple[int, str, str, str] | None:
    """Returns the differing rank, the first key that differs, its value there, and the usual one.

    Values are JSON, null if the key is missing. Returns None if all ranks agree.
    """
    text = json.dumps(mapping).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    if len(set(ops.all_gather_bytes(digest, axis))) == 1:
        return None
    mappings = [json.loads(b) for b in ops.all_gather_bytes(text, axis)]
    for key in {key: None for one in mappings for key in one}:
        values = [json.dumps(one.get(key)) for one in mappings]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in zip(axis.ranks, values, strict=True):
            if value != usual:
                return rank, key, value, usual
    return None


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """If the block raises on one rank, raise the same error on all ranks, so that none hangs.

    For work that may fail on one rank alone, such as reading a file. Collective.
    """
    own_error: UserError | MachineError | None = None
    try:
        yield
    except (UserError, MachineError) as error:
        own_error = error
    own = [] if own_error is None else [isinstance(own_error, UserError), str(own_error)]
    for refusal in map(json.loads, ops.all_gather_bytes(json.dumps(own).encode(), axis)):
        if refusal:
            raise (UserError if refusal[0] else MachineError)(refusal[1]) from own_error


def first_says(function: Callable[[], str], axis: Axis) -> str:
    """Call a function on the first rank, and return its text on all. Collective.

    An error of it is raised on all ranks, as by `together`.
    """
    text = ""
    with together(axis):
        if axis.index == 0:
            text = function()
    return ops.all_gather_bytes(text.encode(), axis)[0].decode()


def check_tensors_agree(tensors: Mapping[str, Tensor], axis: Axis) -> None:
    """Raises UserError on every rank if a tensor differs between ranks, even by one bit."""
    if axis.size == 1 or not tensors:
        return
    digests = [fingerprint(tensor) for tensor in tensors.values()]
    rows = ops.all_gather(torch.tensor([digests], device=axis.device), axis)  # (size, tensors)
    differs = (rows != rows[0]).any(0)
    if differs.any():
        first = int(differs.nonzero()[0])
        odd = axis.ranks[int((rows[:, first] != rows[0, first]).nonzero()[0])]
        raise UserError(
            f"{int(differs.sum())} of {len(tensors)} tensors differ between ranks, first "
            f"{list(tensors)[first]} (rank {odd} against rank {axis.ranks[0]}); build the model "
            "from one seed on every rank, or let parallelize(broadcast=True) copy rank 0's"
        )


def fingerprint(tensor: Tensor) -> int:
    """Returns a 63-bit digest of a tensor's bytes."""
    digest = hashlib.blake2b(digest_size=8)
    tensor = tensor.detach()
    for dense in [tensor] if tensor.layout is torch.strided else pieces(tensor):
        plain = dense.resolve_conj().resolve_neg().cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1
