"""Splits a model into stages: keeps this rank's, and finds the shapes of tensors between stages.

No name changes: a layer of this rank keeps its place in the model, and any other is replaced by
a layer that raises an error. A stage runs as a module of its own: for a model with `stages`, its
modules in sequence; for any other, a part of its traced graph. partition.py chooses the split.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Layout, OnlyOn, Owed
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.pipeline.other_stages import contents, remove_others
from dist_lab.parallel.pipeline.partition import (
    Operations,
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
from dist_lab.step.protocol import Sync
from dist_lab.step.setup import Setup, Stages
from dist_lab.torch_private import outside_modes
from dist_lab.transforms.precision import compute_in

BALANCES = ("cost", "count")


@dataclass(frozen=True)
class LocalStages:
    """This rank's stages, and what it knows about the whole model.

    stages: this rank's stages
    shapes: the shapes of the tensors between stages
    layouts, buffers: name -> Layout, for the whole model
    tied: name of a parameter that this rank shares -> the axis of the ranks that hold it
    """

    stages: Stages
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
    """Split a model into stages and keep this rank's, in place. See `pp.apply`.

    Args:
        rank_of: stage -> position on the axis.
    """
    model, axis = setup.model, setup.axis
    if balance not in BALANCES:
        raise UserError(f"balance cannot be {balance!r}; give {' or '.join(BALANCES)}")
    if any(not isinstance(value, Tensor) for value in model.state_dict().values()):
        raise UserError("pp would lose extra state (get_extra_state); keep it in buffers instead")
    for name, buffer in model.named_buffers():
        if buffer.layout is not torch.strided:
            raise UserError(f"{name} is sparse, which stages do not send; make it dense")
    stages, used_names = _split(model, len(rank_of), balance, example)
    meta_model, *meta_stages = meta_copy(nn.ModuleList([model, *stages])).children()
    used = [contents(model, names) for names in used_names]

    def stages_of(tensor: Tensor) -> tuple[int, ...]:
        """The stages that use a tensor; an unused one is put on stage 0."""
        users = [s for s, (_, tensors) in enumerate(used) if id(tensor) in tensors]
        return tuple(users or [0])

    def ranks_of(tensor: Tensor) -> list[int]:
        """The ranks that use a tensor, in stage order."""
        return list(dict.fromkeys(rank_of[s] for s in stages_of(tensor)))

    stages_by_name = {name: stages_of(p) for name, p in model.named_parameters()}
    layouts: dict[str, Layout] = {}
    tied: dict[str, Axis] = {}
    kept = {id(b) for b in model.buffers() if axis.index in ranks_of(b)}
    for name, parameter in model.named_parameters():
        ranks = ranks_of(parameter)
        layouts[name] = setup.layouts[name].split(axis.name, OnlyOn(tuple(ranks)))
        shared_by = None
        if len(ranks) > 1 and parameter.requires_grad:
            layouts[name] = layouts[name].owing(Owed(axis.name, positions=tuple(sorted(ranks))))
            shared_by = setup.mesh.sub(axis.name, ranks)
        if axis.index in ranks:
            kept.add(id(parameter))
        if shared_by is not None:
            tied[name] = shared_by
    buffers = {
        name: Layout(buffer.shape, buffer.dtype).split(axis.name, OnlyOn(tuple(ranks_of(buffer))))
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in model.state_dict()
    }
    local = {stage: module for stage, module in enumerate(stages) if rank_of[stage] == axis.index}
    remove_others(model, {m for stage in local for m in used[stage][0]}, kept)
    shapes = Shapes(meta_stages, setup.param_dtype)
    traced = seams(model) is None
    kept_stages = Stages(local, len(rank_of), stages_by_name, meta_model, traced)
    return LocalStages(kept_stages, shapes, layouts, buffers, tied)


# --- stages as modules ----------------------------------------------------------------------------


class SequentialStage(nn.Sequential):
    """Modules in sequence. It returns a tuple, as all stages do except the last."""

    def __init__(self, modules: Iterable[nn.Module], *, last: bool) -> None:
        super().__init__(*modules)
        self.last = last

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor]:
        for module in self:
            x = module(x)
        return x if self.last else (x,)


def _split(
    model: nn.Module, num_stages: int, balance: str, example: Any
) -> tuple[list[nn.Module], list[set[str]]]:
    """All stages of a model, and the names of the modules and tensors that each of them uses."""
    if seams(model) is not None:
        pieces = pieces_by_seams(model)
        modules = [[model.get_submodule(name) for name in piece] for piece in pieces]
        meta_model, x = meta_copy(model), None if example is None else to_meta(example)
        with Operations() as of_sequence:
            costs = seam_costs([[*map(meta_model.get_submodule, piece)] for piece in pieces], x)
        if x is not None:
            check_whole(meta_model, of_sequence, x)
        costs = costs if balance == "cost" else [1.0] * len(pieces)
        _check_enough(num_stages, len(pieces), f"blocks of {type(model).__name__}")
        ends = [*cut(costs, num_stages), len(pieces)]
        stages: list[nn.Module] = [
            SequentialStage((m for piece in modules[a:b] for m in piece), last=b == len(pieces))
            for a, b in pairwise(ends)
        ]
        return stages, [{n for piece in pieces[a:b] for n in piece} for a, b in pairwise(ends)]
    if example is None:
        raise UserError(
            f"{type(model).__name__} has no `stages`, and to split its graph pp needs an input, to "
            "see what each operation costs: give example_inputs=, one micro-batch; or give the "
            'model stages = ("embed", "layers.*", "head")'
        )
    traced = trace(model, example)
    nodes, costs, carried = node_costs(traced, example)
    costs = costs if balance == "cost" else [1.0] * len(nodes)
    _check_enough(num_stages, len(nodes), f"operations of {type(model).__name__}")
    graphs = split(traced, cut(costs, num_stages, carried))
    return list(graphs), [
        {str(node.target) for node in g.graph.nodes if node.op in ("call_module", "get_attr")}
        for g in graphs
    ]


def _check_enough(num_stages: int, pieces: int, noun: str) -> None:
    if num_stages > pieces:
        raise UserError(
            f"{num_stages} stages are more than the {pieces} {noun}; give fewer ranks of pp, or a "
            "deeper model"
        )


# --- the shapes of tensors between stages ---------------------------------------------------------


@dataclass(frozen=True)
class StageInput:
    """Shape and dtype of one tensor that a stage takes as input."""

    shape: torch.Size
    dtype: torch.dtype
    is_model_input: bool = field(default=False, compare=False)  # passed through, without gradient

    @property
    def has_grad(self) -> bool:
        """Whether its gradient is sent back."""
        return self.dtype.is_floating_point and not self.is_model_input

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Shapes:
    """The inputs of all stages for each shape of micro-batch: [Note: what travels] in pp.py."""

    def __init__(self, meta_stages: list[nn.Module], param_dtype: torch.dtype | None) -> None:
        self.meta_stages, self.param_dtype = meta_stages, param_dtype
        self.in_training = {m for stage in meta_stages for m in stage.modules() if m.training}
        self.known: dict[tuple[str, bool], list[list[StageInput]]] = {}

    def complete(self) -> None:
        """All strategies are applied to the model on the meta device: it computes as this one."""
        for stage, meta_stage in enumerate(self.meta_stages):
            if self.param_dtype is not None:
                compute_in(meta_stage, self.param_dtype, inputs=stage == 0)

    def of(self, x: Any, *, training: bool) -> list[list[StageInput]]:
        """Each stage's inputs. Those of the first stage are the tensors of x."""
        key = repr(map_tensors(lambda t: (t.shape, t.dtype), x)), training
        if key not in self.known:
            for module in self.in_training:
                module.training = training
            with outside_modes(), torch.no_grad():  # a FLOP counter would count this
                self.known[key] = list(self._run_on_meta(x))
        return self.known[key]

    def _run_on_meta(self, x: Any) -> Iterable[list[StageInput]]:
        values: tuple[Any, ...] = (to_meta(x),)
        model_inputs = [*tensors_in(values)]
        yield [StageInput(t.shape, t.dtype) for t in tensors_in(x)]
        for stage, meta_model in enumerate(self.meta_stages[:-1]):
            try:
                values = meta_model(*values)
            except Exception as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                if stage == 0 and not isinstance(x, Tensor):
                    raise UserError(
                        f"the first module of stage 0 cannot take a {type(x).__name__} as input "
                        f"({why}); unpack it in that module, or give pairs of a tensor and targets"
                    ) from None
                raise UserError(
                    f"stage {stage} cannot be run on the meta device to find the shapes of its "
                    f"outputs ({why}); a pipeline needs shapes that do not depend on values"
                ) from None
            if not all(isinstance(v, Tensor) and not v.is_complex() for v in values):
                raise UserError(
                    f"stage {stage} returns a value that is not a tensor, or a complex tensor, "
                    "which cannot be sent; give another number of stages, to split elsewhere"
                )
            yield [StageInput(v.shape, v.dtype, any(v is i for i in model_inputs)) for v in values]


