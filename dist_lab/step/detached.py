"""Sums the loss over ranks, and finds out if the loss is detached on every rank by mistake.

A rank may have no loss that needs a gradient, for instance because all its rows are padding. It
joins backward with zeros (dist_lab/loss.py). If no rank has such a loss, nothing trains, and nobody
notices. So a rank whose losses are all detached, but not all zero, sends NaN in place of its share.
Usually one number is sent; if the sum is NaN, all ranks exchange one vote more.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.loss import LossFn
from dist_lab.mesh.mesh import Axis


class RecordedLoss:
    """A loss_fn that records its losses, and whether they need gradients.

    Attributes:
        losses: in the order of the calls, detached; empty without `keep`.
        some_need_gradient: a loss needed a gradient.
        some_detached: a loss needed no gradient, although it was not zero.
    """

    def __init__(self, loss_fn: LossFn, *, keep: bool) -> None:
        self.loss_fn, self.keep = loss_fn, keep
        self.some_need_gradient, self.some_detached = False, False
        self.losses: list[Tensor] = []

    def __call__(self, output: Any, target: Any) -> Tensor:
        loss = self.loss_fn(output, target)
        if not isinstance(loss, Tensor) or loss.requires_grad:
            self.some_need_gradient = True
        elif loss.any():
            self.some_detached = True
        if self.keep and isinstance(loss, Tensor):
            self.losses.append(loss.detach())
        return loss


def sum_of_losses(total: Tensor, recorded: RecordedLoss, axis: Axis, *, trains: bool) -> float:
    """The sum over the axis of the losses that `recorded` has returned.

    Args:
        trains: some parameter needs a gradient.

    Raises:
        UserError: no loss of any rank needs a gradient, although some parameter does.
    """
    detached = recorded.some_detached and trains and not recorded.some_need_gradient
    loss = float(ops.all_reduce(torch.full_like(total, math.nan) if detached else total, axis))
    if not math.isnan(loss):
        return loss
    vote = axis.size + 1 if recorded.some_need_gradient else -int(detached)
    sums = ops.all_reduce(torch.stack([total, torch.full_like(total, vote)]), axis)
    loss, votes = sums.tolist()
    if votes < 0:
        raise UserError(
            "no rank's loss needs a gradient: loss_fn returns a tensor that is detached from the "
            "model's output; remove .detach(), .data or torch.no_grad() from it"
        )
    return loss
