"""The loss of all ranks, and whether it was detached on all of them by mistake.

A rank's rows may have no loss that needs a gradient, for instance as all are padding: it joins in
backward with zeros (dist_lab/loss.py). Were it so on every rank, nothing would train, silently. A
rank that has a loss, and none that needs a gradient, says NaN in place of its share. So in the
usual case one number is sent, and where the sum is NaN all ranks ask again.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.loss import LossFn
from dist_lab.mesh.mesh import Axis


class Watched:
    """A loss_fn that remembers what came of it.

    Attributes:
        reaches: some loss of it needed a gradient.
        strays: some loss was not zero, and needed none.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn, self.reaches, self.strays = loss_fn, False, False

    def __call__(self, output: Any, target: Any) -> Tensor:
        loss = self.loss_fn(output, target)
        if not isinstance(loss, Tensor) or loss.requires_grad:
            self.reaches = True
        elif loss.any():
            self.strays = True
        return loss


def sum_of_losses(total: Tensor, watched: Watched, axis: Axis, *, trains: bool) -> float:
    """The sum over the axis of what `watched` gave.

    Args:
        trains: some parameter needs a gradient.

    Raises:
        UserError: none of the ranks' losses does.
    """
    stray = watched.strays and trains and not watched.reaches
    loss = float(ops.all_reduce(torch.full_like(total, math.nan) if stray else total, axis))
    if not math.isnan(loss):
        return loss
    vote = axis.size + 1 if watched.reaches else -int(stray)
    both = ops.all_reduce(torch.stack([total, torch.full_like(total, vote)]), axis)
    loss, votes = both.tolist()
    if votes < 0:
        raise UserError(
            "no rank's loss needs a gradient: loss_fn returns a number that was detached from the "
            "model's output; leave out its .detach(), .data or torch.no_grad()"
        )
    return loss
