"""The global gradient norm, and gradient clipping by it, in every layout.

|dW|^2 = sum over parameters and shards        copies count once, shards are added up
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.layout.gather import Layouts, axis_of_parts
from dist_lab.layout.layout import is_counted
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.torch_private import multiply_all


def global_norm(gradients: Mapping[str, Tensor | None], layouts: Layouts, mesh: Mesh) -> Tensor:
    """The 2-norm of the gradient of the full model, as a 0-dim tensor, equal on every rank.

    Copies count once. Shards are added up over the axes that split them. A tensor that is OnlyOn
    some positions counts at the first one. Gradients must be complete; a missing one counts as 0.
    """
    squares: dict[tuple[Axis, ...], list[Tensor]] = {}
    for name, layout in layouts.items():  # one order on all ranks, so collectives match
        axes = dict.fromkeys(axis_of_parts(mesh, axis, how) for axis, how in layout.splits)
        group = squares.setdefault(tuple(axes), [])
        gradient = gradients.get(name)
        if gradient is not None and is_counted(layout, mesh.coordinates):
            group.append(torch.linalg.vector_norm(gradient).double().square())
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for sharding_axes, parts in squares.items():
        local = torch.stack(parts).sum() if parts else torch.zeros_like(total)
        for axis in sharding_axes:
            local = ops.all_reduce(local, axis)
        total = total + local
    return total.sqrt()


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    torch's rule, to the last digit: factor = min(1, max_norm / (norm + 1e-6)).
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        multiply_all(gradients, factor)
