"""Removes the layers and tensors of other ranks' stages from a model, without changing a name."""

from collections.abc import Iterable
from typing import NoReturn

from torch import nn

from dist_lab.errors import UserError


class MissingLayer(nn.Module):
    """Stands in for a layer of another rank's stage."""

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        raise UserError("this layer is on another stage; under pp call job.run or job.evaluate")


def contents(model: nn.Module, names: Iterable[str]) -> tuple[list[nn.Module], set[int]]:
    """The modules with these names, and the ids of their tensors and of tensors so named."""
    all_modules = dict(model.named_modules(remove_duplicate=False))
    all_tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    modules = [all_modules[name] for name in names if name in all_modules]
    tensors = [all_tensors[name] for name in names if name in all_tensors]
    for module in modules:
        tensors += [*module.parameters(), *module.buffers()]
    return modules, {id(tensor) for tensor in tensors}


def remove_others(module: nn.Module, modules: set[nn.Module], tensors: set[int]) -> None:
    """Replace modules not in `modules` by MissingLayer, tensors not in `tensors` (ids) by None.

    We compare objects, not names, because a module or tensor may have several names.
    """
    for name, child in module._modules.items():
        if child is None or child in modules:
            continue
        state = (*child.parameters(), *child.buffers())
        if any(m in modules for m in child.modules()) or any(id(t) in tensors for t in state):
            remove_others(child, modules, tensors)
        else:
            module._modules[name] = MissingLayer()
    for registered in (module._parameters, module._buffers):
        for name, tensor in registered.items():
            if id(tensor) not in tensors:
                registered[name] = None
