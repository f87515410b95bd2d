"""Where a plan comes from: the caller, or the model itself."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from dist_lab.errors import UserError
from dist_lab.parallel.tensor.plan import Plan, Planned


class NoPlan(UserError):
    """tp needs a plan, and neither the model nor the caller has one."""


@runtime_checkable
class HasPlan(Protocol):
    def tp_plan(self) -> dict[str, str | tuple[str, int]]: ...


def own_plan(model: nn.Module) -> Plan:
    """The model's own plan, `tp_plan()`. Raises NoPlan if it has none."""
    if not isinstance(model, HasPlan):
        raise NoPlan(
            f"{type(model).__name__} has no tp_plan(), which says how to split it; give "
            'plan={"up": "colwise", "down": "rowwise", ...}'
        )
    return model.tp_plan()


def is_tested(model: nn.Module, plan: Plan | None) -> bool:
    """Whether the plan is that of a zoo model, which our own tests cover."""
    return plan is None and type(model).__module__.startswith("dist_lab.zoo.")


def takes_whole_sequence(model: nn.Module, plan: Mapping[str, Planned]) -> bool:
    """Whether a sequence-parallel model reads the whole sequence, and shards it itself."""
    return any(
        planned.role == "scatter_output"
        or (planned.role == "vocabulary" and isinstance(model.get_submodule(name), nn.Embedding))
        for name, planned in plan.items()
    )
