"""The reductions of fsdp's gradients: one at a time, from one send buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.sharded.param_group import ParamGroup


class Reductions:
    """Issues the reduce-scatter of a group once the one before it is over.

    So at most two groups' unsharded gradients exist: one in flight, and one in backward.

    Attributes:
        staging: dtype -> the send buffer, as large as the largest group; made at first use.
    """

    def __init__(self, groups: Sequence[ParamGroup], axis: Axis) -> None:
        self.axis = axis
        self.lengths: dict[torch.dtype, int] = {}
        for group in groups:
            longest = max(group.sharded_grads.length, self.lengths.get(group.reduce_dtype, 0))
            self.lengths[group.reduce_dtype] = longest
        self.staging: dict[torch.dtype, Tensor] = {}
        self.in_flight: ParamGroup | None = None

    def issue(self, group: ParamGroup) -> None:
        self.wait()
        dtype, size = group.reduce_dtype, self.axis.size
        if dtype not in self.staging:
            self.staging[dtype] = ops.shared_buffer(size * self.lengths[dtype], dtype, self.axis)
        self.in_flight = group
        group.issue_reduce(self.staging[dtype])

    def wait(self) -> None:
        """Wait for the reduction in flight, if there is one."""
        if self.in_flight is not None:
            self.in_flight.wait_reduce()
            self.in_flight = None