def check_shapes(stage: int, output: object, expected: Sequence[StageInput]) -> None:
    """Raise UserError unless a stage's outputs have the shapes that `Shapes` has found."""
    values = output if isinstance(output, tuple) else (output,)
    actual = [StageInput(x.shape, x.dtype) for x in values]
    if actual != list(expected):
        raise UserError(
            f"stage {stage} returns {', '.join(map(str, actual))}, but on the meta device it gave "
            f"{', '.join(map(str, expected))}; a pipeline needs shapes that do not depend on values"
        )


# --- parameters of several stages -----------------------------------------------------------------


class Tied(Sync):
    """Sums the gradients of parameters of several stages: [Note: whole gradients] in pp.py."""

    def __init__(self, setup: Setup, tied: Mapping[str, Axis]) -> None:
        self.model, self.folded, self.tied = setup.model, setup.folded, tied

    def finish(self) -> None:
        for name, axis in self.tied.items():
            parameter = self.folded.gradient_holder(self.model, name)
            is_used = parameter.grad is not None
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            local = local_part(grad)
            # One more element counts the ranks that have a gradient at all.
            flat = torch.cat([local.flatten(), local.new_tensor([is_used])])
            with axis.comm.label(unit=f"tied {name}"):
                total = ops.all_reduce_into(flat, axis).wait()  # dW{U} -> dW
            if total[-1] > 0:
                local.copy_(total[:-1].view_as(local))
                parameter.grad = grad
