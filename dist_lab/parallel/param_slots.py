"""Where a model holds its parameters, and how a parameter gets other memory."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.step.protocol import ROOT
from dist_lab.torch_private import move_hooks

ParamSlot = tuple[nn.Module, str]  # a module, and the name under which it holds a parameter


def param_slots(model: nn.Module, *others: nn.Module) -> dict[str, list[ParamSlot]]:
    """Name -> the parameter's slots. A tied parameter has several; the first name counts.

    Args:
        others: modules outside the model that hold its parameters too, such as pipeline stages.
    """
    name_of = {p: name for name, p in model.named_parameters()}
    slots: dict[str, list[ParamSlot]] = {name: [] for name in name_of.values()}
    for module in dict.fromkeys(m for root in (model, *others) for m in root.modules()):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                slots[name_of[parameter]].append((module, attribute))
    return slots


def refuse_recurrent(model: nn.Module) -> None:
    """Raise UserError for a recurrent layer: it computes with weights that are not in its slots."""
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(
                f"{path} is recurrent and holds its weights twice, so fsdp cannot shard it: give "
                "ddp, zero1 or zero2"
            )


def set_param(slots: Sequence[ParamSlot], tensor: Tensor) -> nn.Parameter:
    """Give the parameter in these slots the memory, shape and dtype of a tensor.

    It stays the same object, and keeps the user's attributes and hooks. A parameter on the meta
    device cannot: it is replaced, and its attributes and hooks move to the new one.
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
    """Whether `functional_call` has put another tensor into these slots for a forward."""
    tensors = [module._parameters.get(attribute) for module, attribute in slots]
    return any(tensor is not None and not isinstance(tensor, nn.Parameter) for tensor in tensors)


def check_in_memory(
    name: str, slots: list[ParamSlot], parameter: nn.Parameter, memory: Tensor
) -> None:
    """Raise UserError if these slots hold another parameter, or this one is not in `memory`."""
    if is_substituted(slots):
        raise UserError(
            f"functional_call puts another tensor in the place of {name}, which is sharded; use "
            "job.shadow for an average, job.load_full_state_dict for other weights, or dp, ddp or "
            "zero2 for weights that are computed"
        )
    tensors = [module._parameters.get(attribute) for module, attribute in slots]
    current = next((tensor for tensor in tensors if tensor is not parameter), parameter)
    inside = parameter.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    if current is not parameter or parameter.dtype != memory.dtype or not inside:
        raise UserError(
            f"{name} was moved, cast or replaced after parallelize() (it was "
            f"{describe(memory)}, it is {describe(current)}); do that before, and load values by "
            "job.load_full_state_dict()"
        )


def describe(tensor: Tensor | None) -> str:
    """The dtype and device of a tensor, for an error message."""
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def sync_requires_grad(one: Tensor, other: Tensor, trained: bool) -> bool:
    """Freeze or unfreeze both tensors of a parameter, if the user has done so with one of them.

    Args:
        trained: `requires_grad` of both at the last call, so the tensor that differs was changed.

    Returns:
        `requires_grad` of both now.
    """
    if one.requires_grad != other.requires_grad:
        one.requires_grad_(not trained)
        other.requires_grad_(not trained)
    return one.requires_grad


def owners(slots: Mapping[str, list[ParamSlot]], units: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of a parameter -> its unit: the innermost that contains all its slots.

    If several units that are not nested use the parameter, because it is tied across them or is in
    a module that they share, it belongs to the innermost unit around them all, in the end to the
    model itself, the unit "". So it stays unsharded as long as any of them may need it.
    """
    within = {name: set(module.modules()) for name, module in units.items()}
    within[ROOT] = set().union(*within.values())  # also what pipeline stages hold themselves
    owner = {}
    for name, places in slots.items():
        users = [m for m in within.values() if any(module in m for module, _ in places)]
        candidates = [
            unit
            for unit, modules in within.items()
            if all(module in modules for module, _ in places)
            and all(modules <= other or other <= modules for other in users)
        ]
        owner[name] = min(candidates, key=lambda unit: len(within[unit]))
    return owner
