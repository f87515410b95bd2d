"""Guess a tp plan for a model without one: pairs of Linear layers, colwise then rowwise.

The two layers of a pair follow each other in one parent, the second's in_features equal the first's
out_features, and no module with weights lies between them. We cannot see whether the modules
between them work on a shard of their input. So the plan is a guess, and we show it only once it has
been tried.
"""

import json
import re

from torch import nn

from dist_lab.parallel.tensor.auto_plan import with_globs


def plan_of_pairs(model: nn.Module) -> dict[str, str]:
    """Maps the name of each paired Linear to colwise or rowwise."""
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


def drop_refused_pair(plan: dict[str, str], refusal: str) -> dict[str, str]:
    """The plan without the pair of the first layer that a refusal names; empty if it names none.

    >>> plan = {"up": "colwise", "down": "rowwise", "a.in": "colwise", "a.out": "rowwise"}
    >>> drop_refused_pair(plan, "Mlp (a) gives other outputs, with a.out as rowwise: ...")
    {'up': 'colwise', 'down': 'rowwise'}
    """
    names = list(plan)
    named = next((word for word in re.findall(r"\w+(?:\.\w+)*", refusal) if word in plan), None)
    if named is None:
        return {}
    start = names.index(named) // 2 * 2
    return {name: plan[name] for i, name in enumerate(names) if i not in (start, start + 1)}


def plan_text(model: nn.Module, plan: dict[str, str]) -> str:
    """The plan as text. One glob stands for the same layer of all blocks, where that is exact.

    >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
    >>> plan_text(blocks, plan_of_pairs(blocks))
    '{"*.0": "colwise", "*.1": "rowwise"}'
    """
    return json.dumps(with_globs(model, plan))
