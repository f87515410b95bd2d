"""PyTorch's own tensor parallelism, DTensor, the twin of tp.py: by the same plan, the same pieces.

    column    ColwiseParallel         row         RowwiseParallel
    norms     SequenceParallel        the loss    loss_parallel

It runs as it is documented to run best: columns that read together share one input layout, so that
it is gathered, and its gradient summed, once for all of them; logits stay split. Keys and values of
which there are fewer than ranks it cannot lay, as it would cut heads, nor pieces of unequal length.

Cost per step: as tp.py, but for the loss. Memory per rank: the same. What it splits are DTensors;
what the plan leaves whole is a plain parameter.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import DeviceMesh

from dist_lab.errors import UserError, nearest_degree
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import param_slots
from dist_lab.parallel.tensor.plan import Plan, Planned, arrange, divisors, is_tested
from dist_lab.parallel.tensor.plan_check import PlanCheck
from dist_lab.parallel.tensor.same_inputs import compare_inputs
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import Applied, Setup, Sync
from dist_lab.torch_private import forget_shardings, keeps_graph, may_be_split_again


def apply(setup: Setup, *, plan: Plan | None = None, sequence_parallel: bool = False) -> Applied:
    """Hand each module of the plan to `parallelize_module`. Arguments as those of tp.py.

    Raises:
        UserError: what tp.py refuses, and fewer keys and values than ranks.
    """
    if not dist.is_initialized():
        raise UserError("DTensor needs a process group, even for one: torchrun --nproc_per_node=1")
    model, axis = setup.model, setup.axis
    named, _, layouts = arrange(setup, plan, cut=sequence_parallel)
    for name, layout in layouts.items():
        if getattr(dict(layout.splits).get(axis.name), "copies", 1) > 1:
            raise UserError(
                f"DTensor cannot lay {name}, of which there are fewer heads than ranks; give a "
                'smaller tp, or impl="hand"'
            )
    _refuse_uneven(model, named, axis)
    forget_shardings()
    group = axis.group_even_of_one()
    mesh = DeviceMesh.from_group(group, axis.device.type, mesh_dim_names=(axis.name,))
    split = partial(_split, mesh, named, cut=sequence_parallel)
    sync = split(model)
    compare_inputs(model, axis, named, plan, cut=sequence_parallel)
    if axis.size > 1 and not is_tested(model, plan) and not axis.comm.dry_run:
        PlanCheck(setup, named, layouts, split, cut=sequence_parallel)
    about = (
        "torch parallelize_module(ColwiseParallel, RowwiseParallel, "
        + ("SequenceParallel, " if sequence_parallel else "")
        + "one shared input layout for columns that read together), loss_parallel"
    )
    return Applied(layouts, sync, about, make_optimizer=_apart)


def _split(
    mesh: DeviceMesh, plan: Mapping[str, Planned], model: nn.Module, *, cut: bool
) -> "ThroughDTensor":
    """Split a model, which may be a copy, as the plan says."""
    from torch.distributed.tensor import Replicate, Shard  # here: it takes a second
    from torch.distributed.tensor.parallel import parallelize_module

    may_be_split_again(model)
    ties = [slots for slots in param_slots(model).values() if len(slots) > 1]
    stream = Shard(1) if cut else Replicate()  # (B, T, D)
    parallelize_module(model, mesh, _styles(model, plan, stream), src_data_rank=None)
    for parent in _together(plan):
        hook = ModuleHook(partial(_share_input, mesh, stream))
        model.get_submodule(parent).register_forward_pre_hook(hook)
    for (module, attribute), *others in ties:
        for other, name in others:
            other._parameters[name] = module._parameters[attribute]
    for name, planned in plan.items():
        module = model.get_submodule(name)
        if planned.role == "vocabulary" and isinstance(module, nn.Linear):
            module.register_forward_hook(ModuleHook(lambda m, args, y: SplitLogits(y)))
        elif planned.role == "rowwise":
            hook = ModuleHook(partial(_split_whole, mesh, stream))
            module.register_forward_pre_hook(hook, prepend=True)
    return ThroughDTensor(model)


def _refuse_uneven(model: nn.Module, plan: Mapping[str, Planned], axis: Axis) -> None:
    """What flows between column and row is a plain tensor, and its pieces are taken to be equal."""
    for name, planned in plan.items():
        if planned.role in ("colwise", "colwise_grouped", "colwise_gather_output", "rowwise"):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), name
            width = linear.in_features if planned.role == "rowwise" else linear.out_features
            if width % axis.size:
                raise UserError(
                    f"DTensor splits in equal pieces alone, and {name} has {width} for "
                    f"{axis.size} ranks of {axis.name}; the nearest that divides is "
                    f'{nearest_degree(divisors(width), axis.size)}, or give impl="hand"'
                )


def _styles(model: nn.Module, plan: Mapping[str, Planned], stream: Any) -> dict[str, Any]:
    """The plan in the library's words. `stream`: how what flows between the blocks lies."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
    )

    whole, cut = Replicate(), isinstance(stream, Shard)
    together = _together(plan)
    styles: dict[str, Any] = {}
    for name, planned in plan.items():
        match planned.role:
            case "colwise" | "colwise_grouped":
                own = whole if name.rpartition(".")[0] in together else stream
                styles[name] = ColwiseParallel(input_layouts=own)
            case "colwise_gather_output":
                styles[name] = ColwiseParallel(input_layouts=stream, output_layouts=whole)
            case "rowwise":
                styles[name] = RowwiseParallel(output_layouts=stream)
            case "vocabulary" if isinstance(model.get_submodule(name), nn.Embedding):
                styles[name] = RowwiseParallel(input_layouts=whole, output_layouts=stream)
            case "vocabulary":
                styles[name] = ColwiseParallel(
                    input_layouts=stream, output_layouts=Shard(-1), use_local_output=False
                )
            case "sequence" if cut:
                styles[name] = SequenceParallel(use_local_output=True)
            case "scatter_output" if cut:
                styles[name] = PrepareModuleOutput(
                    output_layouts=whole, desired_output_layouts=stream
                )
            case "gather_input" if cut:
                styles[name] = PrepareModuleInput(
                    input_layouts=stream, desired_input_layouts=whole, use_local_output=True
                )
    return styles


