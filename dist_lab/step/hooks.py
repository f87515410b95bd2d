"""What training puts into a module and a copy of the module leaves behind; tensors in structures.

`job.model` stays an ordinary module: copied for an average of its weights, or pickled, it is the
plain model, without the strategy that trains the original.
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
    """Stands somewhere in a module. In a deep copy or a pickle `in_a_copy` takes its place."""

    in_a_copy: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.in_a_copy, memo)  # a bound method's copy is bound to the copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return itself, (self.in_a_copy,)


class ModuleHook(StaysBehind):
    """A forward hook, or a `forward`. By default a copy has a hook that does nothing."""

    def __init__(self, function: Callable[..., Any], in_a_copy: Callable[..., Any] | None = None):
        self.function, self.in_a_copy = function, in_a_copy or nothing

    @not_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def nothing(*args: Any, **kwargs: Any) -> None:
    """The hook of a copy."""


def refuse_copy(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    """The hook or `forward` in a copy of a module of this class, which holds a shard."""
    raise UserError(
        f"a copy of a model that is split holds this rank's part of {kind}; load "
        "job.full_state_dict() into a fresh model"
    )


def itself(thing: Any) -> Any:
    """By which a pickle is read back that holds what a copy has."""
    return thing


def weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """A hook for a parameter or its autograd node, which does not keep the hook's owner alive.

    They hold hooks where the garbage collector cannot see it. A hook that held its owner, which
    holds the model, would keep all of them for ever.
    """
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*first, *arguments)

    return hook


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, whatever it is made of."""
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
    """A structure of the same make, with `function` of each tensor in place of the tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, tuple):
        make = getattr(value, "_make", type(value))  # the way of a namedtuple, or a tuple's
        return make([map_tensors(function, item) for item in value])
    if isinstance(value, Mapping):
        made: Any = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key, item in value.items():
            made[key] = map_tensors(function, item)
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):  # one may be frozen
            item = map_tensors(function, getattr(value, field.name))
            object.__setattr__(made, field.name, item)
        return made
    return value
