"""Where a plan comes from: the caller, the model itself, or the names and shapes of its layers."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.tensor.auto_plan import NoPlan, auto_plan
from dist_lab.parallel.tensor.plan import Plan, Planned, Role, read_plan


@runtime_checkable
class HasPlan(Protocol):
    def tp_plan(self) -> dict[str, Role]: ...


def plan_of(
    model: nn.Module, plan: Plan | str | None, axis: Axis, *, sequence_parallel: bool
) -> Plan:
    """The plan to use.

    Args:
        plan: the caller's; None: the model's own, `tp_plan()`; "auto": the model's own, or the one
            that auto_plan finds.

    Raises:
        NoPlan: there is none.
    """
    if isinstance(plan, str) and plan != "auto":
        raise UserError(f'plan cannot be {plan!r}; give plan="auto" or plan={{"up": "colwise"}}')
    if plan is not None and not isinstance(plan, str):
        return plan
    if isinstance(model, HasPlan) and callable(model.tp_plan):
        return model.tp_plan()
    if plan is None:
        raise NoPlan(
            f"{type(model).__name__} has no tp_plan(), which says how to split it; give "
            'plan="auto", or plan={"up": "colwise", "down": "rowwise", ...}'
        )
    if sequence_parallel:
        raise NoPlan(
            'plan="auto" does not know which modules can read a shard of the sequence; leave out '
            "sequence_parallel, or give plan={...} with them"
        )
    return auto_plan(model, axis.size)


def refuse_sharded_inputs(model: nn.Module, plan: Plan | str | None, axis: Axis) -> None:
    """Raise UserError if a sequence-parallel model reads shards of the sequence: then no copy of
    the whole model can show which positions a shard has, as exact dropout must know.
    """
    planned = read_plan(model, plan_of(model, plan, axis, sequence_parallel=True))
    if axis.size > 1 and not takes_whole_sequence(model, planned):
        raise UserError(
            f"{type(model).__name__} reads a shard of the sequence on each rank of {axis.name}, so "
            "its dropout does not know which positions these are; let it read the whole sequence "
            "(plan 'scatter_output' or 'vocabulary' for its first layer), or set p=0"
        )


def is_tested(model: nn.Module, plan: Plan | str | None) -> bool:
    """Whether the plan is that of a zoo model, which our own tests cover."""
    return plan is None and type(model).__module__.startswith("dist_lab.zoo.")


def takes_whole_sequence(model: nn.Module, plan: Mapping[str, Planned]) -> bool:
    """Whether a sequence-parallel model reads the whole sequence, and shards it itself."""
    return any(
        planned.role == "scatter_output"
        or (planned.role == "vocabulary" and isinstance(model.get_submodule(name), nn.Embedding))
        for name, planned in plan.items()
    )
