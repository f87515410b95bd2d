"""parallelize(): the one place that applies strategies to a model, and refuses what cannot work.

A strategy is a function `apply(setup) -> Applied`. It changes the module in place and keeps every
parameter's name. To add one, write it in parallel/ and give it a row in programs/cli/registry.py.
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
    refuse_without_shards,
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
class Chosen:
    """A strategy that was chosen: its function, and the axes that it runs along."""

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
    """Prepare a model, in place, for training on a mesh. Collective.

    Args:
        model: any module, the same on every rank; it may be on the meta device.
        mesh: from `init_mesh`, with a size above 1 only on axes that the strategy runs along.
        strategy: "single", "dp", "ddp", "zero1", "zero2", "fsdp", "hsdp", "tp" or "pp"; or a
            function `apply(setup)` of your own, which runs along dp.
        impl: "hand" for ours; "torch" or "accelerate" for a library's implementation.
        units: module classes, class names or module names. Each such module is one unit: it is
            unsharded, reduced, recomputed and logged as one.
        param_dtype: compute in this dtype; the parameters keep theirs, as master weights.
        recompute: recompute every k-th unit in backward: 1 all, 0 none.
        broadcast: start from rank 0's weights and buffers. False: they must be equal already.
        seed, init_fn: how to initialize a model on the meta device. `init_fn(name, tensor,
            generator)` fills an unsharded parameter, with a generator seeded by (seed, name); a
            rank keeps its shards. Default: the model's own `init_weight`.
        sync_batchnorm: take BatchNorm's statistics over the rows of all ranks.
        options: the strategy's own options, the keyword arguments of its `apply`: ddp's bucket_mb.

    Returns:
        The Job that trains the model. Build the optimizer after this: `job.optimizer(...)`.

    Raises:
        UserError: an unknown strategy or option, a mesh that does not fit the strategy, a unit
            that matches nothing, an optimizer that was built before, a model that is partly on
            the meta device, or weights that differ with broadcast=False.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"parallelize() takes a built nn.Module, not {model!r:.60}")
    chosen = _choose(strategy, impl)
    _refuse_other_axes(chosen, strategy, mesh)
    _refuse_unknown_options(chosen, options)
    _refuse_what_cannot_train(model, ranks=mesh.size)
    refuse_claimed(model)
    _refuse_earlier_optimizers(model)
    if sync_batchnorm and not set(chosen.axes) & set(DATA_AXES):
        raise UserError(
            f"{strategy} does not split rows over ranks, so sync_batchnorm has no use; leave it out"
        )
    on_meta = is_meta(model)
    full_value = _current_value(model)
    if on_meta and chosen.impl.draws:
        full_value = deferred_init(model, seed, mesh.device, init_fn)
    elif on_meta:
        materialize(model, seed, mesh.device, init_fn)
    _make_equal(model, mesh, broadcast and not on_meta)
    if sync_batchnorm:
        convert_batchnorm(model, mesh.channel(*DATA_AXES))
    units_by_name = {ROOT: model, **find_units(model, units)}
    recompute_units(model, units_by_name, recompute)
    names = [name for name, _ in model.named_parameters()]
    first_name = {id(p): name for name, p in model.named_parameters()}
    # state_dict key -> canonical name: a tied parameter has several keys, and one name, the first.
    state = {n: first_name.get(id(t), n) for n, t in model.state_dict(keep_vars=True).items()}

    layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
    setup = Setup(model, mesh, {}, layouts, full_value, units_by_name, param_dtype, recompute)
    applied = _fold(setup, [(chosen, options)])
    local_names = [name for name, _ in model.named_parameters()]
    expected = [n for n, layout in applied.layouts.items() if holds(layout, mesh.coordinates)]
    assert names == list(applied.layouts), "a strategy keeps every parameter's name"
    assert local_names == expected, "the model holds the parameters that layouts put on this rank"
    leaves = dict(model.named_parameters()) | dict(applied.leaves)
    watch = FirstNonFinite(leaves, accumulates=applied.make_runner is not None)
    claim(model, applied.layouts)
    guards = Guards(model, applied, mesh)
    # What forward writes to a parameter would differ between data ranks, or be lost by a reshard.
    no_writes = mesh.data.size > 1 or applied.sharded_between_units
    after: list[Sync] = [RefuseWrites(leaves, applied.unit_of)] if no_writes else []
    if mesh.data.size > 1:
        buffers = [name for name, _ in model.named_buffers() if name in state]
        after.append(SameBuffers(model, buffers, mesh.data))
    chain = Chain(Chain(GuardsOff(guards), watch), applied.sync, GuardsOn(guards), *after)
    runner = (applied.make_runner or Runner)(model, chain, mesh.comm, units_by_name, applied)
    if param_dtype is not None and chosen.impl.casts is not Casts.ALL:
        # After the runner, so that its hooks run first: we cast the unsharded parameters.
        compute_in(model, param_dtype, parameters=chosen.impl.casts is not Casts.PARAMETERS)
    guards.guard_parameters()
    return Job(model, mesh, applied, runner, watch, state)


