"""What a rank keeps of a model whose layers are in stages, and what stages give each other.

No name changes: a layer that is kept stays where it is, and one that is not has a stand-in that
refuses to run. Layers run as parts: of a model with `stages`, modules in turn; of any other, a
piece of its traced graph. Where they are cut is partition.py's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, OnlyOn, Owed
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.pipeline.partition import (
    check_whole,
    cut,
    meta_copy,
    pieces_by_seams,
    seam_costs,
    seams,
    to_meta,
)
from dist_lab.parallel.pipeline.trace import node_costs, split, trace
from dist_lab.step.hooks import map_tensors, tensors_in
from dist_lab.step.protocol import Setup, Sync
from dist_lab.torch_private import outside_modes
from dist_lab.transforms.precision import compute_in

BALANCES = ("cost", "count")


@dataclass(frozen=True)
class LocalStages:
    """The stages that this rank keeps, and what it knows of the others.

    parts: this rank's stages, by number
    shapes: what stages give each other
    layouts, buffers: of the whole model
    tied: name -> the ranks that hold the same tensor, of what this one holds
    """

    parts: Mapping[int, nn.Module]
    shapes: "Shapes"
    layouts: Mapping[str, Layout]
    buffers: Mapping[str, Layout]
    tied: Mapping[str, Axis]


def keep_stages(
    setup: Setup,
    rank_of: Mapping[int, int],
    *,
    balance: str = "cost",
    example: Any = None,
) -> LocalStages:
    """Cut a model into stages and keep, in place, those of this rank. See `pp.apply`.

    Args:
        rank_of: stage -> position on the axis.
    """
    model, axis = setup.model, setup.axis
    if balance not in BALANCES:
        raise UserError(f"balance cannot be {balance!r}; give {' or '.join(BALANCES)}")
    if any(not isinstance(value, Tensor) for value in model.state_dict().values()):
        raise UserError("a module here has extra state, of which a stage would lose the others'")
    for name, buffer in model.named_buffers():
        if buffer.layout is not torch.strided:
            raise UserError(f"{name} is sparse, which stages do not send; make it dense")
    parts, uses = _in_stages(model, len(rank_of), balance, example)
    shapes = Shapes(meta_copy(nn.ModuleList(parts)), setup.param_dtype)
    used = [_objects(model, paths) for paths in uses]

    def ranks_of(tensor: Tensor) -> list[int]:
        """Those that use it, in the order of stages; what none does lies with the first."""
        stages = [s for s, (_, tensors) in enumerate(used) if id(tensor) in tensors]
        return list(dict.fromkeys(rank_of[s] for s in stages or [0]))

    layouts: dict[str, Layout] = {}
    tied: dict[str, Axis] = {}
    values: dict[nn.Parameter, str] = {}  # of what is kept, the name that it is drawn by
    kept = {id(b) for b in model.buffers() if axis.index in ranks_of(b)}
    for name, parameter in model.named_parameters():
        on = ranks_of(parameter)
        layouts[name] = setup.layouts[name].split(axis.name, OnlyOn(tuple(on)))
        together = None
        if len(on) > 1 and parameter.requires_grad:
            layouts[name] = layouts[name].owing(Owed(axis.name, positions=tuple(sorted(on))))
            together = setup.mesh.sub(axis.name, on)
        if axis.index in on:
            values[parameter] = name
            kept.add(id(parameter))
        if together is not None:
            tied[name] = together
    buffers = {
        name: Layout(buffer.shape, buffer.dtype).split(axis.name, OnlyOn(tuple(ranks_of(buffer))))
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in model.state_dict()
    }
    here = {stage: part for stage, part in enumerate(parts) if rank_of[stage] == axis.index}
    _leave(model, {m for stage in here for m in used[stage][0]}, kept)
    _materialize([model, *here.values()], values, setup.full_value, axis.device)
    if setup.param_dtype is not None:
        for stage, part in here.items():
            compute_in(part, setup.param_dtype, inputs=stage == 0)
    return LocalStages(here, shapes, layouts, buffers, tied)


# --- parts ----------------------------------------------------------------------------------------


class SequentialStage(nn.Sequential):
    """Modules in turn. What it gives is a tuple, as all stages give, but the last."""

    def __init__(self, modules: Iterable[nn.Module], *, last: bool) -> None:
        super().__init__(*modules)
        self.last = last

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor]:
        for module in self:
            x = module(x)
        return x if self.last else (x,)


def _in_stages(
    model: nn.Module, stages: int, balance: str, example: Any
) -> tuple[list[nn.Module], list[set[str]]]:
    """All stages of a model, and the names of the modules and tensors that each of them uses."""
    if seams(model) is not None:
        pieces = pieces_by_seams(model)
        modules = [[model.get_submodule(name) for name in piece] for piece in pieces]
        costs = [1.0] * len(pieces)
        if balance == "cost":
            meta_stages = meta_copy(nn.ModuleList(nn.ModuleList(piece) for piece in modules))
            assert isinstance(meta_stages, nn.ModuleList)
            costs = seam_costs(
                [list(piece) for piece in meta_stages],  # type: ignore[call-overload]
                None if example is None else to_meta(example),
            )
        if example is not None:
            meta_model = meta_copy(model)
            names = [name for piece in pieces for name in piece]
            check_whole(meta_model, map(meta_model.get_submodule, names), to_meta(example))
        _check_enough(stages, len(pieces), f"blocks of {type(model).__name__}")
        ends = [*cut(costs, stages), len(pieces)]
        parts: list[nn.Module] = [
            SequentialStage((m for piece in modules[a:b] for m in piece), last=b == len(pieces))
            for a, b in pairwise(ends)
        ]
        return parts, [{n for piece in pieces[a:b] for n in piece} for a, b in pairwise(ends)]
    if example is None:
        raise UserError(
            f"{type(model).__name__} has no `stages`, and to cut its graph takes an input to see "
            "what each operation costs: give example_inputs=, one micro-batch; or give the model "
            'stages = ("embed", "layers.*", "head")'
        )
    traced = trace(model, example)
    nodes, costs, carried = node_costs(traced, example)
    costs = costs if balance == "cost" else [1.0] * len(nodes)
    _check_enough(stages, len(nodes), f"operations of {type(model).__name__}")
    graphs = split(traced, cut(costs, stages, carried))
    return list(graphs), [
        {str(node.target) for node in g.graph.nodes if node.op in ("call_module", "get_attr")}
        for g in graphs
    ]


def _check_enough(stages: int, pieces: int, what: str) -> None:
    if stages > pieces:
        raise UserError(
            f"{stages} stages are more than the {pieces} {what}; give fewer ranks of pp, or a "
            "deeper model"
        )


# --- what stages give each other ------------------------------------------------------------------


@dataclass(frozen=True)
class StageInput:
    """Of one tensor that travels."""

    shape: torch.Size
    dtype: torch.dtype
    is_input: bool = field(default=False, compare=False)  # of the model: it needs no gradient

    @property
    def has_grad(self) -> bool:
        """Whether it has one, which travels back."""
        return self.dtype.is_floating_point and not self.is_input

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Shapes:
    """What each stage is given, by the shape of a micro-batch: [Note: what travels] in pp.py."""

    def __init__(self, meta_stages: nn.Module, param_dtype: torch.dtype | None) -> None:
        self.meta_stages = list(meta_stages.children())
        self.trains = {module for module in meta_stages.modules() if module.training}
        self.known: dict[tuple[str, bool], list[list[StageInput]]] = {}
        for stage, meta_model in enumerate(self.meta_stages):
            if param_dtype is not None:
                compute_in(meta_model, param_dtype, inputs=stage == 0)

    def of(self, x: Any, *, training: bool) -> list[list[StageInput]]:
        """For each stage the shapes of what it is given; the first is given x itself."""
        key = repr(map_tensors(lambda t: (t.shape, t.dtype), x)), training
        if key not in self.known:
            for module in self.trains:
                module.training = training
            with outside_modes(), torch.no_grad():  # who counts operations counts real ones
                self.known[key] = list(self._pass_through(x))
        return self.known[key]

    def _pass_through(self, x: Any) -> Iterable[list[StageInput]]:
        values: tuple[Any, ...] = (to_meta(x),)
        inputs = [*tensors_in(values)]
        yield [StageInput(t.shape, t.dtype) for t in tensors_in(x)]
        for stage, meta_model in enumerate(self.meta_stages[:-1]):
            try:
                values = meta_model(*values)
            except Exception as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                if stage == 0 and not isinstance(x, Tensor):
                    raise UserError(
                        f"the input is a {type(x).__name__}, which the first module of stage 0 is "
                        f"given as it is, and that fails ({why}); have that module take it apart, "
                        "or give pairs of one tensor and targets"
                    ) from None
                raise UserError(
                    f"stage {stage} cannot be run on the meta device, to learn the shapes of what "
                    f"it gives ({why}); a pipeline needs shapes that do not depend on values"
                ) from None
            if not all(isinstance(v, Tensor) and not v.is_complex() for v in values):
                raise UserError(
                    f"stage {stage} gives what is no tensor, or one of complex numbers, which is "
                    "not sent; cut elsewhere, by another number of stages"
                )
            yield [StageInput(v.shape, v.dtype, any(v is own for own in inputs)) for v in values]


def check_shapes(stage: int, output: object, wanted: Sequence[StageInput]) -> None:
    """Raise UserError unless a stage gives what `Shapes` has said."""
    values = output if isinstance(output, tuple) else (output,)
    found = [StageInput(x.shape, x.dtype) for x in values]
    if found != list(wanted):
        raise UserError(
            f"stage {stage} gives {', '.join(map(str, found))}, and on the meta device it gave "
            f"{', '.join(map(str, wanted))}; a pipeline needs shapes that do not depend on values"
        )


# --- what stages hold together --------------------------------------------------------------------


class Tied(Sync):
    """Pays what tensors that several stages hold owe: see [Note: whole gradients] in pp.py."""

    def __init__(self, model: nn.Module, tied: Mapping[str, Axis]) -> None:
        self.model, self.tied = model, tied

    def finish(self) -> None:
        for name, axis in self.tied.items():
            parameter = self.model.get_parameter(name)
            mine = parameter.grad
            flat = torch.zeros_like(parameter).flatten() if mine is None else mine.flatten()
            # With one more element that says whether any of them has a gradient at all.
            flat = torch.cat([flat, flat.new_tensor([mine is not None])])
            with axis.comm.label(unit=f"tied {name}"):
                whole = ops.all_reduce_into(flat, axis).wait()  # dW{U} -> dW
            if whole[-1] > 0:
                parameter.grad = whole[:-1].view_as(parameter)


# --- what is here, and what is not ----------------------------------------------------------------


class MissingLayer(nn.Module):
    """Stands where a layer of another stage would be."""

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        raise UserError("this layer is on another stage; under pp call job.run or job.evaluate")


def _objects(model: nn.Module, paths: Iterable[str]) -> tuple[list[nn.Module], set[int]]:
    """The modules and tensors at these names, which may have other names as well."""
    modules = dict(model.named_modules(remove_duplicate=False))
    alone = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    found = [modules[path] for path in paths if path in modules]
    tensors = [alone[path] for path in paths if path in alone]
    for module in found:
        tensors += [*module.parameters(), *module.buffers()]
    return found, {id(tensor) for tensor in tensors}


def _leave(module: nn.Module, modules: set[nn.Module], tensors: set[int]) -> None:
    """Put stand-ins for the modules, and None for the tensors, that are not among those kept.

    By identity, as one module or tensor may stand in several places.
    """
    for name, child in module._modules.items():
        if child is None or child in modules:
            continue
        state = (*child.parameters(), *child.buffers())
        if any(m in modules for m in child.modules()) or any(id(t) in tensors for t in state):
            _leave(child, modules, tensors)
        else:
            module._modules[name] = MissingLayer()
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if id(tensor) not in tensors:
                held[name] = None


def _materialize(
    roots: Sequence[nn.Module],
    values: Mapping[nn.Parameter, str],
    full_value: Callable[[str], Tensor],
    device: torch.device,
) -> None:
    """Of a model from the meta device: each parameter that is kept gets its value, where it is."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, name in values.items():
        if parameter.is_meta:
            value = full_value(name).to(device)
            new[parameter] = nn.Parameter(value, parameter.requires_grad)
            new[parameter].__dict__.update(parameter.__dict__)
    for root in roots:
        for module in root.modules():
            for name, held in module._parameters.items():
                if held in new:
                    module._parameters[name] = new[held]
