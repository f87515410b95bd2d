"""Where a model holds its parameters, and how one is put in the place of another."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_lab.errors import UserError

ParamSlot = tuple[nn.Module, str]  # a module, and the name under which it holds a parameter


def param_slots(model: nn.Module) -> dict[str, list[ParamSlot]]:
    """Every parameter's slots, by the first of its names; a tied parameter has several.

    Raises:
        UserError: a recurrent layer, which keeps its weights where nothing can be put before them.
    """
    name_of = {p: name for name, p in model.named_parameters()}
    slots: dict[str, list[ParamSlot]] = {name: [] for name in name_of.values()}
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(f"{path} is recurrent and holds its weights twice: it cannot be split")
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                slots[name_of[parameter]].append((module, attribute))
    return slots


def set_param(slots: Sequence[ParamSlot], tensor: Tensor) -> nn.Parameter:
    """Make the tensor the parameter in these slots, trained as the one before."""
    before = parameter_at(slots)
    parameter = nn.Parameter(tensor, before.requires_grad)
    parameter.__dict__.update(before.__dict__)  # what a user has written on it
    for module, attribute in slots:
        module._parameters[attribute] = parameter
    return parameter


def parameter_at(slots: Sequence[ParamSlot]) -> nn.Parameter:
    """The parameter in these slots."""
    module, attribute = slots[0]
    parameter = module._parameters[attribute]
    assert parameter is not None, attribute
    return parameter


def owners(slots: Mapping[str, list[ParamSlot]], units: Mapping[str, nn.Module]) -> dict[str, str]:
    """The unit of each parameter: the innermost that contains all its slots.

    So a parameter that is tied across units belongs to what contains them all, in the end to the
    model itself, the unit "", and is unsharded as long as any of them may need it.
    """
    within = {name: set(module.modules()) for name, module in units.items()}
    owner = {}
    for name, own in slots.items():
        around = [u for u, modules in within.items() if all(module in modules for module, _ in own)]
        owner[name] = min(around, key=lambda unit: len(within[unit]))
    return owner
