"""parallelize(): the one place that puts strategies together, and refuses what cannot be.

A strategy is a function `apply(setup) -> Applied` that changes the module in place and no
parameter's name. To add one, write it in parallel/, and give it a row in programs/cli/registry.py.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dist_lab.comm.agree import check_shapes_agree, check_tensors_agree
from dist_lab.comm.anything import broadcast_anything, refuse_what_cannot_be_sent
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.layout.layout import Layout, holds
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.programs.cli.registry import (
    MIXES,
    ORDER_OF_APPLICATION,
    REFUSED,
    STRATEGIES,
    Casts,
    Impl,
)
from dist_lab.step.claims import claim, refuse_claimed
from dist_lab.step.eager import Runner
from dist_lab.step.guards import Guards, GuardsOff, GuardsOn
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.nonfinite import FirstNonFinite
from dist_lab.step.protocol import ROOT, Applied, Apply, Chain, Setup, Sync
from dist_lab.step.same_buffers import SameBuffers
from dist_lab.step.writes import RefuseWrites
from dist_lab.transforms.batchnorm import convert_batchnorm
from dist_lab.transforms.deferred_init import deferred_init, is_meta, materialize
from dist_lab.transforms.init import InitFn
from dist_lab.transforms.precision import compute_in
from dist_lab.transforms.recompute import recompute as recompute_units


@dataclass(frozen=True)
class Part:
    """One strategy of those that are applied: what it does, and the axes that it runs along."""

    label: str
    apply: Apply
    axes: tuple[str, ...]
    impl: Impl


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    strategy: str | Apply = "dp",
    impl: str = "hand",
    *,
    units: Iterable[type[nn.Module] | str] = (),
    param_dtype: torch.dtype | None = None,
    recompute: int = 0,
    broadcast: bool = True,
    seed: int = 0,
    init_fn: InitFn | None = None,
    sync_batchnorm: bool = False,
    **options: Any,
) -> Job:
    """Make a model train on a mesh, in place.

    Args:
        strategy: a name from STRATEGIES, or a function `apply(setup)` of one's own, which runs
            along dp.
        units: classes of modules, their names, or names of modules: what is unsharded, reduced,
            recomputed and logged as one.
        param_dtype: compute in this dtype, keeping the parameters as float32 masters.
        recompute: recompute every k-th unit in backward: 1 all, 0 none.
        broadcast: start from rank 0's weights and buffers. False: they must be equal already.
        seed, init_fn: for a model on the meta device, whose parameters are drawn here, each rank
            drawing what it keeps: `init_fn(name, tensor, generator)` fills a whole parameter, and
            the generator is that of (seed, name). Default: the model's own `init_weight`.
        sync_batchnorm: BatchNorm takes its statistics over the rows of all ranks.
        options: the strategy's own, as its `apply` lists them: ddp's bucket_mb.

    Raises:
        UserError: an unknown strategy or option, a mesh it does not fit, a unit that matches
            nothing, an optimizer that was built before, a model that is partly on the meta device,
            or weights that differ with broadcast=False.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"parallelize takes a module that has been built, not {model!r:.60}")
    part = _part(strategy, impl)
    _refuse_other_axes(part, strategy, mesh)
    _refuse_unknown_options(part, options)
    _refuse_what_cannot_train(model, ranks=mesh.size)
    refuse_claimed(model)
    _refuse_earlier_optimizers(model)
    if sync_batchnorm and not set(part.axes) & set(DATA_AXES):
        raise UserError(
            f"{strategy} shares out no rows for sync_batchnorm to put together; leave it out"
        )
    drawn = is_meta(model)
    full_value = _own_value(model)
    if drawn and part.impl.draws:
        full_value = deferred_init(model, seed, mesh.device, init_fn)
    elif drawn:
        materialize(model, seed, mesh.device, init_fn)
    _agree(model, mesh, broadcast and not drawn)
    if sync_batchnorm:
        convert_batchnorm(model, mesh.channel(*DATA_AXES))
    named = {ROOT: model, **find_units(model, units)}
    recompute_units(model, named, recompute)
    names = [name for name, _ in model.named_parameters()]
    first_of = {id(p): name for name, p in model.named_parameters()}
    state = {n: first_of.get(id(t), n) for n, t in model.state_dict(keep_vars=True).items()}

    layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
    setup = Setup(model, mesh, {}, layouts, full_value, named, param_dtype, recompute)
    applied = _fold(setup, [(part, options)])
    here = [name for name, _ in model.named_parameters()]
    held = [n for n, where in applied.layouts.items() if holds(where, mesh.coordinates)]
    assert names == list(applied.layouts), "a strategy changes no parameter's name"
    assert here == held, "a model has the parameters that its layouts put on this rank"
    leaves = dict(model.named_parameters()) | dict(applied.leaves)
    watch = FirstNonFinite(leaves, accumulates=applied.make_runner is not None)
    claim(model, applied.layouts)
    guards = Guards(model, applied, mesh)
    lost_or_drifts = mesh.data.size > 1 or applied.sharded_between_units
    after: list[Sync] = [RefuseWrites(leaves, applied.unit_of)] if lost_or_drifts else []
    if mesh.data.size > 1:
        buffers = [name for name, _ in model.named_buffers() if name in state]
        after.append(SameBuffers(model, buffers, mesh.data))
    chain = Chain(Chain(GuardsOff(guards), watch), applied.sync, GuardsOn(guards), *after)
    runner = (applied.make_runner or Runner)(model, chain, mesh.comm, named, applied)
    if param_dtype is not None and part.impl.casts is not Casts.ALL:
        # After the runner, so that its hooks come first: a unit computes with what is cast.
        compute_in(model, param_dtype, parameters=part.impl.casts is not Casts.PARAMETERS)
    guards.guard_parameters()
    return Job(model, mesh, applied, runner, watch, state)


