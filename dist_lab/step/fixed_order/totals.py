"""The numbers of a step that are sums over ranks, with bits that do not depend on the layout."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.layout.gather import Layouts
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.step.clip import Gradients
from dist_lab.step.detached import RecordedLoss, sum_of_losses
from dist_lab.step.fixed_order.norm import exact_norm
from dist_lab.step.fixed_order.optimizer import refuse_inexact
from dist_lab.step.fixed_order.order import check_microbatches
from dist_lab.step.hooks import map_tensors
from dist_lab.step.setup import ALIGNMENT
from dist_lab.step.totals import check_pairs


@final
class FixedTotals:
    """A `Totals` that rounds each number once.

    Args:
        shards, microbatches: the number of virtual shards, of all ranks and of this one.
        axis: all ranks, which refuse a step together.
        sharded: ranks step on shards.
    """

    keeps_losses = True

    def __init__(self, shards: int, microbatches: int, axis: Axis, *, sharded: bool) -> None:
        self.shards, self.microbatches, self.axis = shards, microbatches, axis
        self.sharded = sharded

    def checked(self, microbatches: Sequence[Pair]) -> Sequence[Pair]:
        """One micro-batch for each virtual shard, each at the start of its memory. Collective.

        A matrix product may round differently if its input begins elsewhere in a cache line.
        """
        with self.axis.comm.label("microbatches"), together(self.axis):
            check_pairs(microbatches)
            check_microbatches(len(microbatches), self.microbatches, self.shards)
        return [tuple(map_tensors(aligned, value) for value in pair) for pair in microbatches]

    def loss(self, total: Tensor, recorded: RecordedLoss, axis: Axis, *, trains: bool) -> float:
        """The exact sum of the micro-batches' losses, rounded once."""
        approximate = sum_of_losses(total, recorded, axis, trains=trains)
        row = torch.zeros(1, self.microbatches, dtype=torch.float64, device=axis.device)
        for i, loss in enumerate(recorded.losses):
            row[0, i] = loss
        losses = ops.all_gather(row, axis).flatten().tolist()
        return math.fsum(losses) if all(map(math.isfinite, losses)) else approximate

    def norm(self, gradients: Gradients, layouts: Layouts, mesh: Mesh) -> Tensor:
        return exact_norm(gradients, layouts, mesh)

    def check_optimizer(
        self, cls: type[torch.optim.Optimizer], options: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        refuse_inexact(cls, options, groups, sharded=self.sharded)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that begins at a multiple of 64 bytes."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
