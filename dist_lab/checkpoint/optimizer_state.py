"""The state of an optimizer as entries: moments, step counts, and the options of its groups.

    a tensor of the parameter's own shape     lies as the parameter does: Adam's moments
    any other tensor                          is the same on every rank that has the parameter
    of a matrix (Muon, Shampoo)               on the rank that owns the matrix: see optim/owners.py
    all, under torch's ZeRO-1                 on the rank whose optimizer steps on the parameter

Before its first step an optimizer has no state. So a load creates it, as the checkpoint describes
it, and the next step goes on from there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_lab.checkpoint.entries import Entry, Shape, Trained
from dist_lab.checkpoint.state_check import check_options
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Layout, OnlyOn, boxes, is_first_holder
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.optim.matrix_optimizer import MatrixOptimizer

# How an optimizer computes, and how it reads a tensor: another layout may have other values.
NOT_SAVED = ("params", "foreach", "fused", "capturable", "differentiable", "matrices")


@dataclass(frozen=True)
class Stepped:
    """A parameter that this rank's optimizer steps on.

    Attributes:
        tensor: what it steps on, a shard perhaps.
        layout: of the full parameter.
        axes: the axes of the mesh along which ranks hold the same state, or shards of it; not
            those along which one rank alone steps on the parameter.
    """

    name: str
    tensor: Tensor
    layout: Layout
    axes: Mapping[str, int]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the state: accelerate's and torch's ZeRO-1 have one inside."""
    for attribute in ("optimizer", "optim"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, Optimizer):
            return unwrapped(inner)
    return optimizer


def stepped_by(optimizer: Optimizer, job: Trained) -> list[Stepped]:
    """The parameters that this rank's optimizer steps on."""
    inner = unwrapped(optimizer)
    own = {id(p) for group in inner.param_groups for p in group["params"]}
    all_own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    axes = dict(job.mesh.axes)
    if own != all_own:  # torch's ZeRO-1: each parameter is stepped on by one rank of the data axes
        axes = {axis: size for axis, size in axes.items() if axis not in DATA_AXES}
    return [
        Stepped(name, parameter, job.layouts[name], axes)
        for name, parameter in job.named_parameters()
        if id(parameter) in own
    ]


def optimizer_entries(optimizer: Optimizer, job: Trained) -> Iterator[Entry]:
    """The entries of this rank's state. Numbers that are no tensors are in `numbers_of`."""
    inner = unwrapped(optimizer)
    for stepped in stepped_by(optimizer, job):
        for key, value in inner.state.get(stepped.tensor, {}).items():
            if isinstance(value, Tensor):
                yield _entry(inner, job, stepped, key, local_part(value.detach()))


def numbers_of(optimizer: Optimizer, job: Trained) -> dict[str, dict[str, int | float | bool]]:
    """Name -> key -> number, of the state of this rank's parameters that is no tensor.

    Raises:
        UserError: some state is neither a tensor nor a number.
    """
    inner = unwrapped(optimizer)
    numbers: dict[str, dict[str, int | float | bool]] = {}
    for stepped in stepped_by(optimizer, job):
        for key, value in inner.state.get(stepped.tensor, {}).items():
            if isinstance(value, int | float | bool):
                numbers.setdefault(stepped.name, {})[key] = value
            elif value is not None and not isinstance(value, Tensor):
                raise UserError(
                    f"{type(inner).__name__} keeps a {type(value).__name__} under {key!r} for "
                    f"{stepped.name}, and a checkpoint holds tensors and numbers; save it yourself"
                )
    return numbers


def create_state(
    optimizer: Optimizer,
    job: Trained,
    saved: Mapping[str, tuple[Shape, torch.dtype]],
    numbers: Mapping[str, Mapping[str, int | float | bool]],
) -> Iterator[Entry]:
    """Give this rank's optimizer the state that a checkpoint has, and yield what is to be read.

    Args:
        saved: name -> shape and dtype of the full tensor, of the checkpoint's tensors.
        numbers: as from `numbers_of`, of all ranks.
    """
    inner = unwrapped(optimizer)
    keys: dict[str, list[str]] = {}
    for full_name in saved:
        if full_name.startswith("optimizer/"):
            name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
            keys.setdefault(name, []).append(key)
    for stepped in stepped_by(optimizer, job):
        inner.state.pop(stepped.tensor, None)
        if stepped.name not in keys and stepped.name not in numbers:
            continue  # it had no gradient so far
        if isinstance(inner, MatrixOptimizer) and not inner.keeps_state_of(stepped.tensor):
            continue
        state: dict[str, Any] = dict(numbers.get(stepped.name, {}))
        for key in keys.get(stepped.name, ()):
            shape, dtype = saved[f"optimizer/{stepped.name}/{key}"]
            state[key] = _empty(inner, stepped, key, shape, dtype)
            yield _entry(inner, job, stepped, key, local_part(state[key]))
        inner.state[stepped.tensor] = state


