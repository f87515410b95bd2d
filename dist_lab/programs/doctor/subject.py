"""The model under examination: a user's function or module, built anew with the same seed."""

import copy
import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair
from dist_lab.torchvision_import import fix_torchvision

ModelSource = nn.Module | Callable[[], Any]
RETURNS = "return a module, (module, batch) or (module, batch, loss_sum)"


@dataclass(frozen=True)
class Subject:
    """The model under examination, with its batch and loss.

    Attributes:
        build: returns a fresh model on the CPU at each call.
        batch: (inputs, targets), all rows of one step; None if no batch was given.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Pair | None
    loss_sum: LossFn


def subject_of(
    source: ModelSource, batch: Pair | None, loss_sum: LossFn | None, default_loss: LossFn
) -> Subject:
    """Builds once to check. `batch` and `loss_sum` win over those that the function returns.

    Raises:
        UserError: the source is not a module or function, the module cannot be copied, or the
            function raises or does not return a module.
    """
    if isinstance(source, nn.Module):
        build = _copies_of(source)
        build()
        return Subject(type(source).__name__, build, batch, loss_sum or default_loss)
    if not callable(source):
        raise UserError(f"doctor takes a module, or a function that builds one, not {source!r:.60}")
    name = getattr(source, "__name__", type(source).__name__)
    _, built_batch, built_loss = _call(name, source)
    chosen = loss_sum or built_loss or default_loss
    return Subject(name, lambda: _call(name, source)[0], batch or built_batch, chosen)


def load(spec: str) -> Callable[[], Any]:
    """Imports the function named by `module:function`. Raises UserError if there is none."""
    module, _, name = spec.partition(":")
    fix_torchvision()  # in case the module imports torchvision
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UserError(
            f"importing {module} raised {one_line(error)}; add --debug to see where"
        ) from error
    if isinstance(function, nn.Module):
        raise UserError(f"{spec} is a built module; name a function that builds it")
    if not callable(function):
        raise UserError(f"module {module!r} has no function {name!r}; define it there")
    return function


def one_line(error: Exception) -> str:
    """The type and message of an error in one line, at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def seeded() -> Iterator[None]:
    """Seeds every global random number generator with 0, and restores its state afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _copies_of(model: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        try:
            return copy.deepcopy(model)
        except Exception as error:
            raise UserError(
                f"{type(model).__name__} cannot be copied ({one_line(error)}); give a function "
                "that builds it"
            ) from error

    return build


def _call(name: str, function: Callable[[], Any]) -> tuple[nn.Module, Pair | None, LossFn | None]:
    """Calls the user's function: (module, batch, loss_sum), None for what it does not return."""
    try:
        with seeded():
            returned = function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}() raised {one_line(error)}; add --debug to see where") from error
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UserError(f"{name}() returned {kinds or 'nothing'}; {RETURNS}")
    model, batch, loss_sum = parts[0], *(*parts[1:], None, None)[:2]
    if batch is not None and not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise UserError(
            f"{name}() returned a {type(batch).__name__} as batch; return (inputs, targets)"
        )
    if loss_sum is not None and not callable(loss_sum):
        raise UserError(f"{name}() returned a {type(loss_sum).__name__} as loss_sum; {RETURNS}")
    return model, None if batch is None else (batch[0], batch[1]), loss_sum
