"""A library's wrapper around a model, entered through the model itself.

Libraries return a new module that holds the old one, and all parameters have longer names then.
Here the model stays what one calls: hooks on it do what the wrapper's own forward does before and
after it calls the model. So names, units and the user's code are the same under every impl, and
nothing of ours comes between the library and its collectives.
"""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_lab.hooks import ModuleHook, tensors_in
from dist_lab.layout import Laid
from dist_lab.mesh import Axis
from dist_lab.parallel.sync import Sync


def whole(model: nn.Module, axis: Axis) -> dict[str, Laid]:
    """Every parameter on every rank, its gradient owed a sum over the axis."""
    return {
        name: Laid(p.shape, p.dtype, sum_over=(axis,) if p.requires_grad else ())
        for name, p in model.named_parameters()
    }


class ThroughDDP(Sync):
    """Leaves everything to torch's DistributedDataParallel, which sums in its own backward hooks.

    The library averages over the ranks where the convention here is to add up (sync.py). So the
    gradient is multiplied by the number of ranks where it enters the model, at its output: that
    is the smallest tensor there is to multiply, and the library runs as it always does. (A term of
    the loss that reaches a parameter past the output, such as a weight's norm, is averaged.)
    """

    def __init__(self, ddp: DistributedDataParallel, axis: Axis) -> None:
        self.ddp, self.axis = ddp, axis
        ddp.module.register_forward_pre_hook(ModuleHook(self._before), with_kwargs=True)
        ddp.module.register_forward_hook(ModuleHook(self._after))

    def microbatch(self, *, last: bool) -> None:
        self.ddp.require_backward_grad_sync = last  # what its no_sync() does

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.ddp._pre_forward(*args, **kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        output = self.ddp._post_forward(output)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradient * self.axis.size)
        return output
