"""PyTorch's own FSDP2, `fully_shard`, the twin of fsdp.py: the same pieces, sums and moments.

    In[B_X, D] . W[D_X, F] -> Out[B_X, F]     W[D_X, F] -> W[D, F]         before a unit is used
                                              dW[D, F]{U_X} -> dW[D_X, F]  after its backward

Parameters are DTensors, split along dim 0, and optimizers step on those. Gradients are added up and
not averaged, by the library's own switches. The model's own parameters are resharded as any unit's
are, where the library would by default keep them, so that both send the same. On CPU it waits for
each collective where it starts it, also for one that it prefetches.

Scalars it does not split: they stay whole on every rank, their gradients are summed in `finish`.
Normalization with running statistics stays out of mixed precision by being a unit of its own.

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
from dist_lab.step.protocol import ROOT, Applied, Phase, Setup, Sync
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
    """Hand each unit, the innermost first and the model last, to `fully_shard`.

    Args:
        find_unused: allow parameters that are not used by every rank in every micro-batch. Without
            it, ranks that differ in this wait for each other until they run out of time.
        The others are those of fsdp.py.

    Raises:
        UserError: what the library cannot do: a parameter tied between two units that have others
            too, trained ones of several dtypes in one unit, no prefetching.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # a second

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
    found = param_slots(model)
    owing = setup.owing_sums(*(a for a in (axis, replicate) if a.size > 1))
    layouts = owing | {
        name: owing[name].split(axis.name, Shard(0)) if p.dim() else owing[name]
        for name, p in model.named_parameters()
    }
    own = _own_parameters(model, found, units)
    modules = dict(units)
    if param_dtype is not None:
        modules |= _set_norms_apart(model, found, own)
    mesh = _device_mesh(axis, replicate)

    def materialize(names: Sequence[str]) -> None:
        for name in names:
            if model.get_parameter(name).is_meta:
                set_param(found[name], setup.full_value(name).to(axis.device))

    scalars = [name for name, p in model.named_parameters() if not p.dim()]
    materialize(scalars)

    sharded: dict[str, FSDPModule] = {}
    leaves: dict[str, Tensor] = {}
    for unit in sorted(own, key=lambda unit: sum(1 for _ in modules[unit].modules())):
        materialize(own[unit])
        mine = {model.get_parameter(name) for name in own[unit]}
        narrow = None if isinstance(modules[unit], StatisticsNorm) else param_dtype
        modules[unit].register_forward_hook(ModuleHook(_own_output))  # before the library's own
        summed_in = reduce_dtype or next((p.dtype for p in mine if p.requires_grad), None)
        try:
            fully_shard(
                modules[unit],
                mesh=mesh,
                reshard_after_forward=reshard_after_forward,
                mp_policy=MixedPrecisionPolicy(narrow, summed_in if narrow else reduce_dtype),
                ignored_params={p for p in modules[unit].parameters() if p not in mine},
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"FSDP2 refuses {unit or 'the model'}: {error}") from error
        module = modules[unit]
        assert isinstance(module, FSDPModule), unit
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.unshard()  # this once, because the leaves are made by it
        leaves |= {name: model.get_parameter(name) for name in own[unit]}
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
    """Leaves everything to the library, which has hooks of its own; tells it which moment it is."""

    model: nn.Module
    sharded: Mapping[str, Any]  # unit -> the module that it has become, an FSDPModule
    leaves: Mapping[str, Tensor]  # name -> the whole parameter, into which backward adds
    axis: Axis
    replicate: Axis
    scalars: Sequence[str]  # trained parameters that the library knows nothing of
    reshard_after_forward: bool
    keep_gathered: bool
    defer_reduce: bool
    find_unused: bool

    last = True  # nothing follows the micro-batch that is under way
    keep_unsharded = False  # units stay whole until the last micro-batch's backward
    owed = False  # a backward has left gradients for a later one to reduce
    begun = False  # this forward, and the library knows of it
    ended = True  # the last forward and the last backward have, without an exception

    def __post_init__(self) -> None:
        self.root = self.sharded[ROOT]
        self.used: list[set[str]] = []  # by each forward since finish(), as its backward shows
        # Before the library's own hook, which an exception in the last step may have confused.
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
            self.ended = False
        elif unit == ROOT:
            self.begun = True
            if torch.is_grad_enabled():
                self.used.append(set())
            if self.keep_gathered:
                keep = self.keep_unsharded or not self.reshard_after_forward
                self.root.set_reshard_after_forward(not keep)

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.BACKWARD:
            if unit == ROOT:
                self.ended = True
                self.keep_unsharded = self.keep_gathered and not self.last
                self.owed = not self.last and (self.defer_reduce or self.replicate.size > 1)
        elif not torch.is_grad_enabled():  # no backward follows that would do it
            for name, module in self.sharded.items():
                if unit in (ROOT, name):
                    module.reshard()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.used[-1].update(names)

    def finish(self) -> None:
        used, self.used = [names for names in self.used if names], []
        if self.owed:
            raise UserError(
                "finish() before a last micro-batch, in whose backward FSDP2 sums the gradients of "
                "all: wrap that one in job.microbatch(last=True)"
            )
        anywhere: set[str] = set().union(*used)
        uneven = sorted(name for name in anywhere if not all(name in names for names in used))
        if uneven and not self.find_unused and not self.defer_reduce and self.replicate.size > 1:
            raise UserError(
                f"{uneven[0]} was not used in each micro-batch, and FSDP2 has lost what its "
                "gradient was on other replicas; give find_unused=True"
            )
        self._sum_scalars(anywhere)
        for module in self.sharded.values():
            module.reshard()
        self.keep_unsharded = False

    def _sum_scalars(self, used: set[str]) -> None:
        """Sum the gradients of scalars, and clear those of unused parameters, which come as 0."""
        told = [name for name, leaf in self.leaves.items() if leaf.requires_grad]
        names = [*self.scalars, *(told if self.find_unused else ())]
        if not names:
            return
        gradients = [self.model.get_parameter(name).grad for name in self.scalars]
        flags = [g is not None for g in gradients] + [n in used for n in names[len(gradients) :]]
        mine = [0.0 if g is None else float(g) for g in gradients]
        both = torch.tensor([*mine, *flags], dtype=torch.float64, device=self.axis.device)
        for axis in (self.axis, self.replicate):
            both = ops.all_reduce(both, axis)
        for name, value in zip(self.scalars, both, strict=False):
            parameter = self.model.get_parameter(name)
            parameter.grad = value.to(parameter.dtype)
        for name, ranks in zip(names, both[len(self.scalars) :].tolist(), strict=True):
            if ranks == 0:
                self.model.get_parameter(name).grad = None

    def forget(self) -> None:
        self.used, self.keep_unsharded, self.owed = [], False, False
        if self.begun:
            self._reset()

    def _reset(self) -> None:
        self.root.reset_iter_state()
        for leaf in self.leaves.values():
            leaf.grad = None
        for module in self.sharded.values():
            forget_unsharded_gradients(module)
        self.ended = True

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.leaves.values():
            yield "gathered", leaf

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self.ended:
            self._reset()
        self.begun = self.ended = False

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ended = True


