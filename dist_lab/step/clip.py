"""The global gradient norm, and gradient clipping by it, in every layout.

|dW|^2 = sum over parameters and shards        copies count once, shards are added up
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.layout.gather import Layouts, axis_of_parts
from dist_lab.layout.layout import is_counted
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.torch_private import multiply_all

Gradients = Mapping[str, Tensor | None]  # name -> this rank's part of the gradient


def global_norm(gradients: Gradients, layouts: Layouts, mesh: Mesh) -> Tensor:
    """The 2-norm of the gradient of the full model, as a 0-dim tensor, equal on every rank.

    Gradients must be complete; a missing one counts as 0.
    """
    zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
    return sum_over_model(_square, zero, gradients, layouts, mesh).sqrt()


def _square(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient).double().square()


def sum_over_model(
    measure: Callable[[Tensor], Tensor], zero: Tensor, gradients: Gradients, layouts: Layouts,
    mesh: Mesh,
) -> Tensor:  # fmt: skip
    """The sum of measure(gradient) over the parameters of the full model, equal on every rank.

    Copies count once. Shards are added up over the axes that split them. A tensor that is OnlyOn
    some positions counts at the first one. `zero` has the shape and dtype of what is measured.
    """
    measures: dict[tuple[Axis, ...], list[Tensor]] = {}
    for name, layout in layouts.items():  # one order on all ranks, so collectives match
        axes = dict.fromkeys(axis_of_parts(mesh, axis, how) for axis, how in layout.splits)
        group = measures.setdefault(tuple(axes), [])
        gradient = gradients.get(name)
        if gradient is not None and is_counted(layout, mesh.coordinates):
            group.append(measure(gradient))
    total = zero
    for sharding_axes, parts in measures.items():
        local = torch.stack(parts).sum(0) if parts else torch.zeros_like(zero)
        for axis in sharding_axes:
            local = ops.all_reduce(local, axis)
        total = total + local
    return total


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    torch's rule, to the last digit: factor = min(1, max_norm / (norm + 1e-6)).
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        multiply_all(gradients, factor)
