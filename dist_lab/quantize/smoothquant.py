"""SmoothQuant: what is hard to round is moved from inputs to weights, before W8A8.

    s_j = max|X_j|^a / max|W_j|^(1-a)          W x = (W diag(s)) (x / s)

A few inputs of a Linear are up to 100 times larger than the others, always the same ones. They
stretch the range of every token, and the other inputs keep two or three bits of the eight. Weights
have no such columns. With a = 1/2, the largest input and the largest weight of each column become
equal: sqrt(max|X_j| max|W_j|). The norm before divides by s (folding.py), so nothing is left to do
at run time. As in the paper, only inputs that come from a norm are smoothed.

    max|X_j|{MAX_X} -> max|X_j|     over the data axis X, D numbers for each norm

A maximum has the same bits in any order, so s has them on any number of ranks.

Xiao et al. 2023 (arXiv:2211.10438), section 4, equation 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.quantize.blocks import Block, check_linears, linears_of
from dist_lab.quantize.calibrate import Calibration, Result, observe, walk
from dist_lab.quantize.folding import Fed, Plan, fold, read_plan, rehearse
from dist_lab.quantize.formula import Scheme, precise
from dist_lab.quantize.observers import MinError, MinMax
from dist_lab.quantize.w8a8 import MakeObserver, check, grids_of, round_block


def quantize(
    model: nn.Module,
    calibration: Calibration,
    scheme: Scheme,
    *,
    plan: Plan | None = None,
    alpha: float = 0.5,
    inputs: str = "dynamic",
    observer: MakeObserver = MinError,
) -> Result:
    """Smooth the inputs of a model's blocks, and quantise as `w8a8.quantize` does. Collective.

    Args:
        plan: what feeds each Linear; None: the model's own `scale_plan()`. See folding.py.
        alpha: a; 0 makes all columns of weights equally large, 1 all inputs.
        scheme, inputs, observer: see `w8a8.quantize`.

    Raises:
        UserError: there is no plan, it changes what the model computes, alpha is not from 0 to 1,
            or what `w8a8.quantize` refuses.
    """
    check(scheme, inputs)
    check_linears(model, scheme)
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha} is no share; give 0 to 1, such as 0.5")
    sources = read_plan(model, plan)
    feds = [f for f in sources if not isinstance(model.get_submodule(f.source), nn.Linear)]
    result = Result()
    for block in walk(model, calibration):
        own = [fed for fed in feds if fed.linears[0].startswith(f"{block.name}.")]
        with together(calibration.axis):  # hidden states may be not finite on one rank
            rehearse(model, block, own)
        smooth(model, block, own, calibration, alpha)
        grids = grids_of(block, calibration.axis, inputs, observer)  # of the smoothed inputs
        round_block(model, block, scheme, grids, result)
    return result


def smooth(
    model: nn.Module, block: Block, feds: Sequence[Fed], calibration: Calibration, alpha: float
) -> None:
    """Fold the scales of a block. Collective."""
    linears = linears_of(block.module)
    observers = observe(
        block, lambda name: MinMax(linears[name].in_features, precise(linears[name].weight.dtype))
    )
    for observer in dict.fromkeys(observers.values()):
        observer.merge(calibration.axis)
    for fed in feds:
        weights = [model.get_parameter(f"{name}.weight").detach() for name in fed.linears]
        largest = observers[fed.linears[0].removeprefix(f"{block.name}.")].largest()
        fold(model, fed, smoothing_scale(largest.to(weights[0].device), weights, fed, alpha))


def smoothing_scale(largest: Tensor, weights: Sequence[Tensor], fed: Fed, alpha: float) -> Tensor:
    """The scale (C,) of each channel. It is 1 where all inputs or all weights are 0.

    Args:
        largest: (D,), max|X_j|.
        weights: (F, D) each, of all Linears that the source feeds.
    """
    columns = torch.cat(list(weights)).abs().amax(0).to(largest.dtype)  # (D,): max|W_j|
    x, w = fed.shared(largest).amax(1), fed.shared(columns).amax(1)
    scale = x**alpha / w ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), scale, torch.ones_like(scale))