def _fold(setup: Setup, parts: Sequence[tuple[Part, Mapping[str, Any]]]) -> Applied:
    """Apply strategies one after another, in their order.

    Args:
        setup: of the model as it is, which runs along no axis yet.
        parts: each strategy with its options.
    """
    whole: Applied | None = None
    for part, options in sorted(parts, key=_place_in_order):
        setup = replace(setup, axes={name: setup.mesh.channel(name) for name in part.axes})
        applied = part.apply(setup, **options)
        if not isinstance(applied, Applied):
            raise UserError(f"a strategy returns Applied(layouts, sync), this one {applied!r:.60}")
        so_far = setup.layouts.items()
        assert all(applied.layouts[n].extends(where) for n, where in so_far), part.label
        whole = applied if whole is None else _together(whole, applied)
        setup = replace(setup, layouts=applied.layouts, full_value=_own_value(setup.model))
    assert whole is not None, "no strategy"
    return whole


def _place_in_order(part: tuple[Part, Any]) -> int:
    axes = set(part[0].axes)
    return next(i for i, family in enumerate(ORDER_OF_APPLICATION) if axes & set(family))


def _together(outer: Applied, inner: Applied) -> Applied:
    """What two strategies did, one after the other. Gradients travel inner to outer."""
    return replace(
        inner,
        sync=Chain(inner.sync, outer.sync),
        about=", ".join(filter(None, [outer.about, inner.about])),
        leaves={**outer.leaves, **inner.leaves},
        stepped={**outer.stepped, **inner.stepped},
        sharded_between_units=outer.sharded_between_units or inner.sharded_between_units,
        unit_of={**outer.unit_of, **inner.unit_of},
        make_optimizer=inner.make_optimizer or outer.make_optimizer,
        make_runner=inner.make_runner or outer.make_runner,
        buffers={**outer.buffers, **inner.buffers},
    )


def _part(strategy: str | Apply, impl: str) -> Part:
    if callable(strategy):
        name = getattr(strategy, "__qualname__", repr(strategy))
        return Part(name, strategy, ("dp",), Impl(""))
    if (strategy, impl) in REFUSED:
        raise UserError(f"no strategy {strategy}@{impl}: {REFUSED[strategy, impl]}")
    row = STRATEGIES.get(strategy)
    if row is None or impl not in row.impls:
        known = ", ".join(f"{name}@{by}" for name, row in STRATEGIES.items() for by in row.impls)
        raise UserError(f"no strategy {strategy}@{impl}; there is {known}")
    module, _, function = row.impls[impl].apply.partition(":")
    apply = getattr(import_module(module), function)
    return Part(f"{strategy}@{impl}", apply, row.axes or ("dp",), row.impls[impl])


def _refuse_other_axes(part: Part, strategy: str | Apply, mesh: Mesh) -> None:
    """Raise UserError unless the mesh is one of the legal MIXES of the strategy's axes."""
    if strategy == "single" and mesh.size > 1:
        raise UserError(f"strategy single is for one process, the mesh is {mesh}")
    long = {name for name, size in mesh.axes.items() if size > 1}
    if not any(long <= mix <= set(part.axes) for mix in MIXES):
        inner_first = part.axes[::-1]
        along = " and ".join(inner_first)
        wanted = " or ".join(f"init_mesh({name}={mesh.size})" for name in inner_first)
        raise UserError(
            f"the mesh is {mesh}, and {strategy} runs along {along} alone; make it by {wanted}"
        )


