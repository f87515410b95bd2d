"""What is examined: a function or a module of somebody else's, as fresh models of one seed."""

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

Given = nn.Module | Callable[[], Any]
RETURNS = "return a module, (module, batch) or (module, batch, loss_sum)"


@dataclass(frozen=True)
class Subject:
    """Attributes:
    build: gives a fresh model at each call, on the CPU.
    batch: (inputs, targets), all rows of one step; None: it is not known.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Pair | None
    loss_sum: LossFn


def subject_of(given: Given, batch: Pair | None, loss_sum: LossFn | None, usual: LossFn) -> Subject:
    """Build once, to see what there is. What is given here wins over what the function returns.

    Raises:
        UserError: it is no module, returns none, raises, or cannot be copied.
    """
    if isinstance(given, nn.Module):
        build = _copies_of(given)
        build()
        return Subject(type(given).__name__, build, batch, loss_sum or usual)
    if not callable(given):
        raise UserError(f"doctor takes a module, or a function that builds one, not {given!r:.60}")
    name = getattr(given, "__name__", type(given).__name__)
    _, own_batch, own_loss = _called(name, given)
    chosen = loss_sum or own_loss or usual
    return Subject(name, lambda: _called(name, given)[0], batch or own_batch, chosen)


def load(spec: str) -> Callable[[], Any]:
    """The function that `module:function` names. Raises UserError if there is none."""
    module, _, name = spec.partition(":")
    fix_torchvision()  # the module may well import it
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UserError(
            f"importing {module} raised {in_a_line(error)}; --debug shows where"
        ) from error
    if isinstance(function, nn.Module):
        raise UserError(f"{spec} is a module that has been built; name a function that builds it")
    if not callable(function):
        raise UserError(f"module {module!r} has no function {name!r}; define it there")
    return function


def in_a_line(error: Exception) -> str:
    """The kind of an error of somebody else's, and what it says, cut to a line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def seeded() -> Iterator[None]:
    """Every global generator of random numbers stands at 0, and afterwards where it stood."""
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
                f"{type(model).__name__} cannot be copied ({in_a_line(error)}); give a function "
                "that builds it"
            ) from error

    return build


def _called(name: str, function: Callable[[], Any]) -> tuple[nn.Module, Pair | None, LossFn | None]:
    """(module, batch, loss_sum), the last two None where the function does not return them."""
    try:
        with seeded():
            made = function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}() raised {in_a_line(error)}; --debug shows where") from error
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UserError(f"{name}() returned {kinds or 'nothing'}; {RETURNS}")
    model, batch, loss_sum = parts[0], *(*parts[1:], None, None)[:2]
    if batch is not None and not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise UserError(
            f"{name}() returned a {type(batch).__name__} beside the module; a batch is (inputs, "
            "targets)"
        )
    if loss_sum is not None and not callable(loss_sum):
        raise UserError(f"{name}() returned a {type(loss_sum).__name__} as loss_sum; {RETURNS}")
    return model, None if batch is None else (batch[0], batch[1]), loss_sum
