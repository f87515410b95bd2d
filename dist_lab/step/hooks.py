"""Hooks that a copy of the module drops, and helpers for tensors in nested structures.

`job.model` stays an ordinary module. A deep copy or a pickle of it is the plain model, without the
strategy that trains the original.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NoReturn

from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.torch_private import not_compiled


class StaysBehind:
    """An object in a module. A copy or a pickle of the module has `in_a_copy` instead."""

    in_a_copy: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.in_a_copy, memo)  # binds a method to the copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return identity, (self.in_a_copy,)


class ModuleHook(StaysBehind):
    """A forward hook, or a replaced `forward`. In a copy it does nothing by default."""

    def __init__(self, function: Callable[..., Any], in_a_copy: Callable[..., Any] | None = None):
        self.function, self.in_a_copy = function, in_a_copy or do_nothing

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces a hook in a copy."""


def refuse_copy(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Replaces the hook or `forward` in a copy of a module of class `kind` that holds a shard."""
    raise UserError(
        f"a copy of a sharded model holds only this rank's shard of {kind} and cannot compute; "
        "load job.full_state_dict() into a fresh model"
    )


def identity(thing: Any) -> Any:
    """Unpickles a `StaysBehind`: returns the `in_a_copy` that was pickled in its place."""
    return thing


def weak_hook(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """A hook for a parameter or its autograd node that does not keep the hook's owner alive.

    Autograd holds hooks where the garbage collector cannot see them. A hook that held its owner,
    which holds the model, would keep all of them alive for ever.
    """
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*first, *arguments)

    return hook


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in a module's output: in lists, tuples, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif isinstance(output, Mapping):
        yield from tensors_in([*output.values()])
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from tensors_in([getattr(output, f.name) for f in dataclasses.fields(output)])


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Returns the same structure with `function` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, tuple):
        make = getattr(value, "_make", type(value))  # namedtuples have _make
        return make([map_tensors(function, item) for item in value])
    if isinstance(value, Mapping):
        result: Any = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key, item in value.items():
            result[key] = map_tensors(function, item)
        return result
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(function, getattr(value, field.name))
            object.__setattr__(result, field.name, item)  # also if the dataclass is frozen
        return result
    return value