def _together(plan: Mapping[str, Planned]) -> set[str]:
    """Parents of several columns, which read their first argument."""
    parents = [
        n.rpartition(".")[0] for n, p in plan.items() if p.role in ("colwise", "colwise_grouped")
    ]
    return {parent for parent in parents if parent and parents.count(parent) > 1}


def _split_whole(mesh: DeviceMesh, stream: Any, row: nn.Linear, args: tuple[Any, ...]) -> Any:
    """A row that no column comes before is given whole features, and RowwiseParallel is told so."""
    from torch.distributed.tensor import DTensor

    x = args[0]
    if mesh.size() == 1 or isinstance(x, DTensor) or x.shape[-1] != row.in_features:
        return None
    return DTensor.from_local(x, mesh, (stream,), run_check=False)


def _share_input(
    mesh: DeviceMesh, stream: Any, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """What PrepareModuleInput does, for a module of any number of arguments: the first is a DTensor
    from here on, put together once for all columns that read it.
    """
    from torch.distributed.tensor import DTensor, Replicate

    x = DTensor.from_local(args[0], mesh, (stream,), run_check=False)
    return x.redistribute(placements=(Replicate(),)), *args[1:]


@dataclass(frozen=True)
class SplitLogits:
    """Logits as a DTensor, which know their own loss."""

    here: Tensor

    def cross_entropy_sum(self, targets: Tensor) -> Tensor:
        rows = self.here.flatten(0, -2)
        wide = rows if rows.dtype.itemsize >= 4 else rows.float()
        return _CrossEntropy.apply(wide, targets.flatten())


class _CrossEntropy(torch.autograd.Function):
    """rows (N, V_tp), targets (N,) -> the sum of their losses, as `loss_parallel` computes it.

    The library wants its context around the loss and around its backward. So that it is around
    nothing else, the loss has a graph of its own, which is run from within the outer one.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor) -> Tensor:
        with torch.set_grad_enabled(rows.requires_grad), _loss_parallel():
            inner = _Root.apply(rows.detach(), torch.ones((), requires_grad=True))
            loss: Any = F.cross_entropy(inner, targets, reduction="sum")
            ctx.loss = loss.full_tensor()
        ctx.rows = get_gradient_edge(inner) if rows.requires_grad else None
        return ctx.loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with _loss_parallel():
            (gradient,) = torch.autograd.grad(ctx.loss, ctx.rows, dy, retain_graph=keeps_graph())
        return gradient, None


class _Root(torch.autograd.Function):
    """The identity, where a graph begins. A leaf would keep the logits for as long as its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[None, None]:
        return None, None


@contextmanager
def _loss_parallel() -> Iterator[None]:
    """torch's `loss_parallel`, left also by an exception."""
    from torch.distributed.tensor.parallel import loss_parallel

    context = loss_parallel()
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


class ThroughDTensor(Sync):
    """Leaves everything to the library, whose gradients may be partial sums until they are used."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def finish(self) -> None:
        for parameter in self.model.parameters():
            gradient: Any = parameter.grad
            placements = getattr(parameter, "placements", None)
            if gradient is not None and placements is not None:
                parameter.grad = gradient.redistribute(placements=placements)


def _apart(
    cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """DTensors and plain parameters in groups of their own: no operation takes both at once."""
    halves = [
        group | {"params": half}
        for group in groups
        for split in (True, False)
        if (half := [p for p in group["params"] if _is_split(p) is split])
    ]
    return cls(halves, **options)


def _is_split(parameter: Tensor) -> bool:
    return getattr(parameter, "placements", None) is not None
