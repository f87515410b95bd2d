"""Data of your own: `--data module:function`, found by name and judged before the first step.

    def function(*, batch: int, seq: int, seed: int) -> dist_lab.data.Data: ...

What it returns is text, unless its `image` is the shape of one; `seq` then means nothing to it. The
module is found as `python -m` would find it, the current folder first. What the function returns is
asked for its first batch at once: a wrong shape is named in one line, while in the first step it
would be a traceback out of the model from every rank.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dist_lab.errors import UserError
from dist_lab.torchvision_import import fix_torchvision

if TYPE_CHECKING:
    from torch import Tensor

    from dist_lab.data import Data, Shape

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # a file a:b is given as ./a:b

ATTRIBUTES = {"name": str, "vocab": int, "sha256": str, "validation_batches": int}
METHODS = ("batch", "validation")
SEE = "see the protocol dist_lab.data.Data"


def is_custom(spec: str) -> bool:
    """Whether `spec` has the form module:function.

    >>> [is_custom(spec) for spec in ("words:small", "my.words:small", "./a:b", "stdlib")]
    [True, True, False, False]
    """
    return NAME.fullmatch(spec) is not None


def locate(spec: str) -> None:
    """Raise UserError unless the module, or the package it lies in, is there; none of it is run."""
    module = spec.partition(":")[0]
    with calling(spec, f"looking for {module}"):
        there = importlib.util.find_spec(module.partition(".")[0])
    if there is None:
        missing = f"no module {module!r} in {os.getcwd()!r} nor among the installed ones"
        fix = f"run in the folder it lies in, or write ./{spec} if it is a path"
        raise refusal(spec, f"{missing}; {fix}")


def open_custom(spec: str, *, batch: int, seq: int, seed: int) -> Custom:
    """Call the function, and raise UserError unless it returns a Data with a right first batch."""
    module, _, name = spec.partition(":")
    fix_torchvision()  # the module may well import it
    with calling(spec, f"importing {module}"):
        function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise refusal(spec, f"module {module!r} has no function {name!r}; define it there")
    with calling(spec, f"{name}(batch={batch}, seq={seq}, seed={seed})"):
        data: Data = function(batch=batch, seq=seq, seed=seed)
    returned = f"{name}() returned a {type(data).__name__}"
    lacking = [
        f"{attribute}: {kind.__name__}"
        for attribute, kind in ATTRIBUTES.items()
        if not isinstance(getattr(data, attribute, None), kind)
    ]
    lacking += [f"{method}()" for method in METHODS if not callable(getattr(data, method, None))]
    if lacking:
        raise refusal(spec, f"{returned} that lacks {', '.join(lacking)}; {SEE}")
    custom = Custom(data)
    image = custom.image
    sides = image if isinstance(image, tuple) else ()
    if image is not None and [type(side) is int and side > 0 for side in sides] != [True] * 3:
        shape = "make it (channels, height, width), three ints, or None for text"
        raise refusal(spec, f"{returned} whose image is {image!r:.60}; {shape}")
    for method in METHODS if data.validation_batches > 0 else METHODS[:1]:
        whole, first = (first_rows(spec, custom, method, n, image or (seq,)) for n in (batch, 1))
        if any((a[:1] != b).any() for a, b in zip(whole, first, strict=True)):
            rows = f"{method}(0, slice(0, {batch})) is not that of {method}(0, slice(0, 1))"
            raise refusal(
                spec, f"the first row of {rows}; let nothing but the step and the row decide it"
            )
    return custom


class Custom:
    """Data of your own, with an `image` if it has none, and its folder importable as it runs."""

    def __init__(self, data: Data) -> None:
        self.name, self.vocab, self.sha256 = data.name, data.vocab, data.sha256
        self.validation_batches = data.validation_batches
        self.image: Shape | None = getattr(data, "image", None)
        self._data, self._folder = data, os.getcwd()

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        with importable_from(self._folder):
            return self._data.batch(step, rows)

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        with importable_from(self._folder):
            return self._data.validation(index, rows)


def first_rows(
    spec: str, data: Data, method: str, rows: int, sample: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Rows 0 .. rows - 1 of the first batch; UserError unless they are what Data promises."""
    call = f"{method}(0, slice(0, {rows}))"
    with calling(spec, call):
        pair: tuple[Tensor, Tensor] = getattr(data, method)(0, slice(0, rows))
    if wrong := fault(pair, rows, sample, data.vocab):
        raise refusal(spec, f"{call} returned {wrong}; {SEE}")
    return pair


def fault(pair: object, rows: int, sample: tuple[int, ...], vocab: int) -> str | None:
    """Why `pair` is not inputs and targets of so many rows, or None.

    `sample` is the shape of an image, or (length,) of a sequence of text.
    """
    import torch  # not at the top: the launcher calls locate(), and is free of torch

    if not isinstance(pair, tuple) or [isinstance(x, torch.Tensor) for x in pair] != [True, True]:
        return f"a {type(pair).__name__} that is not (inputs, targets), two tensors"
    text = len(sample) == 1
    wanted = {
        "inputs": ((rows, *sample), torch.int64 if text else torch.float32),
        "targets": ((rows, *sample) if text else (rows,), torch.int64),
    }
    for (role, (shape, dtype)), tensor in zip(wanted.items(), pair, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype:
            return f"{role} {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of {dtype}"
        if dtype == torch.float32 and not tensor.isfinite().all():
            return f"{role} that are not finite"
        if dtype == torch.int64 and (tensor.min() < 0 or tensor.max() >= vocab):
            return f"{role} from {tensor.min()} to {tensor.max()}, although vocab is {vocab}"
    return None


# Running somebody else's code.


@contextmanager
def calling(spec: str, call: str) -> Iterator[None]:
    """Run somebody else's code: what it raises is a UserError that says where, in one line."""
    try:
        with importable_from(os.getcwd()):
            yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise refusal(spec, f"{call} raised {said}; --debug shows where") from error


@contextmanager
def importable_from(folder: str) -> Iterator[None]:
    """Put a folder first on sys.path, and take it off again.

    Threads may overlap in here (prefetch.py): each puts in an entry of its own, and takes out one.
    """
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def refusal(spec: str, what: str) -> UserError:
    return UserError(f"data={spec!r}: {what}")
