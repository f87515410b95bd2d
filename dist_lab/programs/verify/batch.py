"""The global batch of a step: check it, split it by rows, join it, compare it across ranks.

Inputs and targets are tensors, or dicts, tuples, lists and dataclasses of tensors, nested freely.
Dim 0 of every tensor is the rows. In dim 0 of a target each row may have several entries, one after
the other. Any other value in a structure (a flag, a name, None) goes to every rank unchanged.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.agree import fingerprint
from dist_lab.errors import UserError
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Mesh
from dist_lab.step.hooks import map_tensors, tensors_in

PLAIN = (bool, int, float, str, type(None))  # values that every row shares


def checked_batch(build_batch: Callable[[int], Pair], step: int, device: torch.device) -> Pair:
    """The batch of a step, on the device. Raises UserError if it cannot be split by rows."""
    batch = build_batch(step)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UserError(f"build_batch(step) must return (inputs, targets), not {batch!r:.60}")
    rows = 0
    for part, value in zip(("inputs", "targets"), batch, strict=True):
        leaves = list(_named_leaves(value, part))
        tensors = {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor)}
        for name, leaf in leaves:
            if name not in tensors and not isinstance(leaf, PLAIN):
                raise UserError(
                    f"{name} of the batch is of type {type(leaf).__name__}; build the batch of "
                    "tensors, in dicts, tuples, lists or dataclasses"
                )
        if not tensors:
            raise UserError(
                f"the {part} of the batch hold no tensor; give at least one, with the rows in dim 0"
            )
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
                raise UserError(
                    f"{name} of the batch is not a dense tensor and cannot be split by rows; make "
                    "it dense"
                )
            length = tensor.shape[0] if tensor.dim() else 0
            rows = rows or length
            if not length or (length != rows if part == "inputs" else length % rows):
                raise UserError(
                    f"{name} of the batch has shape {tuple(tensor.shape)}, but the batch has "
                    f"{rows} rows; put the rows in dim 0 of every tensor, and move tensors without "
                    "rows into the model"
                )
    return map_tensors(lambda t: t.to(device), batch[0]), map_tensors(
        lambda t: t.to(device), batch[1]
    )


def copy(batch: Pair) -> Pair:
    """Returns a copy, because a forward may change its inputs in place."""
    inputs, targets = batch
    return map_tensors(torch.clone, inputs), map_tensors(torch.clone, targets)


def rows_in(inputs: Any) -> int:
    return len(next(tensors_in(inputs)))


def count(targets: Any) -> int:
    """The number of targets: the elements of the first tensor. The summed loss is divided by it."""
    return next(tensors_in(targets)).numel()


def slice_rows(batch: Pair, slices: int) -> list[Pair]:
    """Splits a batch into consecutive slices whose numbers of rows differ by at most one."""
    rows = rows_in(batch[0])
    sizes = [rows // slices + (i < rows % slices) for i in range(slices)]

    def slicer(i: int) -> Callable[[Tensor], Tensor]:
        def take_slice(tensor: Tensor) -> Tensor:
            entries = len(tensor) // rows if rows else 1  # entries per row
            return tensor.split([entries * size for size in sizes])[i]

        return take_slice

    return [tuple(map_tensors(slicer(i), value) for value in batch) for i in range(slices)]


def join(batches: list[Pair]) -> Pair:
    """Concatenates the rows of several batches into one batch."""
    joined = iter([torch.cat(each) for each in zip(*map(tensors_in, batches), strict=True)])
    inputs, targets = map_tensors(lambda _: next(joined), batches[0])
    return inputs, targets


def all_rows_equal(inputs: Any) -> bool:
    return rows_in(inputs) > 1 and all(bool((t == t[:1]).all()) for t in tensors_in(inputs))


def first_difference(batch: Pair, other: Pair) -> str:
    """The name of the first value that is not bitwise equal in both batches; "" if none."""
    return _first_mismatch(_fingerprints(batch), _fingerprints(other))


def check_ranks_agree(batch: Pair, step: int, mesh: Mesh) -> None:
    """Raises UserError on every rank unless all ranks have the same batch. Collective."""
    gathered = ops.all_gather_bytes(json.dumps(_fingerprints(batch)).encode(), mesh.world)
    fingerprints = [json.loads(data) for data in gathered]
    for rank, theirs in enumerate(fingerprints):
        if name := _first_mismatch(fingerprints[0], theirs):
            raise UserError(
                f"rank {rank} has a different batch than rank 0 at step {step}, first in {name}; "
                "build_batch(step) must return the whole global batch on every rank: seed it by "
                "the step, not by the rank"
            )


def _fingerprints(batch: Pair) -> dict[str, str]:
    return {
        name: f"{leaf.dtype} {[*leaf.shape]} {fingerprint(leaf.resolve_conj().resolve_neg())}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for part, value in zip(("inputs", "targets"), batch, strict=True)
        for name, leaf in _named_leaves(value, part)
    }


def _first_mismatch(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    names = dict.fromkeys([*ours, *theirs])
    return next((name for name in names if ours.get(name) != theirs.get(name)), "")


def _named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields each leaf of a structure with its Python expression, such as inputs['x'][0]."""
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _named_leaves(item, f"{name}[{i}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_leaves(item, f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _named_leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value
