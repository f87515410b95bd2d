"""Find modules of a model that would make good fsdp units."""

from statistics import mean

from torch import nn


def repeated_class(model: nn.Module) -> tuple[str, dict[str, nn.Module]] | None:
    """The best class of units and its modules by name; None if there is none.

    Its modules together hold at least half of the model's bytes, and none of them more than half.
    Of several such classes, the one with the largest modules.
    """
    total = bytes_of(model)
    by_class: dict[type[nn.Module], dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            same_class = by_class.setdefault(type(module), {})
            if not any(name.startswith(f"{outer}.") for outer in same_class):
                same_class[name] = module
    candidates = {
        kind: same_class
        for kind, same_class in by_class.items()
        if len(same_class) > 1
        and sum(map(bytes_of, same_class.values())) >= total / 2
        and max(map(bytes_of, same_class.values())) <= total / 2
    }
    if not total or not candidates:
        return None
    kind = max(candidates, key=lambda kind: mean(map(bytes_of, candidates[kind].values())))
    return kind.__name__, candidates[kind]


def bytes_of(module: nn.Module) -> int:
    """The bytes of all parameters in a module."""
    return sum(p.nbytes for p in module.parameters())
