"""The gradients of a group's shards, added up over the micro-batches of a step.

    memory = [ gradient of a's shard | of b's shard | ... | flags ]   one flag for each parameter

A reduce-scatter gives the sum over the ranks for one micro-batch, and each parameter's flag counts
the ranks that used it. The flags decide `.grad`: a parameter that no rank used keeps the `.grad`
that it had. Between micro-batches `.grad` belongs to the user, who may clear or replace it; so we
read it back before we add to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import FlatBuffer
from dist_lab.parallel.sharded.sharded_param import ShardedParam


class ShardedGrads:
    """The sum of one group's reduced gradients, and the `.grad` of its shards.

    Args:
        params: the group's trained parameters.
        dtype, device: of the shards.
        label: the name of its collectives in logs.

    Attributes:
        length: elements of the shards' gradients and of their flags.
        total: the sum so far; None before the first micro-batch was reduced.
    """

    def __init__(
        self, params: Sequence[ShardedParam], dtype: torch.dtype, device: torch.device, label: str
    ) -> None:
        self.params, self.dtype, self.device, self.label = params, dtype, device, label
        self.lengths = {param.name: (param.length,) for param in params}
        self.length = sum(param.length for param in params) + len(params)
        self.total: FlatBuffer | None = None

    def buffer(self, memory: Tensor) -> FlatBuffer:
        """A flat buffer in this memory: the gradients of the shards, then the flags."""
        return FlatBuffer(memory, self.lengths, self.label)

    def add(self, reduced: FlatBuffer) -> None:
        """Add one micro-batch to the total, and assign the total to `.grad`."""
        self.read_back()
        if self.total is None:
            self.total = reduced
        else:
            self.total.memory.add_(reduced.memory)
        self._assign_grads(self.total)

    def read_back(self) -> None:
        """Update the total where the user has cleared or replaced a `.grad`."""
        if all(param.sharded.grad is None for param in self.params):
            self.total = None
            return
        if self.total is None:  # the user has set these gradients
            self.total = self._zeros()
            self.total.tail.fill_(1)
        for param, flag in zip(self.params, self.total.tail, strict=True):
            view, grad = self.total.views[param.name], param.sharded.grad
            if grad is None:  # cleared, or not used yet
                view.zero_()
                flag.zero_()
            elif grad.data_ptr() != view.data_ptr():  # replaced, or on another device
                view[: grad.numel()].copy_(grad.flatten())

    def issue_sum(self, replicate: Axis) -> None:
        """dW[D_X, F]{U_Y} -> dW[D_X, F]"""
        if self.total is None:  # only another replica has used the group
            self.total = self._zeros()
        self.total.issue(ops.all_reduce_into, replicate)

    def wait_sum(self) -> None:
        assert self.total is not None, self.label
        self.total.wait()
        self._assign_grads(self.total)

    def _assign_grads(self, total: FlatBuffer) -> None:
        """Set `.grad` to a view of the total, for each parameter that some rank used."""
        for param, used in zip(self.params, (total.tail > 0).tolist(), strict=True):
            if used:
                shard = param.sharded
                grad = total.views[param.name][: shard.numel()].view_as(shard)
                shard.grad = grad.to(shard.device)

    def _zeros(self) -> FlatBuffer:
        return self.buffer(torch.zeros(self.length, dtype=self.dtype, device=self.device))
