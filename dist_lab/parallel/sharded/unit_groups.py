"""Which groups of parameters are unsharded while a unit runs."""

from collections.abc import Mapping, Sequence

from torch import nn

from dist_lab.parallel.sharded.param_group import ParamGroup


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
