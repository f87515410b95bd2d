"""AWQ: columns that large inputs meet are scaled up before a weight is rounded.

    Q(W diag(s)) (x / s) ~ W x          s = m^alpha,  m = the mean |x| of each input

A few inputs are much larger than the others, and errors in their columns of W matter most. A column
that is multiplied by s has its relative error divided by about s, as long as the largest weight of
its group stays where it is, which the other columns pay for otherwise. So s should be large for few
columns, and m says for which. How large is one number, alpha: 0 is rounding to nearest, and 20
values are tried on the calibration rows. The layer before divides by s: see folding.py.

The error of a trial is that of the outputs, over all calibration tokens. It is a quadratic form,
and reads the inputs only as their products (hessian.py):

    |X W^T - X Q^T|^2 = sum over rows of 1/2 (w - q) H (w - q)^T,      H = 2 X^T X

Then the range of each group is narrowed if that helps (`clipped`): it clamps the largest weights,
and rounds all others more finely. At 4 bits that helps a little, at 3 bits a lot.

Over ranks: m and H are added up along the tree over the virtual shards. Each rank searches its
share of the scales and of the ranges, and broadcasts what it has found. So the bits are the same on
any number of ranks.

    x[B_X, D] -> H[D, D]{U_X} -> H      once for Linears with the same input, such as q, k and v

Lin et al. 2023 (arXiv:2306.00978), section 3. Their code runs the attention or the MLP for each
trial, and looks at its outputs; we look at those of each Linear, which needs no further forward.

Letters: D inputs, F outputs of a Linear, C channels of a source, G groups of columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.quantize.blocks import Block, check_linears, linears_of
from dist_lab.quantize.calibrate import (
    Calibration,
    Result,
    broadcast_quantized,
    observe,
    set_weights,
    share_out,
    tree_sum,
    walk,
)
from dist_lab.quantize.folding import Fed, Plan, fold, read_plan, rehearse
from dist_lab.quantize.formula import (
    WHOLE,
    Quantized,
    Scheme,
    bounds,
    grid_between,
    precise,
    round_to_nearest,
)
from dist_lab.quantize.hessian import HessianObserver, output_error
from dist_lab.step.fixed_order.tree import SumTree

ALPHAS = [step / 20 for step in range(20)]
SHRINKS = [1 - step / 40 for step in range(1, 21)]  # of a group's range: 0.975 ... 0.5
FLOOR = 1e-4  # of the largest mean |x|: an input that is always 0 has no scale of its own


def quantize(
    model: nn.Module,
    calibration: Calibration,
    scheme: Scheme,
    *,
    plan: Plan | None = None,
    clip: bool = True,
) -> Result:
    """Quantise the Linears of a model's blocks, in place. Collective.

    Args:
        plan: what feeds each Linear; None: the model's own `scale_plan()`. See folding.py. Linears
            that are not in the plan are not scaled.
        clip: narrow the range of a group if that helps.

    Raises:
        UserError: there is no plan, it changes what the model computes, or inputs are not finite;
            see also `check_linears`.
    """
    check_linears(model, scheme)
    feds = read_plan(model, plan)
    axis, result = calibration.axis, Result()
    for block in walk(model, calibration):
        own = [fed for fed in feds if fed.linears[0].startswith(f"{block.name}.")]
        with together(axis):  # hidden states may be not finite on one rank
            rehearse(model, block, own)
        inputs = inputs_of(block, calibration)
        for name, known in inputs.items():
            if dead := int((known.magnitude == 0).sum()):
                result.notes.append(f"{name}: {dead} inputs are 0 in all samples")
        for fed, scale in searched(model, own, inputs, scheme, calibration):
            fold(model, fed, scale)
            for name in fed.linears:
                inputs[name] = inputs[name].divided(fed.spread(scale))
        linears = {f"{block.name}.{name}": m for name, m in linears_of(block.module).items()}
        owners = share_out({n: float(m.weight.numel()) for n, m in linears.items()}, axis)
        found = {}
        for name, linear in linears.items():
            quantized = None
            with together(axis):  # a scale may be too large for the scheme
                if owners[name] == axis.index:
                    weight = linear.weight.detach().to(precise(linear.weight.dtype))
                    quantized = (
                        clipped(weight, inputs[name].hessian, scheme)
                        if clip
                        else round_to_nearest(weight, scheme)
                    )
            found[name] = broadcast_quantized(quantized, linear, scheme, axis, owners[name])
        set_weights(model, found)
        result.weights.update(found)
    return result


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a Linear, over all ranks.

    hessian: H = 2 X^T X, (D, D)
    magnitude: (D,), the sum of |x|: m, but for a factor that `scale_of` removes
    """

    hessian: Tensor
    magnitude: Tensor

    def divided(self, scale: Tensor) -> "Inputs":
        """After the inputs were divided by a scale (D,)."""
        return Inputs(self.hessian / torch.outer(scale, scale), self.magnitude / scale)


class InputsObserver:
    """Adds up x x^T and |x| over this rank's virtual shards, along their subtree."""

    def __init__(self, shards: int) -> None:
        self._hessian, self._magnitude = HessianObserver(shards), SumTree(shards)
        self._seen = 0

    def see(self, x: Tensor) -> None:
        self._hessian.see(x)
        self._magnitude.add(x.to(precise(x.dtype)).abs().sum(0), self._seen)
        self._seen += 1

    def total(self, calibration: Calibration) -> Inputs:
        """Collective."""
        own = self._magnitude.total()
        assert own is not None, "the observer has seen nothing"
        magnitude = tree_sum([own], calibration.axis)
        return Inputs(self._hessian.total(calibration.axis), magnitude)


