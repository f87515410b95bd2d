"""Your own data: `--data module:function`, imported by name and checked before the first step.

    def function(*, batch: int, seq: int, seed: int) -> dist_lab.data.Data: ...

It may also return a map-style Dataset, or two of them: see dataset.py. The data is text, unless its
`image` is the shape of an image; then `seq` is unused. The module is found as by `python -m`, in
the current folder first. The first batch is loaded and checked at once: a wrong shape is reported
in one line, where the first step would fail with a traceback from the model on every rank.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_lab.data.user_code import calling, importable_from, refusal
from dist_lab.torchvision_import import fix_torchvision

if TYPE_CHECKING:
    from torch import Tensor

    from dist_lab.data import Data, Shape
    from dist_lab.data.order import Ids

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # type ./a:b for a file a:b

ATTRIBUTES = {"name": str, "vocab": int, "sha256": str, "validation_batches": int}
METHODS = ("batch", "validation")
SEE = "see the protocol dist_lab.data.Data, or return a map-style Dataset"


def is_custom(spec: str) -> bool:
    """Whether `spec` is of the form module:function.

    >>> [is_custom(spec) for spec in ("words:small", "my.words:small", "./a:b", "stdlib")]
    [True, True, False, False]
    """
    return NAME.fullmatch(spec) is not None


def locate(spec: str) -> None:
    """Raise UserError unless the module's top-level package exists. Imports nothing."""
    module = spec.partition(":")[0]
    with calling(spec, f"looking for {module}"):
        top_level = importlib.util.find_spec(module.partition(".")[0])
    if top_level is None:
        missing = f"no module {module!r} in {os.getcwd()!r} or among the installed ones"
        fix = f"run in the folder of the module, or write ./{spec} if it is a path"
        raise refusal(spec, f"{missing}; {fix}")


def open_custom(spec: str, *, batch: int, seq: int, seed: int, validation_batches: int) -> Custom:
    """Call the function. Raises UserError unless it returns a Data whose first batch is right."""
    module, _, name = spec.partition(":")
    fix_torchvision()  # the module may import torchvision
    with calling(spec, f"importing {module}"):
        function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise refusal(spec, f"module {module!r} has no function {name!r}; define it there")
    with calling(spec, f"{name}(batch={batch}, seq={seq}, seed={seed})"):
        data: Data = function(batch=batch, seq=seq, seed=seed)
    if datasets := map_style(data):
        from dist_lab.data.dataset import FromDataset  # imports torch

        order = {"batch": batch, "seed": seed, "validation_batches": validation_batches}
        return Custom(FromDataset(spec, *datasets, seq=seq, **order))
    returned = f"{name}() returned a {type(data).__name__}"
    missing = [
        f"{attribute}: {kind.__name__}"
        for attribute, kind in ATTRIBUTES.items()
        if not isinstance(getattr(data, attribute, None), kind)
    ]
    missing += [f"{method}()" for method in METHODS if not callable(getattr(data, method, None))]
    if missing:
        raise refusal(spec, f"{returned} without {', '.join(missing)}; {SEE}")
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
                spec, f"the first row of {rows}; a row may depend only on the step and its index"
            )
    if custom.sample_ids is not None:
        check_ids(spec, custom.sample_ids, batch)
    return custom


def map_style(returned: Any) -> tuple[Any, ...]:
    """The Dataset, or the two, that a function has returned; () if it is a Data or anything else.

    >>> map_style([0]), map_style(([0], [1])), map_style(None)
    (([0],), ([0], [1]), ())
    """
    sets = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned,)
    are_sets = all(
        callable(getattr(type(one), "__len__", None))
        and callable(getattr(type(one), "__getitem__", None))
        and getattr(one, "validation_batches", None) is None
        for one in sets
    )
    return sets if are_sets else ()


class Custom:
    """Your own data, with None for `image`, `samples` or `sample_ids` if it has none.

    While its methods run, the folder that was current at the start can be imported from.
    """

    def __init__(self, data: Data) -> None:
        self.name, self.vocab, self.sha256 = data.name, data.vocab, data.sha256
        self.validation_batches = data.validation_batches
        self.image: Shape | None = getattr(data, "image", None)
        self.samples: int | None = getattr(data, "samples", None)
        self.sample_ids: Callable[[int, slice], Ids] | None = getattr(data, "sample_ids", None)
        self.tokenizer = None  # one of yours need not be like ours
        self._data, self._folder = data, os.getcwd()

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        with importable_from(self._folder):
            return self._data.batch(step, rows)

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        with importable_from(self._folder):
            return self._data.validation(index, rows)


def check_ids(spec: str, sample_ids: Callable[[int, slice], Ids], batch: int) -> None:
    """Raise UserError unless the samples of the first batch have numbers, one for each row."""
    call = f"sample_ids(0, slice(0, {batch}))"
    with calling(spec, call):
        ids = [int(number) for number in sample_ids(0, slice(0, batch))]
    if len(ids) != batch:
        raise refusal(spec, f"{call} returned {len(ids)} numbers, not one for each row; {SEE}")


def first_rows(
    spec: str, data: Data, method: str, rows: int, sample: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Returns rows 0 .. rows - 1 of the first batch. Raises UserError if they are wrong."""
    call = f"{method}(0, slice(0, {rows}))"
    with calling(spec, call):
        pair: tuple[Tensor, Tensor] = getattr(data, method)(0, slice(0, rows))
    if problem := mismatch(pair, rows, sample, data.vocab):
        raise refusal(spec, f"{call} returned {problem}; {SEE}")
    return pair


def mismatch(pair: object, rows: int, sample: tuple[int, ...], vocab: int) -> str | None:
    """Returns why `pair` is not (inputs, targets) with this many rows; None if it is.

    `sample` is the shape of one sample: that of an image, or (seq,) for text.
    """
    import torch  # not at the top: the launcher calls locate() without torch

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
