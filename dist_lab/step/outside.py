"""What is refused outside of units, where a module holds this rank's shards alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, refuse_copy

IsOpen = Callable[[str], bool]  # the unit of this name


def refuse_outside(model: nn.Module, units: Mapping[str, nn.Module], is_open: IsOpen) -> None:
    """See that whatever computes with parameters lies in a unit that is open, the innermost."""
    inside = {name: set(module.modules()) for name, module in units.items()}
    for name, module in model.named_modules():
        if any(p is not None for p in module._parameters.values()):
            around = [unit for unit in units if module in inside[unit]]
            known = {units[unit] for unit in around}
            innermost = [unit for unit in around if inside[unit] & known == {units[unit]}]
            check = partial(_refuse_outside, name, innermost, is_open)
            in_a_copy = partial(refuse_copy, type(module).__name__)
            module.register_forward_pre_hook(ModuleHook(check, in_a_copy), prepend=True)


def _refuse_outside(
    name: str, around: Sequence[str], is_open: IsOpen, module: nn.Module, args: Any
) -> None:
    if not any(is_open(unit) for unit in around):
        raise UserError(
            f"{name} was called by itself, and holds this rank's part of its parameters; call the "
            f"model, or parallelize it with units=[{name!r}]"
        )


def refuse_gradients(shards: Mapping[str, nn.Parameter]) -> list[Node]:
    """See that no backward adds to a shard itself. Returns what is to be kept alive for it."""
    nodes = []
    for name, shard in shards.items():
        if shard.requires_grad:
            nodes.append(node := get_gradient_edge(shard).node)
            node.register_prehook(partial(_refuse_gradient, name))
    return nodes


def _refuse_gradient(name: str, gradients: tuple[Tensor, ...]) -> None:
    raise UserError(
        f"{name} was used outside of its unit, where it is this rank's part alone: the gradient "
        "would be lost; use it in the forward of what holds it"
    )
