"""Where a model holds its parameters, and how one is put in the place of another."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.torch_private import move_hooks

ParamSlot = tuple[nn.Module, str]  # a module, and the name under which it holds a parameter


def param_slots(model: nn.Module) -> dict[str, list[ParamSlot]]:
    """Every parameter's slots, by the first of its names; a tied parameter has several."""
    name_of = {p: name for name, p in model.named_parameters()}
    slots: dict[str, list[ParamSlot]] = {name: [] for name in name_of.values()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                slots[name_of[parameter]].append((module, attribute))
    return slots


def refuse_recurrent(model: nn.Module) -> None:
    """Raise UserError for a recurrent layer, which holds its weights where nothing is put before
    them.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(f"{path} is recurrent and holds its weights twice: it cannot be split")


def set_param(slots: Sequence[ParamSlot], tensor: Tensor) -> nn.Parameter:
    """Give the parameter in these slots the memory, shape and dtype of a tensor.

    It stays the same object, with all that a user has written on it or hooked to it. From the meta
    device it cannot be taken along: there it is replaced, and what is on it moves over.
    """
    parameter = parameter_at(slots)
    if parameter.device == tensor.device and parameter.dtype == tensor.dtype:
        parameter.data = tensor.data
        return parameter
    moved = nn.Parameter(tensor, parameter.requires_grad)
    moved.__dict__.update(parameter.__dict__)
    move_hooks(parameter, moved)
    for module, attribute in slots:
        module._parameters[attribute] = moved
    return moved


def parameter_at(slots: Sequence[ParamSlot]) -> nn.Parameter:
    """The parameter in these slots."""
    module, attribute = slots[0]
    parameter = module._parameters.get(attribute)  # not by [], which opens units: see step/reads.py
    assert parameter is not None, attribute
    return parameter


def is_substituted(slots: Sequence[ParamSlot]) -> bool:
    """Whether another tensor stands in these slots for a forward, as functional_call puts it."""
    held = [module._parameters.get(attribute) for module, attribute in slots]
    return any(tensor is not None and not isinstance(tensor, nn.Parameter) for tensor in held)


def check_in_memory(
    name: str, slots: list[ParamSlot], parameter: nn.Parameter, memory: Tensor
) -> None:
    """Raise UserError if these slots hold another parameter, or this one lies elsewhere."""
    if is_substituted(slots):
        raise UserError(
            f"functional_call puts another tensor in the place of {name}, which is sharded; take "
            "job.shadow for an average, job.load_full_state_dict for other weights, or dp, ddp or "
            "zero2 for weights that are computed"
        )
    held = [module._parameters.get(attribute) for module, attribute in slots]
    now = next((tensor for tensor in held if tensor is not parameter), parameter)
    inside = parameter.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    if now is not parameter or parameter.dtype != memory.dtype or not inside:
        raise UserError(
            f"{name} was moved, cast or replaced after parallelize() (it was "
            f"{describe(memory)}, it is {describe(now)}); do that before, and load values by "
            "job.load_full_state_dict()"
        )


def describe(tensor: Tensor | None) -> str:
    """The dtype and device of a tensor, for an error."""
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def sync_requires_grad(one: Tensor, other: Tensor, trained: bool) -> bool:
    """Freeze both tensors of a parameter, or neither, as a user has done with one of them.

    Args:
        trained: whether it was, as far as is known: the tensor that is not so has been changed.

    Returns whether it is trained now.
    """
    if one.requires_grad != other.requires_grad:
        one.requires_grad_(not trained)
        other.requires_grad_(not trained)
    return one.requires_grad


def owners(slots: Mapping[str, list[ParamSlot]], units: Mapping[str, nn.Module]) -> dict[str, str]:
    """The unit of each parameter: the innermost that contains all its slots.

    A parameter that is tied across units, or lies in a module that units which are apart share,
    belongs to what contains them all, in the end to the model itself, the unit "". It is unsharded
    as long as any of them may need it.
    """
    within = {name: set(module.modules()) for name, module in units.items()}
    owner = {}
    for name, own in slots.items():
        touched = [m for m in within.values() if any(module in m for module, _ in own)]
        around = [
            unit
            for unit, modules in within.items()
            if all(module in modules for module, _ in own)
            and all(modules <= other or other <= modules for other in touched)
        ]
        owner[name] = min(around, key=lambda unit: len(within[unit]))
    return owner
