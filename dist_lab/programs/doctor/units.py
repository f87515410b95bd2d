"""What of a model would make good units of fsdp."""

from statistics import mean

from torch import nn


def repeated_class(model: nn.Module) -> tuple[str, dict[str, nn.Module]] | None:
    """The class whose modules would be good units, and those modules by name; None: there is none.

    They hold at least half of the model, none of them more than half; the largest such.
    """
    total = bytes_of(model)
    by_class: dict[type[nn.Module], dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            found = by_class.setdefault(type(module), {})
            if not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
    good = {
        kind: found
        for kind, found in by_class.items()
        if len(found) > 1
        and sum(map(bytes_of, found.values())) >= total / 2
        and max(map(bytes_of, found.values())) <= total / 2
    }
    if not total or not good:
        return None
    kind = max(good, key=lambda kind: mean(map(bytes_of, good[kind].values())))
    return kind.__name__, good[kind]


def bytes_of(module: nn.Module) -> int:
    """Of all parameters in a module."""
    return sum(p.nbytes for p in module.parameters())
