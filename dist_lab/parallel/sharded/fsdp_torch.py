"""PyTorch's own FSDP2, `fully_shard`, the twin of fsdp.py: the same shards, sums and order.

    In[B_X, D] . W[D_X, F] -> Out[B_X, F]     W[D_X, F] -> W[D, F]         before a unit is used
                                              dW[D, F]{U_X} -> dW[D_X, F]  after its backward

Parameters are DTensors, sharded along dim 0, and optimizers step on these. The library is set to
sum gradients, not to average them. By default it would keep the root's own parameters unsharded
after forward; here they are resharded like any unit's, so that both implementations send the same.
On CPU the library waits for each collective as soon as it has issued it, even for a prefetch.

FSDP2 does not shard scalars: they are replicated, and their gradients are summed in `finish`.
A norm with running statistics stays out of mixed precision, because it becomes a unit of its own.

Cost per step and memory: as fsdp.py, without flags. Zhao et al. 2023 (arXiv:2304.11277).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import Shard
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import (
    ParamSlot,
    owners,
    param_slots,
    refuse_recurrent,
    set_param,
)
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import ROOT, Applied, Phase, Sync
from dist_lab.step.setup import Setup
from dist_lab.torch_private import (
    StatisticsNorm,
    forget_unsharded_gradients,
    is_view,
    tree_map_only,
)


def apply(
    setup: Setup,
    *,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    keep_gathered: bool = False,
    defer_reduce: bool = False,
    prefetch: bool = True,
    find_unused: bool = False,
) -> Applied:
    """Apply `fully_shard` to each unit, the innermost first and the model last.

    Args:
        find_unused: allow parameters that are not used by every rank in every micro-batch. Without
            it, ranks that use different parameters wait for each other until a timeout. The other
            options are those of fsdp.py.

    Raises:
        UserError: for what the library cannot do: a parameter tied between two units that both have
            other parameters, trained parameters of several dtypes in one unit, no prefetching.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # slow

    if not prefetch:
        raise UserError('FSDP2 always prefetches; leave prefetch as it is, or give impl="hand"')
    if not dist.is_initialized():
        raise UserError("FSDP2 needs a process group, even for one: torchrun --nproc_per_node=1")
    model, axis, replicate = setup.model, setup.axes["fsdp"], setup.axes["dp"]
    units, param_dtype = setup.units, setup.param_dtype
    for dtype in (param_dtype, reduce_dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"parameters and gradients cannot be {dtype}; give a floating dtype")
    refuse_recurrent(model)
    slots = param_slots(model)
    layouts = setup.owing_sums(*(a for a in (axis, replicate) if a.size > 1))
    layouts |= {
        name: layouts[name].split(axis.name, Shard(0)) if p.dim() else layouts[name]
        for name, p in model.named_parameters()
    }
    names_of = _names_by_unit(model, slots, units)
    modules = dict(units)
    if param_dtype is not None:
        modules |= _make_norms_units(model, slots, names_of)
    mesh = _device_mesh(axis, replicate)

    def materialize(names: Sequence[str]) -> None:
        for name in names:
            if model.get_parameter(name).is_meta:
                set_param(slots[name], setup.full_value(name).to(axis.device))

    scalars = [name for name, p in model.named_parameters() if not p.dim()]
    materialize(scalars)

    sharded: dict[str, FSDPModule] = {}
    leaves: dict[str, Tensor] = {}
    for unit in sorted(names_of, key=lambda unit: sum(1 for _ in modules[unit].modules())):
        materialize(names_of[unit])
        params = {model.get_parameter(name) for name in names_of[unit]}
        compute_dtype = None if isinstance(modules[unit], StatisticsNorm) else param_dtype
        modules[unit].register_forward_hook(ModuleHook(_without_views))  # before the library's own
        own_dtype = next((p.dtype for p in params if p.requires_grad), None)
        sum_dtype = reduce_dtype or (own_dtype if compute_dtype else None)
        try:
            fully_shard(
                modules[unit],
                mesh=mesh,
                reshard_after_forward=reshard_after_forward,
                mp_policy=MixedPrecisionPolicy(compute_dtype, sum_dtype),
                ignored_params={p for p in modules[unit].parameters() if p not in params},
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"FSDP2 refuses {unit or 'the model'}: {error}") from error
        module = modules[unit]
        assert isinstance(module, FSDPModule), unit
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.unshard()  # once, so that the library makes the leaves
        leaves |= {name: model.get_parameter(name) for name in names_of[unit]}
        module.reshard()
        sharded[unit] = module
    sharded[ROOT].set_reduce_scatter_unused_params(find_unused)
    sync = ThroughFSDP(
        model=model, sharded=sharded, leaves=leaves, axis=axis, replicate=replicate,
        scalars=[name for name in scalars if layouts[name].partial],
        reshard_after_forward=reshard_after_forward, keep_gathered=keep_gathered,
        defer_reduce=defer_reduce, find_unused=find_unused,
    )  # fmt: skip
    about = (
        f"torch fully_shard of {len(sharded) - 1} units and the model(mesh={tuple(mesh.shape)}, "
        f"reshard_after_forward={reshard_after_forward}, "
        f"MixedPrecisionPolicy({param_dtype}, {reduce_dtype or 'as kept'}), gradient_divide_factor="
        "1, force_sum_reduction_for_comms=True, "
        f"keep_gathered={keep_gathered}, defer_reduce={defer_reduce}, "
        f"reduce_scatter_unused_params={find_unused}), prefetching as it does by default"
    )
    return Applied(layouts, sync, about, leaves, sharded_between_units=bool(leaves))