def _agree(model: nn.Module, mesh: Mesh, broadcast: bool) -> None:
    """See that the ranks start from one model: rank 0's, or each its own, which must be equal."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    refuse_what_cannot_be_sent(state)
    check_shapes_agree(state, mesh.world)
    if broadcast:
        for tensor in state.values():
            broadcast_anything(tensor, mesh.world)
    elif not is_meta(model):  # what has no values yet will be drawn by the same seed
        check_tensors_agree(state, mesh.world)


def _own_value(model: nn.Module) -> Callable[[str], Tensor]:
    return lambda name: model.get_parameter(name).detach()


def _refuse_unknown_options(part: Part, options: Mapping[str, Any]) -> None:
    parameters = signature(part.apply).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in own:
            takes = f"it takes {', '.join(own)}" if own else "it takes none"
            raise UserError(f"{part.label} has no option {name}; {takes}")


def find_units(model: nn.Module, units: Iterable[type[nn.Module] | str]) -> dict[str, nn.Module]:
    """Modules by name. Each entry must match: a typo would silently make no unit at all."""
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    # It computes with the weights of its projection, and never calls it.
    never_called = {m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    for unit in units:
        if isinstance(unit, str) and modules.get(unit) in never_called:
            raise UserError(
                f"unit {unit} is never called, as nn.MultiheadAttention computes with its weights; "
                f"give {unit.removesuffix('.out_proj')}"
            )
        matches = {
            name: module
            for name, module in modules.items()
            if name
            and (
                unit in (name, type(module).__name__)
                if isinstance(unit, str)
                else isinstance(module, unit)
            )
            and module not in never_called
        }
        if not matches:
            label = unit if isinstance(unit, str) else unit.__name__
            classes = sorted({type(module).__name__ for module in modules.values()})
            raise UserError(f"unit {label} matches no module; classes here: {', '.join(classes)}")
        found |= matches
    return found


def _refuse_what_cannot_train(model: nn.Module, ranks: int) -> None:
    for module in model.modules():
        if any(isinstance(hook, ModuleHook) for hook in module._forward_pre_hooks.values()):
            raise UserError("this model is parallelized already; build a fresh one")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"{name} is lazy and has no shape yet; call the model once, before parallelize()"
            )
        if parameter.is_complex():
            raise UserError(f"{name} is complex, and sums of its gradient are not; use real parts")
        if parameter.layout is not torch.strided:
            raise UserError(
                f"{name} is a sparse parameter; register it as a buffer, or make it dense"
            )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.sparse:
            raise UserError(f"{name} makes sparse gradients, which are not summed; sparse=False")
        if module.max_norm is not None and ranks > 1:
            raise UserError(
                f"{name} has max_norm={module.max_norm} and rewrites the rows that a rank looks "
                "up, which differ by rank; leave max_norm out, and scale rows after the step"
            )
        if module.scale_grad_by_freq and ranks > 1:
            raise UserError(
                f"{name} has scale_grad_by_freq, and counts tokens in the rows of one rank alone; "
                "leave it out"
            )


def _refuse_earlier_optimizers(model: nn.Module) -> None:
    """An optimizer built before holds the tensors of before, which a sharding strategy replaces.

    It would go on stepping them and never train the model. Refused under every strategy, so that
    changing the strategy is changing one word. A parameter does not know its optimizers. But few
    models' parameters are known to anything else, and only for those that are, all live objects
    are looked through, which takes a tenth of a second.
    """
    shared = _held_elsewhere(model)
    for thing in gc.get_objects() if shared else ():
        if issubclass(type(thing), torch.optim.Optimizer):
            held = (p for group in thing.param_groups for p in group["params"])
            if any(id(p) in shared for p in held):
                raise UserError(
                    f"{type(thing).__name__} was built before parallelize() and would step the "
                    "wrong tensors; build it after: job.optimizer(torch.optim.AdamW, lr=...)"
                )


def _held_elsewhere(model: nn.Module) -> set[int]:
    """The id of each parameter that something besides the model's own modules refers to."""

    def other_references(module: nn.Module) -> dict[int, int]:
        held = (p for m in module.modules() for p in m._parameters.values() if p is not None)
        return {id(p): sys.getrefcount(p) - times for p, times in Counter(held).items()}

    # Of a module that nobody else knows: the references that counting itself takes. On the meta
    # device, so that no random number is drawn.
    least = max(other_references(nn.Linear(1, 1, device="meta")).values())
    return {key for key, count in other_references(model).items() if count > least}