def _own_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Return the output with no tensor in it a view, as a Linear's often is.

    The library hooks its backward into the output. Of a view that is changed in place the hook is
    lost, of which it warns at every view.
    """
    return tree_map_only(Tensor, lambda x: _NoView.apply(x) if is_view(x) else x, output)


class _NoView(torch.autograd.Function):
    """The identity on the same memory; what it gives is a view of nothing to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return dy[0]


def _own_parameters(
    model: nn.Module, found: Mapping[str, list[ParamSlot]], units: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """Map each unit to the parameters that it is to split. A unit that has none is left out.

    Raises:
        UserError: the library would not find one, or cannot have it in a unit with the others.
    """
    own: dict[str, list[str]] = {ROOT: []}
    for name, unit in owners(found, units).items():
        if model.get_parameter(name).dim():
            own.setdefault(unit, []).append(name)
    for unit, names in own.items():
        dtypes = {p.dtype for p in map(model.get_parameter, names) if p.requires_grad}
        if len(dtypes) > 1:
            said = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise UserError(
                f"FSDP2 takes trained parameters of one dtype in a unit, {unit or 'the model'} has "
                f'{said}; give each a unit, or impl="hand"'
            )
        inside = set(units[unit].modules())
        before = [m for u, m in units.items() if u in own and u != unit and m in inside]
        split_before = {part for module in before for part in module.modules()}
        for name in names:
            if all(module in split_before for module, _ in found[name]):  # it does not look there
                raise UserError(
                    f"FSDP2 cannot have {name} tied between units that have parameters of their "
                    'own; make one unit around them, or give impl="hand"'
                )
    return own


def _set_norms_apart(
    model: nn.Module, found: Mapping[str, list[ParamSlot]], own: dict[str, list[str]]
) -> dict[str, nn.Module]:
    """Make units of what computes in the dtype of its running statistics: see precision.py."""
    apart: dict[str, nn.Module] = {
        path: m for path, m in model.named_modules() if isinstance(m, StatisticsNorm)
    }
    for path, norm in apart.items():
        names = [name for name, own in found.items() if all(module is norm for module, _ in own)]
        for unit in own:
            own[unit] = [name for name in own[unit] if name not in names]
        own[path] = names
    return apart


def _device_mesh(axis: Axis, replicate: Axis) -> DeviceMesh:
    """Make the DeviceMesh of these axes, on their own process groups."""
    me, kind = axis.ranks[axis.index], axis.device.type
    group = axis.group_even_of_one()
    if replicate.group is None:
        return DeviceMesh.from_group(group, kind, mesh_dim_names=(axis.name,))
    rows = [[split + copy - me for split in axis.ranks] for copy in replicate.ranks]
    return DeviceMesh.from_group(
        [replicate.group, group], kind, rows, mesh_dim_names=(replicate.name, axis.name)
    )