def _fold(setup: Setup, strategies: Sequence[tuple[Chosen, Mapping[str, Any]]]) -> Applied:
    """Apply strategies one after another, outermost first: see ORDER_OF_APPLICATION.

    Args:
        setup: describes the model before any strategy; it has no axes yet.
        strategies: each one with its options.
    """
    combined: Applied | None = None
    for chosen, options in sorted(strategies, key=_place_in_order):
        setup = replace(setup, axes={name: setup.mesh.channel(name) for name in chosen.axes})
        applied = chosen.apply(setup, **options)
        if not isinstance(applied, Applied):
            raise UserError(
                f"a strategy returns Applied(layouts, sync); {chosen.label} gave {applied!r:.60}"
            )
        earlier = setup.layouts.items()
        assert all(applied.layouts[n].extends(layout) for n, layout in earlier), chosen.label
        combined = applied if combined is None else _combine(combined, applied)
        setup = replace(setup, layouts=applied.layouts, full_value=_current_value(setup.model))
    assert combined is not None, "no strategy"
    return combined


def _place_in_order(strategy: tuple[Chosen, Any]) -> int:
    axes = set(strategy[0].axes)
    return next(i for i, family in enumerate(ORDER_OF_APPLICATION) if axes & set(family))


def _combine(outer: Applied, inner: Applied) -> Applied:
    """Combine two Applied into one. Gradients are reduced by the inner strategy first."""
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


def _choose(strategy: str | Apply, impl: str) -> Chosen:
    if callable(strategy):
        name = getattr(strategy, "__qualname__", repr(strategy))
        return Chosen(name, strategy, ("dp",), Impl(""))
    if (strategy, impl) in REFUSED:
        raise UserError(f"no strategy {strategy}@{impl}: {REFUSED[strategy, impl]}")
    row = STRATEGIES.get(strategy)
    if row is None or impl not in row.impls:
        known = ", ".join(f"{name}@{by}" for name, row in STRATEGIES.items() for by in row.impls)
        raise UserError(f"no strategy {strategy}@{impl}; there are {known}")
    module, _, function = row.impls[impl].apply.partition(":")
    apply = getattr(import_module(module), function)
    return Chosen(f"{strategy}@{impl}", apply, row.axes or ("dp",), row.impls[impl])


def _refuse_other_axes(chosen: Chosen, strategy: str | Apply, mesh: Mesh) -> None:
    """Raise UserError unless the mesh is one of the legal MIXES of the strategy's axes."""
    if strategy == "single" and mesh.size > 1:
        raise UserError(f"strategy single is for one process, but the mesh is {mesh}")
    long = {name for name, size in mesh.axes.items() if size > 1}
    if not any(long <= mix <= set(chosen.axes) for mix in MIXES):
        along = " and ".join(chosen.axes[::-1])
        wanted = f"init_mesh({chosen.axes[-1]}={mesh.size})"
        raise UserError(
            f"the mesh is {mesh}, but {strategy} runs along {along} only; make it by {wanted}"
        )
    refuse_without_shards(strategy, mesh.axes)


