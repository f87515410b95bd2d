"""The plan of tensor parallelism, read and checked: see [Note: the plan] in tp.py.

First what each module is to do, then where its parameters lie for that.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import nn

from dist_lab.errors import UserError, nearest_degree
from dist_lab.layout.layout import Layout, Owed, Shard
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import ParamSlot, param_slots
from dist_lab.step.protocol import Setup

Role = str | tuple[str, int]
Plan = Mapping[str, Role]

SPLIT = {  # role -> what it can split
    "colwise": nn.Linear,
    "colwise_grouped": nn.Linear,
    "colwise_gather_output": nn.Linear,
    "rowwise": nn.Linear,
    "vocabulary": nn.Linear | nn.Embedding,
}
NOT_SPLIT = ("replicate", "sequence", "scatter_output", "gather_input")
IN_BLOCKS = ("colwise", "colwise_grouped")
OLD_NAMES = {  # still accepted
    "column": "colwise",
    "row": "rowwise",
    "grouped": "colwise_grouped",
    "gathered": "colwise_gather_output",
    "cut": "scatter_output",
    "joined": "gather_input",
    "whole": "replicate",
}


@runtime_checkable
class BringsItsPlan(Protocol):
    def tp_plan(self) -> dict[str, str | tuple[str, int]]: ...


@dataclass(frozen=True)
class Planned:
    """What is to be done with one module; `block` outputs stay together."""

    role: str
    block: int = 1


def arrange(
    setup: Setup, plan: Plan | None, *, cut: bool
) -> tuple[dict[str, Planned], dict[str, list[ParamSlot]], dict[str, Layout]]:
    """Read the plan: the role of each named module, the places and the layout of each parameter.

    Args:
        plan: None: the model's own.
        cut: along the sequence.

    Raises:
        UserError: no plan, or one that does not fit.
    """
    model = setup.model
    named, found = read_plan(model, own_plan(model) if plan is None else plan), param_slots(model)
    layouts = lay_out(setup, named, found, cut=cut)
    if cut:
        check_all_named(model, named, found)
    return named, found, layouts


def own_plan(model: nn.Module) -> Plan:
    """Raises UserError if the model brings none."""
    if not isinstance(model, BringsItsPlan):
        raise UserError(
            f"{type(model).__name__} has no tp_plan(), which says what of it is split; give "
            'plan={"up": "colwise", "down": "rowwise", ...}'
        )
    return model.tp_plan()


def is_tested(model: nn.Module, plan: Plan | None) -> bool:
    """Whether the plan is one that a model of the zoo brings, which our own tests have tried."""
    return plan is None and type(model).__module__.startswith("dist_lab.zoo.")


def takes_whole(model: nn.Module, plan: Mapping[str, Planned]) -> bool:
    """Whether, under sequence parallelism, the model is given whole sequences and cuts them."""
    return any(
        planned.role == "scatter_output"
        or (planned.role == "vocabulary" and isinstance(model.get_submodule(name), nn.Embedding))
        for name, planned in plan.items()
    )


def read_plan(model: nn.Module, plan: Plan) -> dict[str, Planned]:
    """Module name -> what is planned for it.

    Raises:
        UserError: a name that matches nothing, a role there is not, or one that a module cannot
            have, two roles for one module, or for a module and for one inside it.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, Planned] = {}
    said: dict[str, str] = {}
    for glob, role in plan.items():
        planned = _read(glob, role)
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        matched = [name for name in modules if pattern.fullmatch(name)]
        if not matched:
            raise UserError(
                f"the plan's {glob} matches no module; there are {', '.join(list(modules)[:12])}"
                + (", ..." if len(modules) > 12 else "")
            )
        for name in matched:
            if name in found and found[name] != planned:
                raise UserError(f"the plan gives {name} two roles, by {said[name]} and by {glob}")
            found[name], said[name] = planned, glob
            _check_kind(name, modules[name], planned)
    for name in found:
        around = next((outer for outer in _around(name) if outer in found), None)
        if around:
            raise UserError(f"the plan names {name}, and {around} around it; name one of them")
    return found


