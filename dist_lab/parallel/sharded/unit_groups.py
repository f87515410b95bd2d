"""Which parameters are in one group, and which groups are unsharded while a unit runs."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dist_lab.parallel.param_slots import ParamSlot, owners
from dist_lab.parallel.sharded.param_group import ParamGroup
from dist_lab.step.setup import Setup
from dist_lab.torch_private import StatisticsNorm


def groups_by_unit(
    groups: Sequence[ParamGroup], units: Mapping[str, nn.Module]
) -> dict[str, list[ParamGroup]]:
    """Unit -> the groups to unshard while it runs: its own, and those of enclosing units that hold
    a parameter used inside it.
    """
    within = {name: set(module.modules()) for name, module in units.items()}

    def needs(unit: str, group: ParamGroup) -> bool:
        encloses = units[unit] in within[group.unit]
        is_used = any(module in within[unit] for p in group.params for module, _ in p.slots)
        return group.unit == unit or (encloses and is_used)

    return {unit: [group for group in groups if needs(unit, group)] for unit in units}


def names_by_group(
    setup: Setup, slots: Mapping[str, list[ParamSlot]]
) -> dict[tuple[str, tuple[torch.dtype, torch.dtype], bool], list[str]]:
    """(unit, (dtype of the shards, dtype of compute), whether the all-gather sends codes) -> names
    of the parameters in this group.
    """
    owner = owners(_where_used(setup, slots), setup.units)
    groups: dict[tuple[str, tuple[torch.dtype, torch.dtype], bool], list[str]] = {}
    for name, p in setup.model.named_parameters():
        # A norm with running statistics computes in their dtype: see transforms/precision.py.
        in_norm = any(isinstance(module, StatisticsNorm) for module, _ in slots[name])
        is_cast = p.is_floating_point() and not in_norm
        compute_dtype = (setup.param_dtype or p.dtype) if is_cast else p.dtype
        key = owner[name], (p.dtype, compute_dtype), is_coded(setup, slots[name])
        groups.setdefault(key, []).append(name)
    return groups


def _where_used(
    setup: Setup, slots: Mapping[str, list[ParamSlot]]
) -> Mapping[str, list[ParamSlot]]:
    """The slots that forwards read: in a pipeline those in a stage, if there are any."""
    stages = setup.stages.modules.values() if setup.stages else ()
    read = {module for stage in stages for module in stage.modules()}
    return {n: [s for s in places if s[0] in read] or places for n, places in slots.items()}


def gather_in_codes(groups: Sequence[ParamGroup], setup: Setup) -> None:
    """Let those groups send codes that consist of weights to be coded. Collective."""
    if setup.coded is None or setup.axis.size == 1:
        return
    # Of a weight that tp splits, each rank of tp holds a part. Copies change no maximum.
    range_axis = setup.mesh.channel("fsdp", "tp")
    for group in groups:
        if all(is_coded(setup, param.slots) for param in group.params):
            names = [param.name for param in group.params]
            group.all_gather = setup.coded.all_gather_of(names, range_axis)


def is_coded(setup: Setup, slots: Sequence[ParamSlot]) -> bool:
    """Whether a parameter is a weight that all its readers code.

    Its readers are the layers that hold it. A module that reads the weight of a layer without
    calling it is not known, and is given the numbers of the codes: see quantize/lowp/gather.py.
    """
    layers = setup.coded.layers if setup.coded else frozenset()
    return all(module in layers and attribute == "weight" for module, attribute in slots)