def _make_equal(model: nn.Module, mesh: Mesh, broadcast: bool) -> None:
    """Broadcast rank 0's weights and buffers, or check that those of all ranks are equal."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    refuse_what_cannot_be_sent(state)
    check_shapes_agree(state, mesh.world)
    if broadcast:
        for tensor in state.values():
            broadcast_anything(tensor, mesh.world)
    elif not is_meta(model):  # a tensor on meta has no values yet; all ranks use the same seed
        check_tensors_agree(state, mesh.world)


def _current_value(model: nn.Module) -> Callable[[str], Tensor]:
    return lambda name: model.get_parameter(name).detach()


def _refuse_unknown_options(chosen: Chosen, options: Mapping[str, Any]) -> None:
    parameters = signature(chosen.apply).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"{chosen.label} has no option {name}; {takes}")


def find_units(model: nn.Module, units: Iterable[type[nn.Module] | str]) -> dict[str, nn.Module]:
    """Return the units by module name. Raise UserError on an entry that matches no module."""
    units_by_name: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    # nn.MultiheadAttention reads the weights of its out_proj directly, and never calls it.
    never_called = {m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    for unit in units:
        if isinstance(unit, str) and modules.get(unit) in never_called:
            raise UserError(
                f"unit {unit} is never called, as nn.MultiheadAttention uses its weights directly; "
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
        units_by_name |= matches
    return units_by_name


def _refuse_what_cannot_train(model: nn.Module, ranks: int) -> None:
    for module in model.modules():
        if any(isinstance(hook, ModuleHook) for hook in module._forward_pre_hooks.values()):
            raise UserError("this model is parallelized already; build a fresh one")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"{name} is lazy and has no shape yet; call the model once before parallelize()"
            )
        if parameter.is_complex():
            raise UserError(f"{name} is complex, but only real gradients are reduced; make it real")
        if parameter.layout is not torch.strided:
            raise UserError(
                f"{name} is a sparse parameter; register it as a buffer or make it dense"
            )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.sparse:
            raise UserError(
                f"{name} makes sparse gradients, which cannot be reduced; set sparse=False"
            )
        if module.max_norm is not None and ranks > 1:
            raise UserError(
                f"{name} has max_norm={module.max_norm} and rewrites the rows that it looks up, "
                "which differ by rank; leave max_norm out and rescale the rows after each step"
            )
        if module.scale_grad_by_freq and ranks > 1:
            raise UserError(
                f"{name} has scale_grad_by_freq, which would count the tokens of this rank's rows "
                "only; leave it out"
            )


def _refuse_earlier_optimizers(model: nn.Module) -> None:
    """Raise UserError if an optimizer already holds the model's parameters.

    A sharding strategy replaces them, and the optimizer would step the old tensors. We refuse it
    under every strategy, so that you can change the strategy by one word. A parameter does not
    know its optimizers. So if anything besides the model refers to a parameter, which is rare, we
    search all live objects for optimizers, which takes a tenth of a second.
    """
    shared = _referenced_elsewhere(model)
    for thing in gc.get_objects() if shared else ():
        if issubclass(type(thing), torch.optim.Optimizer):
            stepped = (p for group in thing.param_groups for p in group["params"])
            if any(id(p) in shared for p in stepped):
                raise UserError(
                    f"{type(thing).__name__} was built before parallelize() and would step the "
                    "wrong tensors; build it after: job.optimizer(torch.optim.AdamW, lr=...)"
                )


def _referenced_elsewhere(model: nn.Module) -> set[int]:
    """Return the id() of each parameter that anything besides the model's modules refers to."""

    def other_references(module: nn.Module) -> dict[int, int]:
        uses = Counter(p for m in module.modules() for p in m._parameters.values() if p is not None)
        return {id(p): sys.getrefcount(p) - times for p, times in uses.items()}

    # Counting adds references of its own. We measure them on a fresh module that nothing else
    # refers to. It is on the meta device, so that no random number is drawn.
    baseline = max(other_references(nn.Linear(1, 1, device="meta")).values())
    return {key for key, count in other_references(model).items() if count > baseline}
