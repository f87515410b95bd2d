"""W8A8: weights and inputs in 8 bits, multiplied as integers.

Weights are rounded to nearest, with one scale per row. Inputs are rounded when they come:

    dynamic    each row (token) has the range of its own values: signed codes, nothing to calibrate
    static     all rows have one range, which an observer has found on the calibration rows: affine
               codes, no pass over x to find its range, and values outside of it are clamped

Dynamic ranges are the safer ones: a large token does not make the others coarser. Static ones are
found over all ranks' rows, with the same bits on any number of them (observers.py). They are
observed block after block, on inputs that are not rounded.

The arithmetic is in activations.py. Linears are replaced by linear.py's `replace_linears`, with the
`weights` and `inputs` of the result. Dettmers et al. 2022 (arXiv:2208.07339), section 2; Wu et al.
2020 (arXiv:2004.09602), section 3.
"""

from collections.abc import Callable

import torch
from torch import nn

from dist_lab.errors import UserError, one_of
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.activations import ActivationGrid, check_width, is_signed_rows
from dist_lab.quantize.blocks import Block, check_linears, linears_of
from dist_lab.quantize.calibrate import Calibration, Result, observe, set_weights, walk
from dist_lab.quantize.formula import WHOLE, Scheme, grid_between, precise, round_to_nearest
from dist_lab.quantize.observers import MinError, RangeObserver

TOKEN = Scheme(8, WHOLE, symmetric=True)  # dynamic
TENSOR = Scheme(8, None)  # static
KINDS = ("dynamic", "static")

MakeObserver = Callable[[torch.dtype], RangeObserver]


def quantize(
    model: nn.Module,
    calibration: Calibration,
    scheme: Scheme,
    *,
    inputs: str = "dynamic",
    observer: MakeObserver = MinError,
) -> Result:
    """Quantise the Linears of a model's blocks and choose how inputs are rounded. Collective.

    The weights are changed in place. The model does not round inputs before its Linears are
    replaced: `replace_linears(model, result.weights, result.inputs)`.

    Args:
        scheme: of weights; 8 bits, one scale per row, symmetric.
        inputs: "dynamic" or "static".
        observer: makes the observer of a Linear's inputs of some dtype; for static ranges.

    Raises:
        UserError: the scheme has no integer product, a layer has too many inputs, or inputs are
            not finite; see also `check_linears`.
    """
    check(scheme, inputs)
    check_linears(model, scheme)
    result = Result()
    for block in walk(model, calibration):
        grids = grids_of(block, calibration.axis, inputs, observer)
        round_block(model, block, scheme, grids, result)
    return result


def check(scheme: Scheme, inputs: str) -> None:
    """Raise UserError for a scheme without an integer product, or an unknown kind of ranges."""
    if not is_signed_rows(scheme):
        raise UserError(
            f"weights of bits={scheme.bits} group={scheme.group} symmetric="
            f"{str(scheme.symmetric).lower()} have no product of integers with 8-bit inputs; give "
            "8 bits, group=-1 and symmetric codes"
        )
    if inputs not in KINDS:
        raise UserError(f"inputs={inputs!r} are no ranges; give {one_of(KINDS, inputs)}")


def grids_of(
    block: Block, axis: Axis, inputs: str, observer: MakeObserver
) -> dict[str, ActivationGrid]:
    """Name in the block of each Linear -> how its inputs are rounded. Collective if static."""
    linears = linears_of(block.module)
    if inputs == "dynamic":
        return dict.fromkeys(linears, ActivationGrid(TOKEN))
    observers = observe(block, lambda name: observer(precise(linears[name].weight.dtype)))
    for one in dict.fromkeys(observers.values()):
        one.merge(axis)
    grids = {}
    for name, one in observers.items():
        low, high = one.bounds(TENSOR)
        grid = grid_between(low, high, TENSOR, linears[name].in_features)
        device = linears[name].weight.device
        grids[name] = ActivationGrid(TENSOR, grid.scale.to(device), grid.zero.to(device))
    return grids


def round_block(
    model: nn.Module,
    block: Block,
    scheme: Scheme,
    grids: dict[str, ActivationGrid],
    result: Result,
) -> None:
    """Round a block's weights in place, and add them to the result."""
    found = {}
    for name, linear in linears_of(block.module).items():
        check_width(linear.in_features)
        weight = linear.weight.detach()
        found[f"{block.name}.{name}"] = round_to_nearest(weight.to(precise(weight.dtype)), scheme)
        result.inputs[f"{block.name}.{name}"] = grids[name]
    set_weights(model, found)
    result.weights.update(found)