def options_of(optimizer: Optimizer, job: Trained) -> dict[str, Any]:
    """The class of the optimizer and its groups: options that are JSON, and names."""
    names = {id(parameter): name for name, parameter in job.named_parameters()}
    groups = [
        {
            "options": {k: _plain(v) for k, v in group.items() if k not in NOT_SAVED},
            "names": [names[id(p)] for p in group["params"] if id(p) in names],
        }
        for group in optimizer.param_groups
    ]
    return {"class": type(unwrapped(optimizer)).__name__, "groups": groups}


def load_options(
    optimizer: Optimizer, job: Trained, name: str, tables: list[Mapping[str, Any]]
) -> None:
    """Set the options of each group to what they were for its parameters.

    Args:
        name: the checkpoint, for messages.
        tables: of all ranks, as from `options_of`.

    Raises:
        UserError: it is of another class, or its groups have other parameters.
        Damaged: an option is of another kind.
    """
    kind = type(unwrapped(optimizer)).__name__
    if tables[0]["class"] != kind:
        raise UserError(
            f"checkpoint {name!r} has the state of {tables[0]['class']}, and this job trains with "
            f"{kind}; build the same optimizer, or load without one"
        )
    group_of = {
        parameter: number
        for table in tables
        for number, group in enumerate(table["groups"])
        for parameter in group["names"]
    }
    saved = [group["options"] for group in tables[0]["groups"]]
    names = {id(parameter): name for name, parameter in job.named_parameters()}
    found: list[Mapping[str, Any]] = []
    for number, group in enumerate(optimizer.param_groups):
        own = [names[id(p)] for p in group["params"] if id(p) in names]
        unknown = [parameter for parameter in own if parameter not in group_of]
        if unknown:
            raise UserError(
                f"checkpoint {name!r} has no state of {unknown[0]}, which this optimizer trains; "
                "build the optimizer over the same parameters"
            )
        numbers = {group_of[parameter] for parameter in own} or {number} & {*range(len(saved))}
        options = [saved[n] for n in numbers]
        if any(other != options[0] for other in options):
            raise UserError(
                f"group {number} of the optimizer has parameters that had different options in "
                f"checkpoint {name!r}; build the same groups"
            )
        found.append(options[0] if options else {})
        check_options(name, group, found[-1], number)
    for group, values in zip(optimizer.param_groups, found, strict=True):
        for key, value in values.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _empty(
    inner: Optimizer, stepped: Stepped, key: str, shape: Shape, dtype: torch.dtype
) -> Tensor:
    """A tensor of this rank's state whose full shape is `shape`, to be read."""
    if isinstance(inner, MatrixOptimizer) and (part := inner.matrix_of(stepped.tensor, key)):
        return torch.empty(part.own_part(shape), dtype=dtype, device=stepped.tensor.device)
    if shape == tuple(stepped.layout.shape):
        return torch.empty_like(stepped.tensor.detach(), dtype=dtype)  # a DTensor stays one
    group = next(g for g in inner.param_groups if any(p is stepped.tensor for p in g["params"]))
    on_device = group.get("fused") or group.get("capturable")  # else counts are on the CPU
    device = stepped.tensor.device if on_device or shape else torch.device("cpu")
    return torch.empty(shape, dtype=dtype, device=device)


def _entry(inner: Optimizer, job: Trained, stepped: Stepped, key: str, local: Tensor) -> Entry:
    """Where one tensor of the state lies."""
    name, place = f"optimizer/{stepped.name}/{key}", job.mesh.coordinates
    if isinstance(inner, MatrixOptimizer) and (part := inner.matrix_of(stepped.tensor, key)):
        shape, box = part.held(tuple(local.shape))
        layout, names = inner.apart(stepped.tensor)
        axes = {axis: size for axis, size in job.mesh.axes.items() if axis in names}
        held = [box] if local.numel() else []
        return Entry(name, shape, held, is_first_holder(layout, axes, place), local)
    if local.shape == local_part(stepped.tensor).shape:
        layout = replace(stepped.layout, dtype=local.dtype)
    else:
        stages = tuple(split for split in stepped.layout.splits if isinstance(split[1], OnlyOn))
        layout = Layout(local.shape, local.dtype, stages)
    held, first = boxes(layout, job.mesh.axes, place), is_first_holder(layout, stepped.axes, place)
    return Entry(name, tuple(layout.shape), held, first, local)


def _plain(value: Any) -> Any:
    """An option as JSON. Raises UserError if it is none."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, int | float | bool | str):
        return value
    raise UserError(
        f"an option of the optimizer is a {type(value).__name__}, which a checkpoint cannot hold; "
        "give numbers"
    )