def inputs_of(block: Block, calibration: Calibration) -> dict[str, Inputs]:
    """Full name of each Linear of a block -> its inputs. Collective.

    Raises:
        UserError: inputs are not finite.
    """
    shards = len(calibration.shards)
    observers = observe(block, lambda name: InputsObserver(shards))
    totals = {o: o.total(calibration) for o in dict.fromkeys(observers.values())}
    for name, observer in observers.items():
        if not totals[observer].hessian.isfinite().all():
            raise UserError(
                f"the inputs of {block.name}.{name} are not finite on the calibration data; "
                "quantise a model whose loss is finite"
            )
    return {f"{block.name}.{name}": totals[observer] for name, observer in observers.items()}


# --- the scale ------------------------------------------------------------------------------------


def searched(
    model: nn.Module,
    feds: Sequence[Fed],
    inputs: dict[str, Inputs],
    scheme: Scheme,
    calibration: Calibration,
) -> list[tuple[Fed, Tensor]]:
    """The best scale (C,) of each source. Each rank searches some of them. Collective.

    No search waits for another: all see the weights before any scale is folded. A source that is
    itself a Linear, such as v_proj, has its rows divided afterwards. Codes of a row or a group do
    not change with its scale, but for scales that are rounded to 16 bits. With one scale for the
    matrix (group=None) they do change, and the scale of its own inputs is no longer quite the best.
    """
    axis = calibration.axis
    weights = {
        fed: [model.get_parameter(f"{name}.weight").detach() for name in fed.linears]
        for fed in feds
    }
    costs = {fed.source: float(sum(w.numel() * w.size(1) for w in weights[fed])) for fed in feds}
    owners = share_out(costs, axis)
    scales = []
    for fed in feds:
        known = inputs[fed.linears[0]]
        scale = known.magnitude.new_empty(fed.channels)
        with together(axis):
            if owners[fed.source] == axis.index:
                scale = best_scale(weights[fed], known, fed, scheme)[0]
        scales.append((fed, ops.broadcast(scale, axis, owners[fed.source])))
    return scales


def best_scale(
    weights: Sequence[Tensor], inputs: Inputs, fed: Fed, scheme: Scheme
) -> tuple[Tensor, float]:
    """The scale (C,) with the least error of all alphas, and its alpha.

    Args:
        weights: of the Linears that the source feeds, (F, D) each.
    """
    errors = []
    for alpha in ALPHAS:
        wide = fed.spread(scale_of(inputs.magnitude, fed, alpha))
        errors.append(sum(scaled_error(weight, wide, inputs.hessian, scheme) for weight in weights))
    best = errors.index(min(errors))
    return scale_of(inputs.magnitude, fed, ALPHAS[best]), ALPHAS[best]


def scale_of(magnitude: Tensor, fed: Fed, alpha: float) -> Tensor:
    """(D,) -> the scale (C,) of each channel: m^alpha, with the geometric mean of its ends at 1."""
    mean = fed.shared(magnitude).mean(1)
    mean = mean / mean.max() if mean.any() else torch.ones_like(mean)
    scale = mean.clamp(min=FLOOR) ** alpha
    return scale / (scale.max() * scale.min()).sqrt()


def scaled_error(weight: Tensor, scale: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    """The error of the outputs if W diag(s) is rounded, and inputs are divided by s (D,)."""
    weight = weight.to(hessian.dtype)
    rounded = round_to_nearest(weight * scale, scheme).values() / scale
    return output_error(rounded - weight, hessian)


# --- the range ------------------------------------------------------------------------------------


def clipped(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Quantized:
    """Round a weight (F, D), with a narrower range in each group of a row where that helps.

    One group after another tries all ranges, given the errors in the other groups as they are now.
    So the error of the outputs is never larger than that of rounding to nearest. (The paper looks
    at each group alone. Then errors of two groups may add up.)
    """
    low, high = bounds(weight, scheme)
    columns, width = weight.size(1), weight.size(1) // low.size(1)
    shrink = torch.ones_like(low)  # (F, G)
    change = round_to_nearest(weight, scheme).values() - weight  # (F, D)
    pull = change @ hessian  # (F, D): the gradient of the error
    one = replace(scheme, group=None if scheme.group is None else WHOLE)
    for g in range(low.size(1)):
        part, group = slice(g * width, (g + 1) * width), slice(g, g + 1)
        best = torch.zeros_like(change[:, part])
        least = torch.zeros_like(low[:, group])
        for ratio in SHRINKS:
            grid = grid_between(low[:, group] * ratio, high[:, group] * ratio, one, width)
            step = grid.rounded(weight[:, part]) - weight[:, part] - change[:, part]
            more = (step * (pull[:, part] + step @ hessian[part, part] / 2)).sum(1, keepdim=True)
            if scheme.group is None:
                more = more.sum(0, keepdim=True)
            better = more < least
            least = torch.where(better, more, least)
            best = torch.where(better, step, best)
            shrink[:, group] = torch.where(better, ratio, shrink[:, group])
        change[:, part] += best
        pull += best @ hessian[part]
    grid = grid_between(low * shrink, high * shrink, scheme, columns)
    return Quantized(grid.codes(weight), grid)
