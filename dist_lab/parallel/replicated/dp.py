"""Naive data parallelism: replicated weights, each rank its own rows, one all_reduce per gradient.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   after backward

Each rank computes the gradient of its own rows. The sum over the ranks is the gradient of the whole
batch, so every rank takes the same optimizer step. This is simple, and slow: communication does not
overlap with compute, and each parameter tensor costs the latency of a collective. ddp avoids both.

Cost per step on N ranks, for P elements in all, if all are used: an all_reduce per parameter tensor
after the last micro-batch, 2 (N-1)/N P elements sent; and an all_reduce of used flags, a byte per
tensor. Memory per rank: all parameters, gradients and optimizer state. Buffers (the statistics
of BatchNorm) stay local to each rank. Bulk-synchronous SGD: Valiant 1990 (BSP),
Zinkevich et al. 2010, "Parallelized stochastic gradient descent".
"""

import torch
from torch import nn

from dist_lab.comm.ops import all_reduce, all_reduce_into
from dist_lab.mesh.mesh import Axis
from dist_lab.step.protocol import Applied, Sync
from dist_lab.step.setup import Setup


def apply(setup: Setup) -> Applied:
    """Sum the gradient of every trained parameter over the axis, after backward."""
    model, axis = setup.model, setup.axis
    return Applied(setup.owing_sums(axis), AllReduceAfterBackward(model, axis))


class AllReduceAfterBackward(Sync):
    """Sums every gradient in `finish`, parameter by parameter."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        self.model, self.axis = model, axis
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]

    def finish(self) -> None:
        for name in self._used_on_any_rank():  # one order on all ranks: collectives must match
            parameter = self.model.get_parameter(name)
            if parameter.grad is None:  # used on another rank, not on this one
                parameter.grad = torch.zeros_like(parameter)
            with self.axis.comm.label(unit=name):
                all_reduce_into(parameter.grad, self.axis).wait()  # dW{U_dp} -> dW

    def _used_on_any_rank(self) -> list[str]:
        """Parameters that have a gradient on any rank. All others keep `grad is None`."""
        if not self.trained:
            return []
        has_grad = [self.model.get_parameter(name).grad is not None for name in self.trained]
        flags = torch.tensor(has_grad, dtype=torch.uint8, device=self.axis.device)
        used = all_reduce(flags, self.axis, "max").tolist()
        return [name for name, is_used in zip(self.trained, used, strict=True) if is_used]
