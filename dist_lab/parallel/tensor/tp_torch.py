"""PyTorch's own tensor parallelism, DTensor, the twin of tp.py: the same plan, the same shards.

    colwise    ColwiseParallel         rowwise     RowwiseParallel
    norms      SequenceParallel        the loss    loss_parallel

We use it as PyTorch's documentation recommends. Colwise layers that share an input get it as one
DTensor, which is gathered once, and whose gradient is summed once; logits stay sharded. DTensor
cannot share a key head between ranks, nor compute on shards of unequal length.

Cost per step: that of tp.py, except for the loss. Memory per rank: the same. Sharded parameters are
DTensors; replicated ones are plain parameters.
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
from dist_lab.parallel.tensor.plan import SPLIT, Plan, Planned, arrange, divisors
from dist_lab.parallel.tensor.plan_check import check_before_first_forward
from dist_lab.parallel.tensor.plan_source import plan_of
from dist_lab.parallel.tensor.same_inputs import compare_inputs
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import Applied, Sync
from dist_lab.step.setup import Setup
from dist_lab.torch_private import forget_shardings, keeps_graph, may_be_split_again


def apply(
    setup: Setup, *, plan: Plan | str | None = None, sequence_parallel: bool = False
) -> Applied:
    """Hand each module of the plan to `parallelize_module`. The arguments are those of tp.py.

    Raises:
        UserError: as in tp.py; or fewer key heads than ranks, or shards of unequal length.
    """
    if not dist.is_initialized():
        raise UserError("DTensor needs a process group, even for one: torchrun --nproc_per_node=1")
    axis = setup.axis
    roles = plan_of(setup.whole_model, plan, axis, sequence_parallel=sequence_parallel)
    planned_by_name, layouts = arrange(setup, roles, sequence_parallel=sequence_parallel)
    for name, layout in layouts.items():
        if getattr(dict(layout.splits).get(axis.name), "copies", 1) > 1:
            raise UserError(
                f"DTensor cannot split {name}, which has fewer heads than there are ranks; give a "
                'smaller tp, or impl="hand"'
            )
    _refuse_uneven(setup.whole_model, planned_by_name, axis)
    forget_shardings()
    mesh = setup.mesh.device_mesh()[axis.name]
    shard = partial(_shard, mesh, planned_by_name, sequence_parallel=sequence_parallel)
    sync = shard(*setup.roots)
    if setup.stages is not None:
        shard(setup.stages.meta_model)
    compare_inputs(setup, planned_by_name, plan, sequence_parallel=sequence_parallel)
    check_before_first_forward(
        setup, plan, planned_by_name, layouts, shard, sequence_parallel=sequence_parallel
    )
    about = (
        "torch parallelize_module(ColwiseParallel, RowwiseParallel, "
        + ("SequenceParallel, " if sequence_parallel else "")
        + "one shared input layout for colwise layers that share an input), loss_parallel"
    )
    return Applied(layouts, sync, about, make_optimizer=_optimizer_with_separate_groups)


def _shard(
    mesh: DeviceMesh, plan: Mapping[str, Planned], model: nn.Module, *others: nn.Module,
    sequence_parallel: bool,
) -> "ThroughDTensor":  # fmt: skip
    """Shard a model, or a copy of it, as the plan says. In a pipeline `others` are its stages."""
    from torch.distributed.tensor import Replicate, Shard  # here: the import takes a second
    from torch.distributed.tensor.parallel import parallelize_module

    may_be_split_again(model)
    plan = _on_this_rank(model, plan)
    ties = [slots for slots in param_slots(model, *others).values() if len(slots) > 1]
    stream = Shard(1) if sequence_parallel else Replicate()  # (B, T, D)
    parallelize_module(model, mesh, _styles(model, plan, stream), src_data_rank=None)
    for parent in _shared_input_parents(plan):
        hook = ModuleHook(partial(_share_input, mesh, stream))
        model.get_submodule(parent).register_forward_pre_hook(hook)
    for (module, attribute), *rest in ties:
        for other, name in rest:
            other._parameters[name] = module._parameters[attribute]
    for name, planned in plan.items():
        module = model.get_submodule(name)
        if planned.role == "vocabulary" and isinstance(module, nn.Linear):
            module.register_forward_hook(ModuleHook(lambda m, args, y: SplitLogits(y)))
        elif planned.role == "rowwise":
            hook = ModuleHook(partial(_accept_unsharded, mesh, stream))
            module.register_forward_pre_hook(hook, prepend=True)
    return ThroughDTensor(model)


def _on_this_rank(model: nn.Module, plan: Mapping[str, Planned]) -> dict[str, Planned]:
    """The plan without the modules of other pipeline stages, which are missing or stand-ins."""
    local = dict(model.named_modules())
    return {
        name: planned
        for name, planned in plan.items()
        if isinstance(
            local.get(name), nn.Linear | nn.Embedding if planned.role in SPLIT else nn.Module
        )
    }


def _refuse_uneven(model: nn.Module, plan: Mapping[str, Planned], axis: Axis) -> None:
    """Raise UserError if shards have unequal sizes. Between colwise and rowwise layers shards are
    plain tensors, and DTensor assumes that they have one size on all ranks.
    """
    for name, planned in plan.items():
        if planned.role in ("colwise", "colwise_grouped", "colwise_gather_output", "rowwise"):
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise UserError(
                    f"DTensor splits nn.Linear, and {name} is a {type(linear).__name__}; give "
                    'impl="hand"'
                )
            width = linear.in_features if planned.role == "rowwise" else linear.out_features
            if width % axis.size:
                raise UserError(
                    f"DTensor splits into equal shards only, and {name} has {width} features for "
                    f"{axis.size} ranks of {axis.name}; the nearest degree that divides them is "
                    f'{nearest_degree(divisors(width), axis.size)}, or give impl="hand"'
                )


def _styles(model: nn.Module, plan: Mapping[str, Planned], stream: Any) -> dict[str, Any]:
    """Returns the plan as the library's styles. `stream`: the placement of the residual stream."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
    )

    replicate, sequence_parallel = Replicate(), isinstance(stream, Shard)
    styles: dict[str, Any] = {}
    for name, planned in plan.items():
        match planned.role:
            case "colwise" | "colwise_grouped":
                # A DTensor from `_share_input` keeps its own placement.
                styles[name] = ColwiseParallel(input_layouts=stream)
            case "colwise_gather_output":
                styles[name] = ColwiseParallel(input_layouts=stream, output_layouts=replicate)
            case "rowwise":
                styles[name] = RowwiseParallel(output_layouts=stream)
            case "vocabulary" if isinstance(model.get_submodule(name), nn.Embedding):
                styles[name] = RowwiseParallel(input_layouts=replicate, output_layouts=stream)
            case "vocabulary":
                styles[name] = ColwiseParallel(
                    input_layouts=stream, output_layouts=Shard(-1), use_local_output=False
                )
            case "sequence" if sequence_parallel:
                styles[name] = SequenceParallel(use_local_output=True)
            case "scatter_output" if sequence_parallel:
                styles[name] = PrepareModuleOutput(
                    output_layouts=replicate, desired_output_layouts=stream
                )
            case "gather_input" if sequence_parallel:
                styles[name] = PrepareModuleInput(
                    input_layouts=stream, desired_input_layouts=replicate, use_local_output=True
                )
    return styles


