"""Torch's DistributedDataParallel without its wrapper: the user goes on calling the model itself.

A wrapper is a new module around the model, so every parameter gets a longer name. Here hooks on the
model do what the wrapper's forward does before and after it calls the model. So names, units and
the user's code are the same under every impl, and the library's collectives run as they always do.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.step.protocol import Applied, Chain, Sync
from dist_lab.step.setup import Setup
from dist_lab.torch_private import ddp_forward_begins, ddp_forward_ends, tree_map_only


def apply_ddp(setup: Setup, *, bucket_mb: float, find_unused: bool) -> Applied:
    """Hand the model to DistributedDataParallel, in its fastest documented configuration.

    Gradients are views into its buckets. It does not broadcast buffers, which would overwrite each
    rank's statistics by rank 0's; nor weights, which parallelize() has made equal already.

    In a pipeline each stage is handed to it. The library's schedule calls the wrappers, and tells
    them which backward of a stage is the last.
    """
    layouts = setup.owing_sums(setup.axis)
    if setup.axis.size == 1:
        return Applied(layouts, Chain())
    wrap = partial(
        DistributedDataParallel,
        process_group=setup.axis.group,
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
    stages = setup.stages
    if stages is None:
        return Applied(layouts, ThroughDDP(wrap(setup.model), setup.axis), about)
    if last := stages.modules.get(stages.count - 1):
        scale = partial(scale_gradients, setup.axis.size)
        last.register_forward_hook(ModuleHook(lambda module, args, output: scale(output)))
    wrapped = {
        stage: wrap(module) if any(p.requires_grad for p in module.parameters()) else module
        for stage, module in stages.modules.items()
    }
    about = about.replace("Parallel(", "Parallel of each stage(")
    return Applied(layouts, Chain(), about, stages=replace(stages, modules=wrapped))


class ThroughDDP(Sync):
    """Leaves gradients to torch's DistributedDataParallel, which sums them in its backward hooks.

    The library averages over the ranks, and our convention is to sum (step/protocol.py). So the
    gradient is multiplied by the number of ranks where it enters the model, at the model's output:
    a small tensor, and the library needs no change. A term of the loss that does not go through the
    output, such as a weight's norm, is still averaged.
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
        return scale_gradients(self.axis.size, ddp_forward_ends(self.ddp, output))


def scale_gradients(factor: int, output: Any) -> Any:
    """Return the same output, whose gradient is multiplied by a factor on its way back."""
    scaled: dict[int, Tensor] = {}  # by id, because a tensor may be returned twice

    def scale(tensor: Tensor) -> Tensor:
        if id(tensor) not in scaled and tensor.requires_grad:
            scaled[id(tensor)] = ScaleGrad.apply(tensor, factor)
        return scaled.get(id(tensor), tensor)

    # Each output gets its own node, so an output that depends on another is scaled only once.
    output = tree_map_only(Tensor, scale, output)
    scaled_ids = {id(tensor) for tensor in scaled.values()}
    if any(t.requires_grad and id(t) not in scaled_ids for t in tensors_in(output)):
        raise UserError(
            f"the model returns a {type(output).__name__}, and torch's pytree does not look "
            "into it; register it there, or return a tuple or a dict"
        )
    return output


class ScaleGrad(torch.autograd.Function):
    """The identity, whose backward multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        return dy[0] * ctx.factor, None