def check_all_named(
    model: nn.Module, plan: Mapping[str, Planned], found: Mapping[str, list[ParamSlot]]
) -> None:
    """Check that the plan says of every trained parameter which part of the sequence it sees.

    Raises:
        UserError: one is not covered. Its gradient might be a part of the sum, and nobody would
            know.
    """
    covered = {part for name in plan for part in model.get_submodule(name).modules()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(module not in covered for module, _ in found[name]):
            raise UserError(
                f"{name} is in no module that the plan names: under sequence parallelism it must "
                'say whether that sees a shard of the sequence, "sequence", or all of it, '
                '"replicate"'
            )


def _read(glob: str, role: Role) -> Planned:
    name, block = role if isinstance(role, tuple) and len(role) == 2 else (role, 1)
    name = OLD_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in (*SPLIT, *NOT_SPLIT):
        roles = ", ".join((*SPLIT, *NOT_SPLIT))
        raise UserError(f"the plan's role of {glob} is {role!r}; there are {roles}")
    if not isinstance(block, int) or block < 1 or (block > 1 and name not in IN_BLOCKS):
        raise UserError(
            f"the plan's role of {glob} is {role!r}; {' and '.join(IN_BLOCKS)} take the number of "
            'outputs that stay together, ("colwise", 64), and no other role does'
        )
    return Planned(name, block)


def _check_kind(name: str, module: nn.Module, planned: Planned) -> None:
    kind = SPLIT.get(planned.role)
    if kind is not None and not isinstance(module, kind):
        wanted = "a Linear or an Embedding" if planned.role == "vocabulary" else "a Linear"
        raise UserError(
            f"the plan splits {name} as {planned.role!r}, which takes {wanted}, and it is a "
            f"{type(module).__name__}"
        )


def _around(name: str) -> Iterator[str]:
    """
    >>> list(_around("a.b.c"))
    ['a.b', 'a']
    """
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


# --- where parameters lie -------------------------------------------------------------------------


def lay_out(
    setup: Setup, plan: Mapping[str, Planned], found: Mapping[str, list[ParamSlot]], *, cut: bool
) -> dict[str, Layout]:
    """Extend the layouts by what the plan says of the modules that hold each parameter.

    Raises:
        UserError: the modules of a tied parameter would split it differently, or a parameter does
            not divide over the ranks.
    """
    name_of = {module: name for name, module in setup.model.named_modules()}
    layouts = {**setup.layouts}
    for name, parameter in setup.model.named_parameters():
        before, ways = setup.layouts[name], {}
        for module, attribute in found[name]:
            layout = _extended(before, name_of[module], module, attribute, setup.axis, plan, cut)
            if not parameter.requires_grad:
                layout = replace(layout, partial=before.partial)
            ways[layout] = name_of[module]
        if len(ways) > 1:
            first, second, *_ = ways.values()
            raise UserError(
                f"{name} is tied between {first} and {second}, which the plan splits differently; "
                "give them roles that agree, or untie them"
            )
        (layouts[name],) = ways
    return layouts


def _extended(
    layout: Layout, name: str, module: nn.Module, attribute: str, axis: Axis,
    plan: Mapping[str, Planned], cut: bool,
) -> Layout:  # fmt: skip
    around = next((outer for outer in (name, *_around(name)) if outer in plan), None)
    planned = plan[around] if around is not None else Planned("replicate")
    role, block = planned.role, planned.block
    if role == "rowwise" and attribute == "weight":
        return layout.split(axis.name, Shard(1))
    if role in ("rowwise", "sequence"):
        return layout.owing(Owed(axis.name)) if cut and axis.size > 1 else layout
    if role not in SPLIT:
        return layout
    outputs = getattr(module, attribute).shape[0]
    blocks, rest = divmod(outputs, block)
    if rest:
        raise UserError(f"{name} has {outputs} outputs, and the plan keeps {block} together")
    even = (
        role in ("colwise_grouped", "colwise_gather_output") or block > 1
    )  # a range of a vocabulary may be shorter
    copies = 1
    if role == "colwise_grouped" and blocks < axis.size and axis.size % blocks == 0:
        copies = axis.size // blocks  # neighbors have the same, as they have neighboring queries
        layout = layout.owing(Owed(axis.name, neighbours=copies))
    elif even and blocks % axis.size:
        degrees = divisors(blocks)
        what = f"{blocks} blocks of {block} outputs (heads)" if block > 1 else f"{blocks} outputs"
        raise UserError(
            f"{name} has {what}, which do not divide over {axis.size} ranks of {axis.name}; "
            f"degrees that work: {', '.join(map(str, degrees))}, the nearest is "
            f"{nearest_degree(degrees, axis.size)}"
        )
    return layout.split(axis.name, Shard(0, copies))


def divisors(length: int) -> list[int]:
    """
    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [n for n in range(1, length + 1) if length % n == 0]
