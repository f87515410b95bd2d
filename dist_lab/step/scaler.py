"""Loss scaling that skips a step on all ranks or on none.

float16 loses small gradients. So a GradScaler multiplies the loss by a large number, divides the
gradients by it before the step, and skips the step if one of them is not finite. If ranks hold
different shards of the gradients, one rank might step and another skip, and then their scales would
differ. So the ranks all-reduce `found_inf` with max.

`Scaler` is torch's GradScaler with this all-reduce. torch's own GradScaler is correct as well, if
`decide_together` has changed the optimizer. It then lets the optimizer's `step` decide, as for any
optimizer with `_step_supports_amp_scaling`. Without a scaler nothing is sent.
"""

import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.torch_private import found_infs, set_scaled_step

FoundInf = dict[torch.device, Tensor]


class Scaler(torch.amp.GradScaler):
    """torch's GradScaler, with one decision for all ranks of an axis, for any optimizer."""

    def __init__(self, world: Axis, **options: Any) -> None:
        super().__init__(**{"device": world.device.type, **options})
        self.world = world

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow: bool
    ) -> FoundInf:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow)
        found.setdefault(found_inf.device, found_inf)  # this rank has no gradients
        return share_found(found, self.world)


def share_found(found: FoundInf, world: Axis) -> FoundInf:
    """Set each flag in place to 1 if any rank has found NaN or infinity. Collective."""
    with world.comm.label("scaler"):
        local = torch.stack([flag.to(world.device) for flag in found.values()]).amax()
        on_any_rank = ops.all_reduce(local, world, "max")
    for flag in found.values():
        flag.copy_(on_any_rank)
    return found


def decide_together(optimizer: torch.optim.Optimizer, world: Axis) -> None:
    """Make any GradScaler skip this optimizer's step on all ranks or on none."""
    # A weak reference, so that there is no cycle and the optimizer is freed when it is unused.
    plain_step, optimizer_ref = type(optimizer).step, weakref.ref(optimizer)

    def step(_: Any, *args: Any, grad_scaler: Any = None, **kwargs: Any) -> Any:
        optimizer = optimizer_ref()
        assert optimizer is not None, "step() is a method of the optimizer"
        if grad_scaler is None:
            return plain_step(optimizer, *args, **kwargs)
        found = found_infs(grad_scaler, optimizer)
        if not isinstance(grad_scaler, Scaler):
            share_found(found, world)
        return None if any(map(bool, found.values())) else plain_step(optimizer, *args, **kwargs)

    # torch warns that the way it passes its scaler will change; pyproject.toml pins torch.
    set_scaled_step(optimizer, MethodType(step, weakref.proxy(optimizer)))
