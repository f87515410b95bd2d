"""Quantise one model by one method, and measure what becomes of its size and its loss."""

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import nn

from dist_lab.programs.quantize.methods import METHODS
from dist_lab.programs.quantize.source import Source, loss_of
from dist_lab.quantize.calibrate import Calibration
from dist_lab.quantize.formula import Scheme
from dist_lab.quantize.linear import replace_linears
from dist_lab.quantize.packing import as_stored


@dataclass(frozen=True)
class Measured:
    """A model before and after.

    model: its Linears are quantised
    loss: in the unit of the source, before and after
    size: the bytes of all tensors, before and after
    seconds: of the method alone
    notes: of the method
    """

    model: nn.Module
    loss: tuple[float, float]
    size: tuple[int, int]
    seconds: float
    notes: list[str]


def measure(
    source: Source, calibration: Calibration, method: str, scheme: Scheme,
    options: Mapping[str, Any], *, before: float | None = None,
) -> Measured:  # fmt: skip
    """Quantise a copy of a model. Collective.

    Args:
        before: the loss of the model, if it is known.
    """
    axis = calibration.axis
    before = loss_of(source.model, source, axis) if before is None else before
    model = deepcopy(source.model)
    began = time.perf_counter()
    with axis.comm.label("quantize"):
        result = resolve_name(METHODS[method].function)(model, calibration, scheme, **options)
    seconds = time.perf_counter() - began
    after = loss_of(model, source, axis)  # before its weights are packed: the same bits, sooner
    replace_linears(model, {name: as_stored(q) for name, q in result.weights.items()})
    sizes = bytes_of(source.model), bytes_of(model)
    return Measured(model, (before, after), sizes, seconds, result.notes)


def bytes_of(model: nn.Module) -> int:
    """The bytes of all tensors in a model's state. A tied tensor counts once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
