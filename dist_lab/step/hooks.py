"""Hooks on a module that a copy of the module leaves behind, and the tensors that they see.

`job.model` stays an ordinary module: copied for an average of its weights, or pickled, it is the
plain model, without the strategy that trains the original.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def nothing(*args: Any, **kwargs: Any) -> None:
    """The hook of a copy."""


class ModuleHook:
    """A forward hook. In a deep copy or a pickle `of_copy` takes its place, which does nothing."""

    def __init__(
        self, function: Callable[..., Any], of_copy: Callable[..., None] = nothing
    ) -> None:
        self.function, self.of_copy = function, of_copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return self.of_copy

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., None]]]:
        return leave_behind, (self.of_copy,)


class Replaced:
    """What stands for the `forward` of a module in training. A copy of the module, or what a pickle
    holds, has the forward of before.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.forward, memo)  # a bound method's copy is bound to the copy

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return itself, (self.forward,)


def itself(thing: Any) -> Any:
    """What a pickle rebuilds by, where it holds what was there before."""
    return thing


def leave_behind(of_copy: Callable[..., None]) -> Callable[..., None]:
    """What a pickled hook is rebuilt by."""
    return of_copy


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, whatever it is made of."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))
