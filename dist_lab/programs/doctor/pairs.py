"""A plan of tp for a model that brings none: pairs of Linear layers, split by column and by row.

A pair are two that follow each other in one parent, the second as wide as the first puts out, with
nothing that has weights between them. Whether what lies between works on a part alone cannot be
read; the plan is a guess, and is shown to nobody before it has been tried.
"""

import json
import re

from torch import nn


def plan_of_pairs(model: nn.Module) -> dict[str, str]:
    """Linear -> column or row."""
    plan: dict[str, str] = {}
    for path, parent in model.named_modules():
        first = ""
        for name, child in parent.named_children():
            full = f"{path}.{name}" if path else name
            if isinstance(child, nn.Linear):
                before = model.get_submodule(first) if first else None
                if isinstance(before, nn.Linear) and before.out_features == child.in_features:
                    plan |= {first: "colwise", full: "rowwise"}
                    first = ""
                else:
                    first = full
            elif any(True for _ in child.parameters()):
                first = ""
    return plan


def without(plan: dict[str, str], refusal: str) -> dict[str, str]:
    """The plan but for the pair of which a refusal speaks."""
    named = re.match(r"(\S+) is (colwise|rowwise)", refusal)
    places = list(plan)
    if not named or named[1] not in places:
        return {}
    start = places.index(named[1]) // 2 * 2
    return {name: plan[name] for i, name in enumerate(places) if i not in (start, start + 1)}


def written(model: nn.Module, plan: dict[str, str]) -> str:
    """The plan as a person writes it, blocks that are alike by one glob.

    >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
    >>> written(blocks, plan_of_pairs(blocks))
    '{"*.0": "colwise", "*.1": "rowwise"}'
    """
    modules = [name for name, _ in model.named_modules()]
    short: dict[str, str] = {}
    for name, role in plan.items():
        glob = re.sub(r"(?<![^.])\d+(?=\.)", "*", name)
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        alike = [other for other in modules if pattern.fullmatch(other)]
        same = all(plan.get(other) == role for other in alike)
        short[glob if same else name] = role
    return json.dumps(short)
