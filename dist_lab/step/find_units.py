"""Finds the modules that a user names as units: by class, by the name of a class, or by name."""

from collections.abc import Iterable

from torch import nn

from dist_lab.errors import UserError


def find_units(model: nn.Module, units: Iterable[type[nn.Module] | str]) -> dict[str, nn.Module]:
    """Return the units by module name. Raise UserError on an entry that matches no module."""
    units_by_name: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    # nn.MultiheadAttention reads the weights of its out_proj directly, and never calls it.
    never_called = {m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    for unit in units:
        if isinstance(unit, str) and modules.get(unit) in never_called:
            raise UserError(
                f"unit {unit} is never called, as nn.MultiheadAttention uses its weights directly; "
                f"give {unit.removesuffix('.out_proj')}"
            )
        matches = {
            name: module
            for name, module in modules.items()
            if name
            and (
                unit in (name, type(module).__name__)
                if isinstance(unit, str)
                else isinstance(module, unit)
            )
            and module not in never_called
        }
        if not matches:
            label = unit if isinstance(unit, str) else unit.__name__
            classes = sorted({type(module).__name__ for module in modules.values()})
            raise UserError(f"unit {label} matches no module; classes here: {', '.join(classes)}")
        units_by_name |= matches
    return units_by_name
