"""Reads and checks the plan of tensor parallelism: see [Note: the plan] in tp.py.

The first half gives each module its role, the second half each parameter its layout.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from dist_lab.errors import UserError, nearest_degree
from dist_lab.layout.layout import Layout, Owed, Shard
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import ParamSlot, param_slots
from dist_lab.parallel.tensor.layers import is_linear, output_dim
from dist_lab.step.setup import Setup

Role = str | tuple[str, int]
Plan = Mapping[str, Role]

SPLIT = ("colwise", "colwise_grouped", "colwise_gather_output", "rowwise", "vocabulary")
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


@dataclass(frozen=True)
class Planned:
    """The role of one module. `block`: outputs per block, such as a head: never split."""

    role: str
    block: int = 1


def arrange(
    setup: Setup, plan: Plan, *, sequence_parallel: bool
) -> tuple[dict[str, Planned], dict[str, Layout]]:
    """Read the plan: the role of each planned module, and the layout of each parameter.

    Raises:
        UserError: the plan does not fit.
    """
    model = setup.whole_model
    planned = read_plan(model, plan)
    slots = param_slots(model)
    layouts = parameter_layouts(setup, planned, slots, sequence_parallel=sequence_parallel)
    if sequence_parallel:
        check_all_planned(model, planned, slots)
    return planned, layouts


def read_plan(model: nn.Module, plan: Plan) -> dict[str, Planned]:
    """Returns module name -> its role.

    Raises:
        UserError: a name matches no module, a role does not exist or does not suit its module, a
            module has two roles, or it lies inside another module with a role.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    planned_by_name: dict[str, Planned] = {}
    glob_of: dict[str, str] = {}
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
            if planned_by_name.get(name, planned) != planned:
                raise UserError(
                    f"the plan gives {name} two roles, by {glob_of[name]} and by {glob}"
                )
            planned_by_name[name], glob_of[name] = planned, glob
            _check_kind(name, modules[name], planned)
    for name in planned_by_name:
        outer = next((outer for outer in _enclosing(name) if outer in planned_by_name), None)
        if outer:
            raise UserError(f"the plan names {name}, and {outer} around it; name one of them")
    return planned_by_name


def check_all_planned(
    model: nn.Module, plan: Mapping[str, Planned], slots: Mapping[str, list[ParamSlot]]
) -> None:
    """Check that every trained parameter is in a planned module.

    Raises:
        UserError: one is not. We could not know whether its module reads a shard of the sequence,
            which would make its gradient partial.
    """
    covered = {module for name in plan for module in model.get_submodule(name).modules()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(module not in covered for module, _ in slots[name]):
            raise UserError(
                f"{name} is in no module that the plan names; under sequence parallelism add its "
                'module to the plan: as "sequence" if it reads a shard of the sequence, as '
                '"replicate" if it reads the whole sequence'
            )


def _read(glob: str, role: Role) -> Planned:
    name, block = role if isinstance(role, tuple) and len(role) == 2 else (role, 1)
    name = OLD_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in (*SPLIT, *NOT_SPLIT):
        roles = ", ".join((*SPLIT, *NOT_SPLIT))
        raise UserError(f"the plan's role of {glob} is {role!r}; the roles are {roles}")
    if not isinstance(block, int) or block < 1 or (block > 1 and name not in IN_BLOCKS):
        raise UserError(
            f"the plan's role of {glob} is {role!r}; only {' and '.join(IN_BLOCKS)} take the "
            'number of outputs that stay together: ("colwise", 64)'
        )
    return Planned(name, block)


def _check_kind(name: str, module: nn.Module, planned: Planned) -> None:
    is_kind, wanted = is_linear(module), "a Linear"
    if planned.role == "vocabulary":
        is_kind, wanted = isinstance(module, nn.Linear | nn.Embedding), "a Linear or an Embedding"
    if planned.role in SPLIT and not is_kind:
        raise UserError(
            f"the plan splits {name} as {planned.role!r}, which takes {wanted}, and it is a "
            f"{type(module).__name__}"
        )


def _enclosing(name: str) -> Iterator[str]:
    """
    >>> list(_enclosing("a.b.c"))
    ['a.b', 'a']
    """
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


# --- the layouts of parameters --------------------------------------------------------------------


def parameter_layouts(
    setup: Setup, plan: Mapping[str, Planned], slots: Mapping[str, list[ParamSlot]], *,
    sequence_parallel: bool,
) -> dict[str, Layout]:  # fmt: skip
    """Add to each parameter's layout the split of its module's role.

    Raises:
        UserError: the modules of a tied parameter would split it differently, or a parameter does
            not divide over the ranks.
    """
    name_of = {module: name for name, module in setup.whole_model.named_modules()}
    layouts = {**setup.layouts}
    for name, parameter in setup.whole_model.named_parameters():
        before, holder_of = setup.layouts[name], {}  # layout -> a module with its role
        for module, attribute in slots[name]:
            holder = name_of[module]
            layout = _layout_for_role(
                before, holder, module, attribute, setup.axis, plan, sequence_parallel
            )
            if not parameter.requires_grad:
                layout = replace(layout, partial=before.partial)
            holder_of[layout] = holder
        if len(holder_of) > 1:
            first, second, *_ = holder_of.values()
            raise UserError(
                f"{name} is tied between {first} and {second}, which the plan splits differently; "
                "give them roles that agree, or untie them"
            )
        (layouts[name],) = holder_of
    return layouts


def _layout_for_role(
    layout: Layout, name: str, module: nn.Module, attribute: str, axis: Axis,
    plan: Mapping[str, Planned], sequence_parallel: bool,
) -> Layout:  # fmt: skip
    planned_name = next((outer for outer in (name, *_enclosing(name)) if outer in plan), None)
    planned = Planned("replicate") if planned_name is None else plan[planned_name]
    role, block = planned.role, planned.block
    dim = output_dim(module, attribute)
    if role == "rowwise" and attribute == "weight":
        return layout.split(axis.name, Shard(1 - dim))
    if role in ("rowwise", "sequence"):
        is_partial = sequence_parallel and axis.size > 1
        return layout.owing(Owed(axis.name)) if is_partial else layout
    if role not in SPLIT:
        return layout
    outputs = getattr(module, attribute).shape[dim]
    blocks, rest = divmod(outputs, block)
    if rest:
        raise UserError(f"{name} has {outputs} outputs, and the plan keeps {block} together")
    # Without blocks, the last shard of a hidden width or of a vocabulary may be shorter.
    must_divide = role == "colwise_grouped" or block > 1
    copies = 1
    if role == "colwise_grouped" and blocks < axis.size and axis.size % blocks == 0:
        copies = axis.size // blocks  # ranks whose queries use one key head share that head
        layout = layout.owing(Owed(axis.name, neighbours=copies))
    elif must_divide and blocks % axis.size:
        degrees = divisors(blocks)
        what = f"{blocks} blocks of {block} outputs (heads)" if block > 1 else f"{blocks} outputs"
        raise UserError(
            f"{name} has {what}, which do not divide over {axis.size} ranks of {axis.name}; "
            f"degrees that work: {', '.join(map(str, degrees))}, the nearest is "
            f"{nearest_degree(degrees, axis.size)}"
        )
    return layout.split(axis.name, Shard(dim, copies))


def divisors(length: int) -> list[int]:
    """
    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [n for n in range(1, length + 1) if length % n == 0]
