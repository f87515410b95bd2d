"""parallelize(): the one place that applies strategies to a model, and refuses what cannot work.

A strategy is a function `apply(setup) -> Applied`. It changes the module in place and keeps every
parameter's name. To add one, write it in parallel/ and give it a row in programs/cli/registry.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import check_shapes_agree, check_tensors_agree
from dist_lab.comm.anything import broadcast_anything, refuse_what_cannot_be_sent
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.layout.layout import Layout, holds, slice_local
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.parallel.exact_dropout import ExactDropout
from dist_lab.parallel.param_slots import param_slots, set_param
from dist_lab.parallel.pipeline.partition import seams
from dist_lab.parallel.recipe_on_ranks import RecipeOnRanks
from dist_lab.parallel.tensor.before_stages import try_before_stages
from dist_lab.programs.cli.mixes import check_impl, strategies_on
from dist_lab.programs.cli.registry import STRATEGIES, Impl
from dist_lab.step.claims import claim, refuse_claimed
from dist_lab.step.eager import Runner
from dist_lab.step.find_units import find_units
from dist_lab.step.fixed_order.rules import fixed_order
from dist_lab.step.guards import Guards, GuardsOff, GuardsOn
from dist_lab.step.nonfinite import FirstNonFinite
from dist_lab.step.protocol import ROOT, Applied, Apply, Chain, Sync
from dist_lab.step.same_buffers import SameBuffers
from dist_lab.step.setup import Setup
from dist_lab.step.totals import PlainTotals
from dist_lab.step.trainable import refuse_earlier_optimizers, refuse_what_cannot_train
from dist_lab.step.writes import RefuseWrites
from dist_lab.transforms.batchnorm import convert_batchnorm
from dist_lab.transforms.deferred_init import deferred_init, is_meta
from dist_lab.transforms.init import InitFn
from dist_lab.transforms.precision import compute_in
from dist_lab.transforms.recipe import Recipe
from dist_lab.transforms.recompute import recompute as recompute_units


@dataclass(frozen=True)
class Chosen:
    """A strategy that was chosen: its function, the axes that it runs along, and its row's impl."""

    label: str
    apply: Apply
    axes: tuple[str, ...]
    impl: Impl


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    strategy: str | Apply | None = None,
    impl: str = "hand",
    *,
    units: Iterable[type[nn.Module] | str] = (),
    param_dtype: torch.dtype | None = None,
    recompute: int = 0,
    broadcast: bool = True,
    seed: int = 0,
    init_fn: InitFn | None = None,
    sync_batchnorm: bool = False,
    reduce_order: str | None = None,
    dropout: str | None = None,
    recipe: Recipe | None = None,
    **options: Any,
) -> Job:
    """Prepare a model, in place, for training on a mesh. Collective.

    Args:
        model: any module, the same on every rank; it may be on the meta device.
        mesh: from `init_mesh`. Each of its axes has a strategy: pp, tp, and on the data axes ddp
            (dp), fsdp (fsdp) or hsdp (both).
        strategy: the strategy of the data axes, if another: "dp", "ddp", "zero1", "zero2", "fsdp"
            or "hsdp"; or a function `apply(setup)` of your own, which runs along dp. "single",
            "tp" and "pp" name a strategy alone.
        impl: "hand" for ours; "torch" or "accelerate" for a library's implementation.
        units: module classes, class names or module names. Each such module is one unit: it is
            unsharded, reduced, recomputed and logged as one. In a pipeline a stage is one unit.
        param_dtype: compute in this dtype; the parameters keep theirs, as master weights.
        recompute: recompute every k-th unit in backward: 1 all, 0 none.
        broadcast: start from rank 0's weights and buffers. False: they must be equal already.
        seed, init_fn: how to initialize a model on the meta device. `init_fn(name, tensor,
            generator)` fills an unsharded parameter, with a generator seeded by (seed, name); a
            rank keeps its shards. Default: the model's own `init_weight`.
        sync_batchnorm: take BatchNorm's statistics over the rows of all ranks.
        reduce_order: "fixed" or "fixed:V": add in one order, so that a step has the same bits in
            every layout. Each of V (8) parts of the batch is one micro-batch: step/fixed_order.
        dropout: "exact": every nn.Dropout has the masks that one process has, by `seed`, and other
            random numbers are refused. None: each rank draws its own.
        recipe: what Linears multiply, such as quantised weights: transforms/recipe.py. With one
            scale per matrix all ranks must call the same layers equally often, also in evaluation.
        options: the strategies' own options, the keyword arguments of their `apply`: ddp's
            bucket_mb.

    Returns:
        The Job that trains the model. Build the optimizer after this: `job.optimizer(...)`.

    Raises:
        UserError: an unknown strategy or option, a mesh that does not fit the strategy, a unit
            that matches nothing, an optimizer that was built before, a model that is partly on
            the meta device, or weights that differ with broadcast=False.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"parallelize() takes a built nn.Module, not {model!r:.60}")
    mix = choose(strategy, impl, mesh)
    change_bits = {"sync_batchnorm": sync_batchnorm, "param_dtype": param_dtype, "dropout": dropout}
    order = fixed_order(reduce_order, label_of(mix), {**options, **change_bits}, model, mesh)
    options_of = _share_out(options, mix, {"defer_reduce": True} if order else {})
    refuse_what_cannot_train(model, ranks=mesh.size)
    refuse_claimed(model)
    refuse_earlier_optimizers(model)
    if sync_batchnorm and not any(set(chosen.axes) & set(DATA_AXES) for chosen in mix):
        raise UserError(
            f"{mix[0].label} does not split rows over ranks, so sync_batchnorm has no use; leave "
            "it out"
        )
    exact_dropout = ExactDropout(model, mesh, dropout, options, fixed_order=order is not None)
    draw = deferred_init(model, seed, mesh.device, init_fn) if is_meta(model) else None
    _make_equal(model, mesh, broadcast and draw is None)
    if sync_batchnorm:
        convert_batchnorm(model, mesh.channel(*DATA_AXES))
    units_by_name = {ROOT: model, **find_units(model, units)}
    on_ranks = None
    if recipe is not None:
        labels = [chosen.label for chosen in mix]
        inner = {name: unit for name, unit in units_by_name.items() if name != ROOT}
        on_ranks = RecipeOnRanks(
            recipe, model, inner, mesh, labels, options, fixed_order=order is not None
        )
    recompute_units(model, units_by_name, recompute)
    parameters = dict(model.named_parameters())
    first_name = {id(p): name for name, p in parameters.items()}
    # state_dict key -> canonical name: a tied parameter has several keys, and one name, the first.
    state = {n: first_name.get(id(t), n) for n, t in model.state_dict(keep_vars=True).items()}

    layouts = {name: Layout(p.shape, p.dtype) for name, p in parameters.items()}
    trained = frozenset(name for name, p in parameters.items() if p.requires_grad)
    setup = Setup(
        model, mesh, {}, layouts, trained, draw or _current_value(model), units_by_name,
        param_dtype, recompute, fixed_order=order is not None,
        coded=on_ranks.on_model.coded if on_ranks else None,
    )  # fmt: skip
    del parameters, first_name
    if mix[0].axes == ("pp",) and seams(model) is not None:  # without stages, tp will refuse it
        for chosen, its_options in zip(mix, options_of, strict=True):
            if chosen.axes == ("tp",):
                whole = replace(setup, axes={"tp": mesh["tp"]})
                try_before_stages(chosen.apply, whole, its_options, options.get("example_inputs"))
    applied = fold(setup, list(zip(mix, options_of, strict=True)), draw)
    local_names = [name for name, _ in model.named_parameters()]
    expected = [n for n, layout in applied.layouts.items() if holds(layout, mesh.coordinates)]
    assert list(layouts) == list(applied.layouts), "a strategy keeps every parameter's name"
    assert local_names == expected, "the model holds the parameters that layouts put on this rank"
    leaves = dict(model.named_parameters()) | dict(applied.leaves)
    accumulates = applied.make_runner is not None and not applied.reduce_each_microbatch
    watch = FirstNonFinite(leaves, accumulates=accumulates)
    claim(model, applied.layouts)
    guards = Guards(model, applied, mesh)
    # What forward writes to a parameter would differ between data ranks, or be lost by a reshard.
    no_writes = mesh.data.size > 1 or applied.sharded_between_units
    after: list[Sync] = [RefuseWrites(leaves, applied.unit_of)] if no_writes else []
    if mesh.data.size > 1:
        buffers = [name for name, _ in model.named_buffers() if name in state]
        after.append(SameBuffers(model, buffers, mesh.data))
    applied, sums = order.on(applied, model, mesh) if order else (applied, Chain())
    chain = Chain(Chain(GuardsOff(guards), watch, sums), applied.sync, GuardsOn(guards), *after)
    units_by_name = applied.stages.units | {ROOT: model} if applied.stages else units_by_name
    runner = (applied.make_runner or Runner)(model, chain, mesh.comm, units_by_name, applied)
    if param_dtype is not None:
        # After the runner, so that its hooks run first: we cast the unsharded parameters.
        modules = applied.stages.modules if applied.stages else {0: model}
        for stage, module in modules.items():
            casts = any(chosen.impl.casts for chosen in mix)
            compute_in(module, param_dtype, parameters=not casts, inputs=stage == 0)
    if on_ranks is not None:  # after it, to round what it has cast
        on_ranks.bind(applied, model)
    exact_dropout.bind(
        runner.place, seed, applied.stages.modules.values() if applied.stages else [model]
    )
    guards.guard_parameters()
    totals = order.totals(applied, mesh) if order else PlainTotals()
    return Job(model, mesh, applied, runner, watch, state, label_of(mix), units_by_name, totals)


def fold(
    setup: Setup,
    strategies: Sequence[tuple[Chosen, Mapping[str, Any]]],
    draw: Callable[[str], Tensor] | None = None,
) -> Applied:
    """Apply strategies one after another, outermost first.

    Args:
        setup: describes the model before any strategy; it has no axes yet.
        strategies: each one with its options.
        draw: returns the full value of a parameter, if the model is on the meta device. A strategy
            leaves a shard there, without values; only the last one draws it.
    """
    model, mesh = setup.model, setup.mesh
    combined: Applied | None = None
    for chosen, options in strategies:
        if draw is not None and not chosen.impl.draws:
            _materialize(setup)
        axes = {n: replace(mesh.channel(n), pairwise=setup.fixed_order) for n in chosen.axes}
        setup = replace(setup, axes=axes)
        applied = chosen.apply(setup, **options)
        if not isinstance(applied, Applied):
            raise UserError(
                f"a strategy returns Applied(layouts, sync); {chosen.label} gave {applied!r:.60}"
            )
        earlier = setup.layouts.items()
        assert all(applied.layouts[n].extends(layout) for n, layout in earlier), chosen.label
        combined = applied if combined is None else _combine(combined, applied)
        stages = combined.stages
        if stages is not None and setup.stages is None:
            inside = {m for stage in stages.modules.values() for m in stage.modules()}
            inner = {n: m for n, m in setup.units.items() if n != ROOT and m in inside}
            setup = replace(setup, units=stages.units | {ROOT: model}, inner_units=inner)
        setup = replace(
            setup, layouts=applied.layouts, stages=stages,
            full_value=_local_value(draw, applied.layouts, mesh) if draw else _current_value(model),
        )  # fmt: skip
    assert combined is not None, "no strategy"
    if draw is not None:
        _materialize(setup)
    setup.folded.layouts, setup.folded.stepped = combined.layouts, combined.stepped
    return combined


def _local_value(
    draw: Callable[[str], Tensor], layouts: Mapping[str, Layout], mesh: Mesh
) -> Callable[[str], Tensor]:
    """Name -> this rank's part of a parameter that is drawn in full, and then freed."""
    return lambda name: slice_local(draw(name), layouts[name], mesh.axes, mesh.coordinates).clone()


