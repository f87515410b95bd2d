"""A library's wrapper around a model, entered through the model itself.

Libraries return a new module that holds the old one, and all parameters have longer names then.
Here the model stays what one calls: hooks on it do what the wrapper's own forward does before and
after it calls the model. So names, units and the user's code are the same under every impl, and
nothing of ours comes between the library and its collectives.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.step.protocol import Sync
from dist_lab.torch_private import ddp_forward_begins, ddp_forward_ends, tree_map_only


def wrap_in_ddp(
    model: nn.Module, axis: Axis, *, bucket_mb: float, find_unused: bool
) -> tuple["ThroughDDP", str]:
    """Wrap the model in DistributedDataParallel, in its fastest documented configuration.

    Gradients are views into its buckets. Without its broadcast of buffers, which would overwrite
    what a rank has measured by what rank 0 has, and of weights: parallelize() has seen to those.
    Returns its Sync, and a description of the configuration.
    """
    ddp = DistributedDataParallel(
        model,
        process_group=axis.group,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        forward_sync_buffers=False,
        init_sync=False,
    )
    about = (
        f"torch DistributedDataParallel(bucket_cap_mb={bucket_mb:g}, gradient_as_bucket_view=True, "
        f"find_unused_parameters={find_unused}, forward_sync_buffers=False)"
    )
    return ThroughDDP(ddp, axis), about


class ThroughDDP(Sync):
    """Leaves everything to torch's DistributedDataParallel, which sums in its own backward hooks.

    The library averages over the ranks where the convention here is to add up (step/protocol.py).
    So the gradient is multiplied by the number of ranks where it enters the model, at its output:
    that is the smallest tensor there is to multiply, and the library runs as it always does. (A
    term of the loss that reaches a parameter past the output, such as a weight's norm, is
    averaged.)
    """

    def __init__(self, ddp: DistributedDataParallel, axis: Axis) -> None:
        self.ddp, self.axis = ddp, axis
        ddp.module.register_forward_pre_hook(ModuleHook(self._before), with_kwargs=True)
        ddp.module.register_forward_hook(ModuleHook(self._after))

    def microbatch(self, *, last: bool) -> None:
        self.ddp.require_backward_grad_sync = last  # what its no_sync() does

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ddp_forward_begins(self.ddp, *args, **kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        output = ddp_forward_ends(self.ddp, output)
        scaled: dict[int, Tensor] = {}  # a tensor that is returned twice is one

        def scale(tensor: Tensor) -> Tensor:
            if id(tensor) not in scaled and tensor.requires_grad:
                scaled[id(tensor)] = Times.apply(tensor, self.axis.size)
            return scaled.get(id(tensor), tensor)

        # Each gets a node of its own, so that one which depends on another is not scaled with it.
        output = tree_map_only(Tensor, scale, output)
        ours = {id(tensor) for tensor in scaled.values()}
        if any(t.requires_grad and id(t) not in ours for t in tensors_in(output)):
            raise UserError(
                f"the model returns a {type(output).__name__}, into which torch's pytree does not "
                "look; register it there, or return a tuple or a dict"
            )
        return output


class Times(torch.autograd.Function):
    """The identity, with a gradient that is so many times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        return dy[0] * ctx.factor, None