def _shared_input_parents(plan: Mapping[str, Planned]) -> set[str]:
    """Parents of several colwise layers. We assume that these read the parent's first argument."""
    parents = [
        n.rpartition(".")[0] for n, p in plan.items() if p.role in ("colwise", "colwise_grouped")
    ]
    return {parent for parent in parents if parent and parents.count(parent) > 1}


def _accept_unsharded(
    mesh: DeviceMesh, stream: Any, linear: nn.Linear, args: tuple[Any, ...]
) -> Any:
    """Let a rowwise layer without a colwise layer before it read unsharded features: as a DTensor,
    which RowwiseParallel redistributes.
    """
    from torch.distributed.tensor import DTensor

    x = args[0]
    if mesh.size() == 1 or isinstance(x, DTensor) or x.shape[-1] != linear.in_features:
        return None
    return DTensor.from_local(x, mesh, (stream,), run_check=False)


def _share_input(
    mesh: DeviceMesh, stream: Any, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Gather the first argument as a DTensor, once for all colwise layers that read it.
    PrepareModuleInput does this too, but must know the number of arguments.
    """
    from torch.distributed.tensor import DTensor, Replicate

    x = DTensor.from_local(args[0], mesh, (stream,), run_check=False)
    return x.redistribute(placements=(Replicate(),)), *args[1:]


@dataclass(frozen=True)
class SplitLogits:
    """Logits as a DTensor, with their cross entropy."""

    logits: Tensor

    def cross_entropy_sum(self, targets: Tensor) -> Tensor:
        rows = self.logits.flatten(0, -2)
        wide = rows if rows.dtype.itemsize >= 4 else rows.float()
        return _CrossEntropy.apply(wide, targets.flatten())


class _CrossEntropy(torch.autograd.Function):
    """rows (N, V_tp), targets (N,) -> the sum of their losses, as `loss_parallel` computes it.

    The loss and its backward must run inside the library's context, and nothing else should. So the
    loss has an autograd graph of its own, which the backward of the outer graph runs.
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
            (d_rows,) = torch.autograd.grad(ctx.loss, ctx.rows, dy, retain_graph=keeps_graph())
        return d_rows, None


class _Root(torch.autograd.Function):
    """The identity, as the root of a graph. A leaf there would keep the logits in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[None, None]:
        return None, None


@contextmanager
def _loss_parallel() -> Iterator[None]:
    """torch's `loss_parallel`, but also exited after an exception."""
    from torch.distributed.tensor.parallel import loss_parallel

    context = loss_parallel()
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


class ThroughDTensor(Sync):
    """Leaves gradients to the library. They may be partial until `finish` redistributes them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def finish(self) -> None:
        for parameter in self.model.parameters():
            grad: Any = parameter.grad
            placements = getattr(parameter, "placements", None)
            if grad is not None and placements is not None and grad.placements != placements:
                parameter.grad = grad.redistribute(placements=placements)


def _optimizer_with_separate_groups(
    cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Put the DTensors of each mesh, and plain parameters, into separate groups: no operation takes
    two of them at once. Under fsdp a parameter's mesh has tp as a dimension only if tp shards it.
    """
    separate_groups = []
    for group in groups:
        of_mesh: dict[Any, list[Any]] = {}
        for parameter in group["params"]:
            of_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        separate_groups += [group | {"params": params} for params in of_mesh.values()]
    return cls(separate_groups, **options)
