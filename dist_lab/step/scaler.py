"""Loss scaling, whose decisions all ranks take together.

float16 loses small gradients: a GradScaler multiplies the loss by a large number, divides the
gradients by it before the step, and leaves the step out if one of them is not finite. Where ranks
hold different parts of the gradients, each would decide for itself: one steps, another does not,
and their scales part. So what one rank has found, the largest over all ranks decides.

`Scaler` is torch's GradScaler with that. torch's own, handed an optimizer that `decides_together`,
leaves the decision to the optimizer's `step`, as it does for all that `_step_supports_amp_scaling`,
and so is right, too. Without a scaler nothing is sent.
"""

import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.torch_private import found_infs, set_scaled_step

Found = dict[torch.device, Tensor]


class Scaler(torch.amp.GradScaler):
    """torch's GradScaler, with one decision for all ranks of an axis, whatever the optimizer."""

    def __init__(self, world: Axis, **options: Any) -> None:
        super().__init__(**{"device": world.device.type, **options})
        self.world = world

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow: bool
    ) -> Found:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow)
        found.setdefault(found_inf.device, found_inf)  # a rank without a gradient
        return agree(found, self.world)


def agree(found: Found, world: Axis) -> Found:
    """In place: whether any rank has found a gradient that is not finite. Collective."""
    with world.comm.label("scaler"):
        here = torch.stack([each.to(world.device) for each in found.values()]).amax()
        anywhere = ops.all_reduce(here, world, "max")
    for each in found.values():
        each.copy_(anywhere)
    return found


def decide_together(optimizer: torch.optim.Optimizer, world: Axis) -> None:
    """Let any GradScaler that is handed this optimizer leave out its step on all ranks or none."""
    plain, known = type(optimizer).step, weakref.ref(optimizer)  # no circle: it goes when unused

    def step(_: Any, *args: Any, grad_scaler: Any = None, **kwargs: Any) -> Any:
        optimizer = known()
        assert optimizer is not None, "called by way of the optimizer"
        if grad_scaler is None:
            return plain(optimizer, *args, **kwargs)
        found = found_infs(grad_scaler, optimizer)
        if not isinstance(grad_scaler, Scaler):
            agree(found, world)
        return None if any(map(bool, found.values())) else plain(optimizer, *args, **kwargs)

    # torch warns that it will hand its scaler over in another way; pyproject.toml pins the version.
    set_scaled_step(optimizer, MethodType(step, weakref.proxy(optimizer)))