@dataclass(eq=False, kw_only=True)
class ThroughFSDP(Sync):
    """Leaves communication to the library's hooks, and changes its settings during a step."""

    model: nn.Module
    sharded: Mapping[str, Any]  # unit -> its module, which is an FSDPModule now
    leaves: Mapping[str, Tensor]  # name -> the unsharded parameter, to whose `.grad` backward adds
    axis: Axis
    replicate: Axis
    scalars: Sequence[str]  # names of 0-dim trained parameters, which the library ignores
    reshard_after_forward: bool
    keep_gathered: bool
    defer_reduce: bool
    find_unused: bool

    last = True  # this micro-batch is the last of the step
    keep_unsharded = False  # units stay unsharded until the last micro-batch's backward
    is_reduction_due = False  # a backward has left gradients for a later one to reduce
    has_begun = False  # the library's hooks have seen this forward begin
    has_ended = True  # the last forward or backward ended without an exception

    def __post_init__(self) -> None:
        self.root = self.sharded[ROOT]
        self.used: list[set[str]] = []  # names with a gradient, for each forward since finish()
        # Before the library's own hook, because an exception may have left it in a wrong state.
        self.model.register_forward_pre_hook(ModuleHook(self._before_forward), prepend=True)
        self.model.register_forward_hook(ModuleHook(self._after_forward))

    def microbatch(self, *, last: bool) -> None:
        if last != self.last:
            self.last = last
            if self.defer_reduce:
                self.root.set_requires_gradient_sync(last)
            elif self.replicate.size > 1:
                self.root.set_requires_all_reduce(last)
            if self.keep_gathered:
                self.root.set_reshard_after_backward(last)

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            self.has_ended = False
        elif unit == ROOT:
            self.has_begun = True
            if torch.is_grad_enabled():
                self.used.append(set())
            if self.keep_gathered:
                keep = self.keep_unsharded or not self.reshard_after_forward
                self.root.set_reshard_after_forward(not keep)

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.BACKWARD:
            if unit == ROOT:
                self.has_ended = True
                self.keep_unsharded = self.keep_gathered and not self.last
                self.is_reduction_due = not self.last and (
                    self.defer_reduce or self.replicate.size > 1
                )
        elif not torch.is_grad_enabled():  # no backward will follow and reshard it
            for name, module in self.sharded.items():
                if unit in (ROOT, name):
                    module.reshard()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.used[-1].update(names)

    def finish(self) -> None:
        used, self.used = [names for names in self.used if names], []
        if self.is_reduction_due:
            raise UserError(
                "finish() before a last micro-batch: FSDP2 sums the gradients of all micro-batches "
                "in the backward of the last one; wrap the last one in job.microbatch(last=True)"
            )
        used_once: set[str] = set().union(*used)
        uneven = sorted(name for name in used_once if not all(name in names for names in used))
        if uneven and not self.find_unused and not self.defer_reduce and self.replicate.size > 1:
            raise UserError(
                f"{uneven[0]} was not used in each micro-batch, so FSDP2 has lost the gradient "
                "that other replicas have for it; give find_unused=True"
            )
        self._sum_scalars(used_once)
        for module in self.sharded.values():
            module.reshard()
        self.keep_unsharded = False

    def _sum_scalars(self, used: set[str]) -> None:
        """Sum the gradients of scalars, and clear those of unused parameters, which are 0."""
        trained = [name for name, leaf in self.leaves.items() if leaf.requires_grad]
        names = [*self.scalars, *(trained if self.find_unused else ())]
        if not names:
            return
        gradients = [self.model.get_parameter(name).grad for name in self.scalars]
        flags = [g is not None for g in gradients] + [n in used for n in names[len(gradients) :]]
        values = [0.0 if g is None else float(g) for g in gradients]
        sums = torch.tensor([*values, *flags], dtype=torch.float64, device=self.axis.device)
        for axis in (self.axis, self.replicate):
            sums = ops.all_reduce(sums, axis)
        for name, value in zip(self.scalars, sums, strict=False):
            parameter = self.model.get_parameter(name)
            parameter.grad = value.to(parameter.dtype)
        for name, users in zip(names, sums[len(self.scalars) :].tolist(), strict=True):
            if users == 0:
                self.model.get_parameter(name).grad = None

    def forget(self) -> None:
        self.used, self.keep_unsharded, self.is_reduction_due = [], False, False
        if self.has_begun:
            self._reset()

    def _reset(self) -> None:
        self.root.reset_iter_state()
        for leaf in self.leaves.values():
            leaf.grad = None
        for module in self.sharded.values():
            forget_unsharded_gradients(module)
        self.has_ended = True

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.leaves.values():
            yield "gathered", leaf

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self.has_ended:
            self._reset()
        self.has_begun = self.has_ended = False

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.has_ended = True


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    """Replace each view in the output, such as a Linear's, by a tensor that is not a view.

    The library puts backward hooks on the output. A view that is changed in place loses its hook,
    so the library warns of every view.
    """
    return tree_map_only(Tensor, lambda x: _NoView.apply(x) if is_view(x) else x, output)


