"""Quantise one model by one method, and measure what becomes of its size and its loss."""

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from dist_lab.programs.quantize.methods import METHODS
from dist_lab.programs.quantize.settings import Quantize
from dist_lab.programs.quantize.source import Source, loss_of
from dist_lab.quantize.calibrate import Calibration
from dist_lab.quantize.formula import WHOLE, Scheme
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
    stored = {name: as_stored(quantized) for name, quantized in result.weights.items()}
    replace_linears(model, stored, result.inputs)
    after = loss_of(model, source, axis)
    sizes = bytes_of(source.model), bytes_of(model)
    return Measured(model, (before, after), sizes, seconds, result.notes)


def scheme_of(config: Quantize, method: str, bits: int) -> Scheme:
    """The scheme of a method's weights. Scales are those of the file, in 16 bits."""
    if METHODS[method].activations:  # only then is there a product of integers
        return Scheme(bits, WHOLE, symmetric=True, scale_dtype=torch.float16)
    return Scheme(bits, config.columns, config.symmetric, torch.float16)


def bytes_of(model: nn.Module) -> int:
    """The bytes of all tensors in a model's state. A tied tensor counts once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
