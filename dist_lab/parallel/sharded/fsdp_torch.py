"""PyTorch's own FSDP2, `fully_shard`, the twin of fsdp.py: the same shards, sums and order.

    In[B_X, D] . W[D_X, F] -> Out[B_X, F]     W[D_X, F] -> W[D, F]         before a unit is used
                                              dW[D, F]{U_X} -> dW[D_X, F]  after its backward

Parameters are DTensors, sharded along dim 0, and optimizers step on these. The library is set to
sum gradients, not to average them. By default it would keep the root's own parameters unsharded
after forward; here they are resharded like any unit's, so that both implementations send the same.
On CPU the library waits for each collective as soon as it has issued it, even for a prefetch.

FSDP2 does not shard scalars: they are replicated, and their gradients are summed in `finish`.
A norm with running statistics stays out of mixed precision, because it becomes a unit of its own.

After tp, whose parameters are DTensors already, it shards each rank's part once more: the layout is
that of ours. In a pipeline it is applied to the units inside each stage, and then to the stage. As
in torchtitan, a stage stays gathered from its first forward until its gradients are reduced.

Cost per step and memory: as fsdp.py, without flags. Zhao et al. 2023 (arXiv:2304.11277).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.layout.layout import Shard
from dist_lab.parallel.param_slots import (
    ParamSlot,
    owners,
    param_slots,
    refuse_recurrent,
    set_param,
)
from dist_lab.parallel.sharded.through_fsdp import ThroughFSDP, ThroughStages, without_views
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import ROOT, Applied, Sync
from dist_lab.step.setup import Setup
from dist_lab.torch_private import StatisticsNorm, swap_also


def apply(
    setup: Setup,
    *,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool | None = None,
    keep_gathered: bool = False,
    defer_reduce: bool | None = None,
    prefetch: bool = True,
    find_unused: bool = False,
) -> Applied:
    """Apply `fully_shard` to each unit, the innermost first and the model last.

    Args:
        find_unused: allow parameters that are not used by every rank in every micro-batch. Without
            it, ranks that use different parameters wait for each other until a timeout. The other
            options are those of fsdp.py. In a pipeline reshard_after_forward is off by default.

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
    param_dtype, in_pipeline = setup.param_dtype, setup.stages is not None
    for dtype in (param_dtype, reduce_dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"parameters and gradients cannot be {dtype}; give a floating dtype")
    if in_pipeline and defer_reduce is False:
        raise UserError(
            "PyTorch's pipelining reduces a stage's gradients once, after its last backward; leave "
            'defer_reduce as it is, or give impl="hand"'
        )
    if in_pipeline and find_unused and (param_dtype or reduce_dtype):
        # It keeps such gradients where we do not see which there are: see ThroughStages.
        raise UserError(
            "in a pipeline FSDP2 takes find_unused only without param_dtype and reduce_dtype; "
            'leave these out, or give impl="hand"'
        )
    if reshard_after_forward is None:
        reshard_after_forward = not in_pipeline
    reshard_after_forward = reshard_after_forward and not (in_pipeline and keep_gathered)
    refuse_recurrent(model)
    modules = {**setup.inner_units, **setup.units}
    roots = [*setup.stages.units] if setup.stages else [ROOT]
    slots, inside = param_slots(*setup.roots), {m for r in roots for m in modules[r].modules()}
    # A layer of another stage may hold a parameter that is tied to one of this stage.
    outside = {n: [slot for slot in places if slot[0] not in inside] for n, places in slots.items()}
    own_slots = {n: [slot for slot in slots[n] if slot not in outside[n]] for n in slots}
    layouts = setup.owing_sums(*(a for a in (axis, replicate) if a.size > 1))
    layouts = {
        name: layout.split(axis.name, Shard(0)) if layout.shape else layout
        for name, layout in layouts.items()
    }
    with together(setup.mesh.world):  # the ranks of other stages may not have such a parameter
        names_of = _names_by_unit(model, own_slots, modules, roots)
    if param_dtype is not None:
        modules |= _make_norms_units(model, own_slots, names_of)
    mesh = setup.mesh.device_mesh()
    mesh = mesh[replicate.name, axis.name] if replicate.size > 1 else mesh[axis.name]

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
        modules[unit].register_forward_hook(ModuleHook(without_views))  # before the library's own
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
        for name in filter(outside.get, names_of[unit]):
            swap_also(module, own_slots[name][0], outside[name])
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.unshard()  # once, so that the library makes the leaves
        leaves |= {name: model.get_parameter(name) for name in names_of[unit]}
        module.reshard()
        sharded[unit] = module
    for unit in roots:
        sharded[unit].set_reduce_scatter_unused_params(find_unused)
    known: dict[str, Any] = {
        "model": model, "sharded": sharded, "roots": roots, "leaves": leaves, "axis": axis,
        "replicate": replicate, "find_unused": find_unused,
        "scalars": [name for name in scalars if layouts[name].partial],
    }  # fmt: skip
    sync: Sync = ThroughStages(**known) if in_pipeline else ThroughFSDP(
        **known, reshard_after_forward=reshard_after_forward, keep_gathered=keep_gathered,
        defer_reduce=bool(defer_reduce),
    )  # fmt: skip
    whole = "each stage" if in_pipeline else "the model"
    about = (
        f"torch fully_shard of {len(sharded) - len(roots)} units and {whole}"
        f"(mesh={tuple(mesh.shape)}, reshard_after_forward={reshard_after_forward}, "
        f"MixedPrecisionPolicy({param_dtype}, {reduce_dtype or 'as kept'}), gradient_divide_factor="
        "1, force_sum_reduction_for_comms=True, "
        + ("" if in_pipeline else f"keep_gathered={keep_gathered}, defer_reduce={defer_reduce}, ")
        + f"reduce_scatter_unused_params={find_unused}), prefetching as it does by default"
    )
    return Applied(
        layouts, sync, about, leaves, sharded_between_units=bool(leaves),
        unshard_each_action=in_pipeline and reshard_after_forward,
    )  # fmt: skip


def _names_by_unit(
    model: nn.Module, slots: Mapping[str, list[ParamSlot]], units: Mapping[str, nn.Module],
    roots: Sequence[str],
) -> dict[str, list[str]]:  # fmt: skip
    """Unit -> names of the parameters that it shards. Raises UserError if FSDP2 cannot."""
    names_of: dict[str, list[str]] = {root: [] for root in roots}
    for name, unit in owners(slots, units).items():
        if unit == ROOT and ROOT not in roots:
            why = "untie" if slots[name] else "miss"
            where = "two stages of one rank" if slots[name] else "no stage"
            raise UserError(
                f'FSDP2 would {why} {name}, which is in {where}; give schedule="1f1b", or '
                'impl="hand"'
            )
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
