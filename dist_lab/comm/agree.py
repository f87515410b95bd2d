"""Checks that all ranks have the same settings, shapes and weights; an error names the odd rank.

Ranks that start with different settings or weights train without an error, and the result is wrong.
A comparison before the first step costs a few bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.anything import kind, pieces
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import Axis


def check_settings_agree(settings: Mapping[str, object], axis: Axis) -> None:
    """Raises UserError on every rank, naming the first key and the rank that differ.

    The majority is taken to be right; values must be JSON.
    """
    if odd := _odd_one_out(settings, axis):
        rank, key, value, usual = odd
        raise UserError(
            f"rank {rank} was started with {key}={value}, the others with {usual}; start every "
            "rank with the same settings"
        )


def check_shapes_agree(tensors: Mapping[str, Tensor], axis: Axis) -> None:
    """Raises UserError on every rank if names, shapes or dtypes are not the same on all."""
    if odd := _odd_one_out({name: kind(tensor) for name, tensor in tensors.items()}, axis):
        rank, name, value, usual = odd
        raise UserError(
            f"rank {rank} has {name} as {value}, the others as {usual}; build the same model on "
            "every rank"
        )


def _odd_one_out(mine: Mapping[str, object], axis: Axis) -> tuple[int, str, str, str] | None:
    """(rank, key, its value, the usual value) of the first key that differs; null if missing."""
    rows = [json.loads(b) for b in ops.all_gather_bytes(json.dumps(mine).encode(), axis)]
    for key in {key: None for row in rows for key in row}:
        values = [json.dumps(row.get(key)) for row in rows]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in zip(axis.ranks, values, strict=True):
            if value != usual:
                return rank, key, value, usual
    return None


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """Raise an error of one rank on all ranks, with the same message, so that none hangs.

    For work that may fail on one rank alone, such as reading a file. Collective.
    """
    problem: UserError | MachineError | None = None
    try:
        yield
    except (UserError, MachineError) as error:
        problem = error
    mine = [] if problem is None else [isinstance(problem, UserError), str(problem)]
    for refusal in map(json.loads, ops.all_gather_bytes(json.dumps(mine).encode(), axis)):
        if refusal:
            raise (UserError if refusal[0] else MachineError)(refusal[1]) from problem


def check_tensors_agree(tensors: Mapping[str, Tensor], axis: Axis) -> None:
    """Raises UserError on every rank if a tensor is not the same to the bit on all of them."""
    if axis.size == 1 or not tensors:
        return
    marks = [fingerprint(tensor) for tensor in tensors.values()]
    mine = torch.tensor(marks, device=axis.device)
    rows = ops.all_gather(mine[None], axis)  # (size, tensors)
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
    """A 63-bit digest of a tensor's bytes."""
    digest = hashlib.blake2b(digest_size=8)
    tensor = tensor.detach()
    for piece in [tensor] if tensor.layout is torch.strided else pieces(tensor):
        plain = piece.resolve_conj().resolve_neg().cpu().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1
