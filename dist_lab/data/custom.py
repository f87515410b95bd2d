"""Data of your own: `--data module:function`, found by name and judged before the first step.

    def function(*, batch: int, seq: int, seed: int) -> dist_lab.data.Data: ...

What it returns is text, unless its `image` is the shape of one; `seq` then means nothing to it. The
module is found as `python -m` would find it, the current folder first. What the function returns is
asked for its first batch at once: here a wrong shape has a name, while in the first step it would
be a traceback out of the model from every rank.
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

    from dist_lab.data import Data

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # a file a:b is given as ./a:b

ATTRIBUTES = {"name": str, "vocab": int, "sha256": str, "validation_batches": int}
METHODS = ("batch", "validation")


def is_custom(spec: str) -> bool:
    """Whether `spec` has the form module:function.

    >>> [is_custom(spec) for spec in ("words:small", "my.words:small", "./a:b", "stdlib")]
    [True, True, False, False]
    """
    return NAME.fullmatch(spec) is not None


def locate(spec: str) -> tuple[str, str]:
    """The module's name and the function's; UserError when there is no such module.

    Only the outermost package is looked for, since looking further would run its code. The current
    folder stays on the path: the function may import its neighbors whenever it runs.
    """
    module, _, function = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with blaming(spec, f"looking for {module}"):
        found = importlib.util.find_spec(module.partition(".")[0])
    if found is None:
        raise UserError(
            f"--data {spec!r}: no module {module!r} in {os.getcwd()!r} nor among the installed "
            f"ones; run in the folder it lies in, or write ./{spec} if it is a path"
        )
    return module, function


def open_custom(spec: str, *, batch: int, seq: int, seed: int) -> Data:
    """Call the function, and raise UserError unless it returns a Data with a right first batch."""
    module, name = locate(spec)
    fix_torchvision()  # the module may well import it
    with blaming(spec, f"importing {module}"):
        function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise UserError(
            f"--data {spec!r}: module {module!r} has no function {name!r}; define it there"
        )
    with blaming(spec, f"{name}(batch={batch}, seq={seq}, seed={seed})"):
        data: Data = function(batch=batch, seq=seq, seed=seed)
    lacking = [
        f"{attribute}: {kind.__name__}"
        for attribute, kind in ATTRIBUTES.items()
        if not isinstance(getattr(data, attribute, None), kind)
    ]
    lacking += [f"{method}()" for method in METHODS if not callable(getattr(data, method, None))]
    if lacking:
        raise UserError(
            f"--data {spec!r}: {name}() returned a {type(data).__name__} that lacks "
            f"{', '.join(lacking)}; see the protocol dist_lab.data.Data"
        )
    image = getattr(data, "image", None)
    if image is not None and not is_shape(image):
        raise UserError(
            f"--data {spec!r}: {name}() returned a {type(data).__name__} whose image is "
            f"{image!r:.60}; make it (channels, height, width), three ints, or None for text"
        )
    sample = image or seq
    for method in METHODS if data.validation_batches > 0 else METHODS[:1]:
        whole, first = (fetch(spec, data, method, rows, sample) for rows in (batch, 1))
        if any((a[:1] != b).any() for a, b in zip(whole, first, strict=True)):
            raise UserError(
                f"--data {spec!r}: the first row of {method}(0, slice(0, {batch})) is not that of "
                f"{method}(0, slice(0, 1)); let nothing but the step and the row decide it"
            )
    from dist_lab.data.cast import Cast  # here and not above, because it imports torch

    return Cast(data, image=image)


def fetch(
    spec: str, data: Data, method: str, rows: int, sample: tuple[int, int, int] | int
) -> tuple[Tensor, Tensor]:
    """Rows 0 .. rows - 1 of the first batch; UserError unless they are what Data promises."""
    call = f"{method}(0, slice(0, {rows}))"
    with blaming(spec, call):
        pair: tuple[Tensor, Tensor] = getattr(data, method)(0, slice(0, rows))
    wrong = fault(pair, rows, sample, data.vocab)
    if wrong is not None:
        raise UserError(
            f"--data {spec!r}: {call} returned {wrong}; see the protocol dist_lab.data.Data"
        )
    return pair


def is_shape(image: object) -> bool:
    return (
        isinstance(image, tuple)
        and len(image) == 3
        and all(type(side) is int and side > 0 for side in image)
    )


def fault(pair: object, rows: int, sample: tuple[int, int, int] | int, vocab: int) -> str | None:
    """What keeps `pair` from being inputs and targets of so many rows, or None.

    `sample` is the shape of an image, or the length of a sequence of text.
    """
    import torch  # here and not above: the launcher calls locate(), and is free of torch

    if not isinstance(pair, tuple) or [isinstance(x, torch.Tensor) for x in pair] != [True, True]:
        return f"a {type(pair).__name__} that is not (inputs, targets), two tensors"
    tokens = isinstance(sample, int)
    of_one = (sample,) if isinstance(sample, int) else sample
    wanted = {
        "inputs": ((rows, *of_one), torch.int64 if tokens else torch.float32),
        "targets": ((rows, *of_one) if tokens else (rows,), torch.int64),
    }
    for (role, (shape, dtype)), tensor in zip(wanted.items(), pair, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype:
            return f"{role} {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of {dtype}"
        if dtype == torch.float32 and not tensor.isfinite().all():
            return f"{role} that are not finite"
        if dtype == torch.int64 and (tensor.min() < 0 or tensor.max() >= vocab):
            return f"{role} from {tensor.min()} to {tensor.max()}, although vocab is {vocab}"
    return None


@contextmanager
def blaming(spec: str, call: str) -> Iterator[None]:
    """What somebody else's code raises within is a UserError that says where, in one line."""
    try:
        yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--data {spec!r}: {call} raised {said}; --debug shows where") from error
