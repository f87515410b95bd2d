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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dist_lab.errors import UserError
from dist_lab.layout.layout import Shard
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import ParamSlot, owners, param_slots, set_param
from dist_lab.parallel.replicated.ddp_wrapper import ROOT, ThroughFSDP
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import Applied, Setup
from dist_lab.torch_private import StatisticsNorm, is_view, tree_map_only


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
        raise UserError("FSDP2 always prefetches; leave prefetch as it is, or give --impl hand")
    if not dist.is_initialized():
        raise UserError("FSDP2 needs a process group, even for one: torchrun --nproc_per_node=1")
    model, axis, replicate = setup.model, setup.axes["fsdp"], setup.axes["dp"]
    units, param_dtype = setup.units, setup.param_dtype
    for dtype in (param_dtype, reduce_dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"parameters and gradients cannot be {dtype}; give a floating dtype")
    found = param_slots(model)
    owing = setup.owing_sums(*(a for a in (axis, replicate) if a.size > 1))
    layouts = {
        name: owing[name].split(axis.name, Shard(0)) if p.dim() else owing[name]
        for name, p in model.named_parameters()
    }
    own = _own_parameters(model, found, units)
    modules = dict(units)
    if param_dtype is not None:
        modules |= _set_norms_apart(model, found, own)
    mesh = _device_mesh(axis, replicate)
    scalars = [name for name, p in model.named_parameters() if not p.dim()]
    _come_to_life(model, scalars, found, setup.full_value, axis.wire.device)

    sharded: dict[str, FSDPModule] = {}
    leaves: dict[str, Tensor] = {}
    for unit in sorted(own, key=lambda unit: sum(1 for _ in modules[unit].modules())):
        _come_to_life(model, own[unit], found, setup.full_value, axis.wire.device)
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
        model, sharded, leaves, axis, replicate, scalars=[n for n in scalars if layouts[n].partial],
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


def _own_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The output, of which no tensor is a view, as a Linear's often is.

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
    """Unit -> the parameters that it is to split. A unit that has none is left out.

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
                f"{said}; give each a unit, or --impl hand"
            )
        inside = set(units[unit].modules())
        before = [m for u, m in units.items() if u in own and u != unit and m in inside]
        split_before = {part for module in before for part in module.modules()}
        for name in names:
            if all(module in split_before for module, _ in found[name]):  # it does not look there
                raise UserError(
                    f"FSDP2 cannot have {name} tied between units that have parameters of their "
                    "own; make one unit around them, or give --impl hand"
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


def _come_to_life(
    model: nn.Module,
    names: Sequence[str],
    found: Mapping[str, list[ParamSlot]],
    full_value: Callable[[str], Tensor],
    device: torch.device,
) -> None:
    """Give parameters on the meta device their values."""
    for name in names:
        if model.get_parameter(name).is_meta:
            set_param(found[name], full_value(name).to(device))


def _device_mesh(axis: Axis, replicate: Axis) -> DeviceMesh:
    """The axes as the library wants them, on their own process groups."""
    me, kind = axis.ranks[axis.index], axis.wire.device.type
    group = axis.group_even_of_one()
    if replicate.group is None:
        return DeviceMesh.from_group(group, kind, mesh_dim_names=(axis.name,))
    rows = [[split + copy - me for split in axis.ranks] for copy in replicate.ranks]
    return DeviceMesh.from_group(
        [replicate.group, group], kind, rows, mesh_dim_names=(replicate.name, axis.name)
    )
