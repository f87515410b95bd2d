"""The arguments of an operation of torch: tensors in lists, tuples and dictionaries."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PLAIN = (
    int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def leaves(value: Any, kind: Any) -> Iterator[Any]:
    """Yields all objects of this type, or of these types, in lists and tuples."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, kind)


def mapped(value: Any, kind: Any, function: Any) -> Any:
    """Returns a copy in which function(x) replaces each object x of this type or these types."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, kind, function) for item in value)
    if isinstance(value, dict):
        return {name: mapped(item, kind, function) for name, item in value.items()}
    return value


def key_of_sizes(value: Any) -> Any:
    """A key that is equal for arguments that give results of one size; None if there is none."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else value
        keys = tuple(key_of_sizes(item) for item in items)
        return None if None in keys else keys
    return (type(value), value) if isinstance(value, PLAIN) else None