def _materialize(setup: Setup) -> None:
    """Draw the parameters that are still on the meta device, one by one."""
    for name, slots in param_slots(*setup.roots).items():
        if setup.model.get_parameter(name).is_meta:
            set_param(slots, setup.full_value(name).to(setup.mesh.device))


def _combine(outer: Applied, inner: Applied) -> Applied:
    """Combine two Applied into one. Gradients are reduced by the inner strategy first."""
    return replace(
        inner,
        sync=Chain(inner.sync, outer.sync),
        about=", ".join(filter(None, [outer.about, inner.about])),
        leaves={**outer.leaves, **inner.leaves},
        stepped={**outer.stepped, **inner.stepped},
        sharded_between_units=outer.sharded_between_units or inner.sharded_between_units,
        unshard_each_action=outer.unshard_each_action or inner.unshard_each_action,
        reduce_each_microbatch=outer.reduce_each_microbatch or inner.reduce_each_microbatch,
        unit_of={**outer.unit_of, **inner.unit_of},
        make_optimizer=inner.make_optimizer or outer.make_optimizer,
        make_runner=inner.make_runner or outer.make_runner,
        buffers={**outer.buffers, **inner.buffers},
        stages=inner.stages or outer.stages,
    )


def choose(strategy: str | Apply | None, impl: str, mesh: Mesh) -> list[Chosen]:
    """The strategies of a mesh, outermost first: see strategies_on.

    Raises:
        UserError: the mesh does not fit the strategy, or there is no such implementation.
    """
    own = strategy if callable(strategy) else None
    if isinstance(strategy, str) and strategy in STRATEGIES:
        check_impl([strategy], impl)  # first: no mesh would help
    names = strategies_on(mesh.axes, "ddp" if callable(strategy) else strategy)
    check_impl([name for name in names if own is None or name != "ddp"], impl)
    if own is not None and impl != "hand":
        raise UserError(f"a strategy of your own has no impl {impl!r}; leave it out")
    mix = []
    for name in names:
        if own is not None and name == "ddp":
            label = getattr(own, "__qualname__", repr(own))
            mix.append(Chosen(label, own, ("dp",), Impl("")))
            continue
        row = STRATEGIES[name]
        module, _, function = row.impls[impl].apply.partition(":")
        apply = getattr(import_module(module), function)
        mix.append(Chosen(f"{name}@{impl}", apply, row.axes or ("dp",), row.impls[impl]))
    return mix


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


def label_of(mix: Sequence[Chosen]) -> str:
    """
    >>> label_of([Chosen("pp@hand", ..., ("pp",), ...), Chosen("fsdp@hand", ..., ("fsdp",), ...)])
    'pp x fsdp@hand'
    """
    *outer, last = [chosen.label for chosen in mix]
    return " x ".join([*(label.partition("@")[0] for label in outer), last])


def _share_out(
    options: Mapping[str, Any], mix: Sequence[Chosen], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Give each option to the strategies that take it. Raise UserError if none does.

    `defaults`: options for the strategies that take them, where there are no others.
    """
    known = [
        [p.name for p in signature(chosen.apply).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for chosen in mix
    ]
    all_known = dict.fromkeys(name for names in known for name in names)
    for name in options:
        if name not in all_known:
            takes = f"it takes {', '.join(all_known)}" if all_known else "it takes none"
            raise UserError(f"{label_of(mix)} has no option {name}; {takes}")
    given = {**defaults, **options}
    return [{n: value for n, value in given.items() if n in names} for names in known]
