"""Naive data parallelism: the same weights everywhere, each rank its rows, one sum at the end.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   after backward

Each rank's gradient is that of its own rows; their sum is that of the whole batch, and so every
rank takes the same step. The idea is whole here and nothing else is: no byte travels while a rank
computes, and each parameter pays the network's latency by itself. ddp mends both.

Cost per step, for P parameters of which none is idle: one all_reduce each, 2 (N-1)/N P elements
sent, however many micro-batches there were; and one all_reduce of a byte per parameter, to agree on
which were used. Memory per rank: all of everything. Buffers (the statistics of BatchNorm) stay each
rank's own. Bulk-synchronous SGD: Valiant 1990 (BSP),
Zinkevich et al. 2010, "Parallelized stochastic gradient descent".
"""

import torch
from torch import nn

from dist_lab.comm.ops import all_reduce, all_reduce_into
from dist_lab.mesh.mesh import Axis
from dist_lab.step.protocol import Applied, Setup, Sync


def apply(setup: Setup) -> Applied:
    """Owe the gradient of every trained parameter one sum over the axis."""
    model, axis = setup.model, setup.axis
    return Applied(setup.owing_sums(axis), AllReduceAfterBackward(model, axis))


class AllReduceAfterBackward(Sync):
    """Sums every gradient in `finish`, parameter by parameter."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        self.model, self.axis = model, axis
        self.owed = [name for name, p in model.named_parameters() if p.requires_grad]

    def finish(self) -> None:
        for name in self._used_somewhere():  # one order on every rank, or they would hang
            parameter = self.model.get_parameter(name)
            if parameter.grad is None:  # used on another rank, not on this one
                parameter.grad = torch.zeros_like(parameter)
            with self.axis.comm.label(unit=name):
                all_reduce_into(parameter.grad, self.axis).wait()  # dW{U_dp} -> dW

    def _used_somewhere(self) -> list[str]:
        """Parameters with a gradient on some rank. One that has none anywhere keeps none."""
        if not self.owed:
            return []
        grads = [self.model.get_parameter(name).grad is not None for name in self.owed]
        flags = torch.tensor(grads, dtype=torch.uint8, device=self.axis.device)
        used = all_reduce(flags, self.axis, "max")
        return [name for name, yes in zip(self.owed, used.tolist(), strict=True) if yes]
