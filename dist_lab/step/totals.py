"""The numbers of a step that are sums over ranks: the loss and the gradient norm.

`PlainTotals` adds them up in any order. step/fixed_order/totals.py has the other `Totals`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.layout.gather import Layouts
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.step.clip import Gradients, global_norm
from dist_lab.step.detached import RecordedLoss, sum_of_losses


class Totals(Protocol):
    """How a job adds up numbers over ranks.

    Attributes:
        keeps_losses: it adds up the losses of single micro-batches.
    """

    keeps_losses: bool

    def checked(self, microbatches: Sequence[Pair]) -> Sequence[Pair]:
        """The micro-batches of a run. Raises UserError if they are not pairs, or do not fit."""

    def loss(self, total: Tensor, recorded: RecordedLoss, axis: Axis, *, trains: bool) -> float:
        """See sum_of_losses."""

    def norm(self, gradients: Gradients, layouts: Layouts, mesh: Mesh) -> Tensor:
        """See global_norm."""

    def check_optimizer(
        self, cls: type[torch.optim.Optimizer], options: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        """Raise UserError if the optimizer's update depends on the layout.

        Args:
            options, groups: for all parameters, and those of each group.
        """


@final
class PlainTotals:
    """Adds up in the order that is fastest. job.optimizer has checked the optimizer's formula."""

    keeps_losses = False

    def checked(self, microbatches: Sequence[Pair]) -> Sequence[Pair]:
        check_pairs(microbatches)
        return microbatches

    def loss(self, total: Tensor, recorded: RecordedLoss, axis: Axis, *, trains: bool) -> float:
        return sum_of_losses(total, recorded, axis, trains=trains)

    def norm(self, gradients: Gradients, layouts: Layouts, mesh: Mesh) -> Tensor:
        return global_norm(gradients, layouts, mesh)

    def check_optimizer(
        self, cls: type[torch.optim.Optimizer], options: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        """Any order of additions is accepted, so there is nothing to refuse."""


def check_pairs(microbatches: Sequence[Pair]) -> None:
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in microbatches):
        raise UserError("microbatches are a list of (input, target) pairs: job.run([(x, y)], ...)")
