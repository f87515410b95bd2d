"""The global batch of a step: checked, cut by rows, put together, and the same on every rank.

Inputs and targets are tensors, or dicts, tuples, lists and dataclasses of tensors, nested at will.
The rows come first in each tensor. Targets may have several entries for each row, flattened. What
else stands in a structure (a flag, a name, None) goes to every rank as it is.
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

PLAIN = (bool, int, float, str, type(None))  # the same for every row


def take(build_batch: Callable[[int], Pair], step: int, device: torch.device) -> Pair:
    """The batch of a step, on the device. Raises UserError for what cannot be cut by rows."""
    batch = build_batch(step)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UserError(f"build_batch(step) gives a pair (inputs, targets), not {batch!r:.60}")
    rows = 0
    for part, value in zip(("inputs", "targets"), batch, strict=True):
        tensors = {name: leaf for name, leaf in _leaves(value, part) if isinstance(leaf, Tensor)}
        for name, leaf in _leaves(value, part):
            if name not in tensors and not isinstance(leaf, PLAIN):
                raise UserError(
                    f"{name} of the batch is a {type(leaf).__name__}; a batch is made of tensors, "
                    "in dicts, tuples, lists and dataclasses"
                )
        if not tensors:
            raise UserError(f"the {part} of the batch hold no tensor; give one with a row for each")
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
                raise UserError(f"{name} of the batch is no dense tensor, and rows are cut from it")
            length = tensor.shape[0] if tensor.dim() else 0
            rows = rows or length
            if not length or (length != rows if part == "inputs" else length % rows):
                raise UserError(
                    f"{name} of the batch has shape {tuple(tensor.shape)} beside {rows} rows; rows "
                    "come first in each tensor, and what is of no row belongs into the model"
                )
    return map_tensors(lambda t: t.to(device), batch[0]), map_tensors(
        lambda t: t.to(device), batch[1]
    )


def copy(batch: Pair) -> Pair:
    """For a forward that may change its inputs in place."""
    inputs, targets = batch
    return map_tensors(torch.clone, inputs), map_tensors(torch.clone, targets)


def rows_in(inputs: Any) -> int:
    return len(next(tensors_in(inputs)))


def count(targets: Any) -> int:
    """What the sum of the losses is divided by: the elements of the first tensor."""
    return next(tensors_in(targets)).numel()


def slice_rows(batch: Pair, parts: int) -> list[Pair]:
    """A batch in consecutive parts that differ by a row at most."""
    rows = rows_in(batch[0])
    sizes = [rows // parts + (i < rows % parts) for i in range(parts)]

    def part(i: int) -> Callable[[Tensor], Tensor]:
        def cut(tensor: Tensor) -> Tensor:
            entries = len(tensor) // rows if rows else 1  # of each row
            return tensor.split([entries * size for size in sizes])[i]

        return cut

    return [tuple(map_tensors(part(i), value) for value in batch) for i in range(parts)]


def join(batches: list[Pair]) -> Pair:
    """The rows of all, as one batch."""
    joined = iter([torch.cat(each) for each in zip(*map(tensors_in, batches), strict=True)])
    inputs, targets = map_tensors(lambda _: next(joined), batches[0])
    return inputs, targets


def rows_are_alike(inputs: Any) -> bool:
    return rows_in(inputs) > 1 and all(bool((t == t[:1]).all()) for t in tensors_in(inputs))


def first_difference(batch: Pair, other: Pair) -> str:
    """The name of what is not the same in both, to the bit; "" if all is."""
    return _odd(_marks(batch), _marks(other))


def check_ranks_agree(batch: Pair, step: int, mesh: Mesh) -> None:
    """Raises UserError on every rank unless all have the same batch. Collective."""
    everyone = ops.all_gather_bytes(json.dumps(_marks(batch)).encode(), mesh.world)
    marks = [json.loads(data) for data in everyone]
    for rank, theirs in enumerate(marks):
        if name := _odd(marks[0], theirs):
            raise UserError(
                f"rank {rank} has another batch than rank 0 at step {step}, first {name}; "
                "build_batch(step) gives every rank the whole global batch: draw it by the step, "
                "and not by the rank"
            )


def _marks(batch: Pair) -> dict[str, str]:
    return {
        name: f"{leaf.dtype} {[*leaf.shape]} {fingerprint(leaf.resolve_conj().resolve_neg())}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for part, value in zip(("inputs", "targets"), batch, strict=True)
        for name, leaf in _leaves(value, part)
    }


def _odd(marks: Mapping[str, str], others: Mapping[str, str]) -> str:
    names = dict.fromkeys([*marks, *others])
    return next((name for name in names if marks.get(name) != others.get(name)), "")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a structure holds, each with the expression that a user would write for it."""
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value
