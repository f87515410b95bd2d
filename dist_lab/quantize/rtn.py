"""Rounding to nearest: every weight becomes the nearest code. The baseline of all methods.

It reads no samples, and every rank computes the same: there is nothing to send.
"""

from torch import nn

from dist_lab.quantize.blocks import blocks_of, check_linears, linears_of
from dist_lab.quantize.calibrate import Calibration, Result, set_weights
from dist_lab.quantize.formula import Scheme, precise, round_to_nearest


def quantize(model: nn.Module, calibration: Calibration, scheme: Scheme) -> Result:
    """Quantise the Linears of a model's blocks, in place.

    Args:
        calibration: not read.

    Raises:
        UserError: a weight is not finite; see also `check_linears`.
    """
    check_linears(model, scheme)
    weights = {}
    for block, module in blocks_of(model):
        for name, linear in linears_of(module).items():
            weight = linear.weight.detach()
            weights[f"{block}.{name}"] = round_to_nearest(weight.to(precise(weight.dtype)), scheme)
    set_weights(model, weights)
    return Result(weights)
