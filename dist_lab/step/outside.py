"""Refuses computing with a parameter outside of its unit's forward, where it is only a shard."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, refuse_copy

IsOpen = Callable[[str], bool]  # name of a unit -> whether it is unsharded


def refuse_outside(model: nn.Module, units: Mapping[str, nn.Module], is_open: IsOpen) -> None:
    """Hook each module with parameters: raise UserError unless its innermost unit is open."""
    modules_in = {name: set(module.modules()) for name, module in units.items()}
    for name, module in model.named_modules():
        if any(p is not None for p in module._parameters.values()):
            enclosing = [unit for unit in units if module in modules_in[unit]]
            unit_modules = {units[unit] for unit in enclosing}
            innermost = [
                unit for unit in enclosing if modules_in[unit] & unit_modules == {units[unit]}
            ]
            check = partial(_refuse_outside, name, innermost, is_open)
            in_a_copy = partial(refuse_copy, type(module).__name__)
            module.register_forward_pre_hook(ModuleHook(check, in_a_copy), prepend=True)


def _refuse_outside(
    name: str, innermost: Sequence[str], is_open: IsOpen, module: nn.Module, args: Any
) -> None:
    if not any(is_open(unit) for unit in innermost):
        raise UserError(
            f"{name} was called by itself and holds only this rank's shards of its parameters; "
            f"call the model, or parallelize it with units=[{name!r}]"
        )


def refuse_gradients(shards: Mapping[str, nn.Parameter]) -> list[Node]:
    """Raise UserError if backward reaches a shard. The caller must keep the returned nodes."""
    nodes = []
    for name, shard in shards.items():
        if shard.requires_grad:
            nodes.append(node := get_gradient_edge(shard).node)
            node.register_prehook(partial(_refuse_gradient, name))
    return nodes


def _refuse_gradient(name: str, gradients: tuple[Tensor, ...]) -> None:
    raise UserError(
        f"{name} was used outside of its unit, where it is only this rank's shard: its gradient "
        "would be lost; use it in the forward of the module that holds it"
    )