class _NoView(torch.autograd.Function):
    """The identity, on the same memory. For autograd the output is not a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return dy[0]


def _names_by_unit(
    model: nn.Module, slots: Mapping[str, list[ParamSlot]], units: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """Unit -> names of the parameters that it shards. Raises UserError if FSDP2 cannot."""
    names_of: dict[str, list[str]] = {ROOT: []}
    for name, unit in owners(slots, units).items():
        if model.get_parameter(name).dim():
            names_of.setdefault(unit, []).append(name)
    for unit, names in names_of.items():
        dtypes = {p.dtype for p in map(model.get_parameter, names) if p.requires_grad}
        if len(dtypes) > 1:
            dtype_names = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            raise UserError(
                f"FSDP2 needs trained parameters of one dtype in a unit, {unit or 'the model'} has "
                f'{dtype_names}; give each a unit, or impl="hand"'
            )
        inside = set(units[unit].modules())
        inner = [m for u, m in units.items() if u in names_of and u != unit and m in inside]
        in_inner = {module for unit_module in inner for module in unit_module.modules()}
        for name in names:
            if all(module in in_inner for module, _ in slots[name]):  # fully_shard skips these
                raise UserError(
                    f"FSDP2 cannot shard {name}, tied between units that have parameters of their "
                    'own; make one unit around them, or give impl="hand"'
                )
    return names_of


def _make_norms_units(
    model: nn.Module, slots: Mapping[str, list[ParamSlot]], names_of: dict[str, list[str]]
) -> dict[str, nn.Module]:
    """Make each norm with running statistics a unit: see transforms/precision.py."""
    norms: dict[str, nn.Module] = {
        path: m for path, m in model.named_modules() if isinstance(m, StatisticsNorm)
    }
    for path, norm in norms.items():
        in_norm = [n for n, places in slots.items() if all(module is norm for module, _ in places)]
        for unit, names in names_of.items():
            names_of[unit] = [name for name in names if name not in in_norm]
        names_of[path] = in_norm
    return norms


def _device_mesh(axis: Axis, replicate: Axis) -> DeviceMesh:
    """Make the DeviceMesh of these axes, on their own process groups."""
    rank, kind = axis.ranks[axis.index], axis.device.type
    group = axis.group_even_of_one()
    if replicate.group is None:
        return DeviceMesh.from_group(group, kind, mesh_dim_names=(axis.name,))
    rows = [[shard + other - rank for shard in axis.ranks] for other in replicate.ranks]
    return DeviceMesh.from_group(
        [replicate.group, group], kind, rows, mesh_dim_names=(replicate.name, axis.name)
    )
