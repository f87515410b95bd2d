"""parallelize(): the one place that knows all strategies, and refuses what cannot be.

A strategy is a function `apply(model, axis) -> Applied` that changes the module in place and no
parameter's name. To add one, write it in parallel/, and give it a row in STRATEGIES.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import check_shapes_agree, check_tensors_agree
from dist_lab.errors import UserError
from dist_lab.hooks import ModuleHook
from dist_lab.job import Job
from dist_lab.layout import Shard
from dist_lab.mesh import DATA_AXES, Mesh
from dist_lab.meta import come_to_life, is_meta, piece_by_piece
from dist_lab.parallel import (
    ddp,
    ddp_accelerate,
    ddp_torch,
    dp,
    fsdp,
    fsdp_torch,
    pp,
    pp_torch,
    single,
    tp,
    tp_torch,
    zero,
    zero_torch,
)
from dist_lab.parallel.sync import Applied, Chain
from dist_lab.parallel.sync_batchnorm import convert_batchnorm
from dist_lab.parallel.watch import FirstNonFinite
from dist_lab.pipeline_runner import PipelineRunner
from dist_lab.precision import compute_in
from dist_lab.recompute import recompute as recompute_units
from dist_lab.runner import Runner
from dist_lab.step import Step
from dist_lab.zoo.init import InitFn

Apply = Callable[..., Applied]  # (model, axis, **options of its own)


@dataclass(frozen=True)
class Strategy:
    """One row of the table: the function, and the mesh axes that it runs along."""

    apply: Apply
    axes: tuple[str, ...]


STRATEGIES: Mapping[tuple[str, str], Strategy] = {
    ("single", "hand"): Strategy(single.apply, ("dp",)),
    ("dp", "hand"): Strategy(dp.apply, ("dp",)),
    ("ddp", "hand"): Strategy(ddp.apply, ("dp",)),
    ("ddp", "torch"): Strategy(ddp_torch.apply, ("dp",)),
    ("ddp", "accelerate"): Strategy(ddp_accelerate.apply, ("dp",)),
    ("zero1", "hand"): Strategy(zero.stage1, ("dp",)),
    ("zero1", "torch"): Strategy(zero_torch.apply, ("dp",)),
    ("zero2", "hand"): Strategy(zero.stage2, ("dp",)),
    ("fsdp", "hand"): Strategy(fsdp.apply, ("fsdp", "dp")),
    ("fsdp", "torch"): Strategy(fsdp_torch.apply, ("fsdp", "dp")),
    ("hsdp", "hand"): Strategy(fsdp.apply, ("fsdp", "dp")),
    ("hsdp", "torch"): Strategy(fsdp_torch.apply, ("fsdp", "dp")),
    ("tp", "hand"): Strategy(tp.apply, ("tp",)),
    ("tp", "torch"): Strategy(tp_torch.apply, ("tp",)),
    ("pp", "hand"): Strategy(pp.apply, ("pp",)),
    ("pp", "torch"): Strategy(pp_torch.apply, ("pp",)),
}


IGNORED = (
    "accelerate leaves its FSDP plugin unused on CPU: it takes the processes for MULTI_CPU, and "
    "what it prepares is DistributedDataParallel; give --impl torch, or strategy ddp"
)
# Somebody else's that one would look for here in vain, and why.
REFUSED: Mapping[tuple[str, str], str] = {
    ("fsdp", "accelerate"): IGNORED,
    ("hsdp", "accelerate"): IGNORED,
}

# What parallelize() hands to a strategy that takes it, beside the options that a user gives.
GIVEN = (
    "units", "value_of", "borrow", "sub", "param_dtype", "compute_in", "recompute",
)  # fmt: skip


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
        strategy: a name from STRATEGIES, or a function `apply(model, axis)` of one's own, which
            runs along dp.
        units: module classes or names: what is borrowed, reduced, recomputed and logged as one.
        param_dtype: compute in this dtype, keeping the parameters as float32 masters.
        recompute: every so-manyth unit forgets its activations, and computes them again in
            backward; 1: each of them. 0: none.
        broadcast: start from rank 0's weights and buffers. False: they must be equal already.
        seed, init_fn: for a model on the meta device, whose parameters come to life here, each
            rank drawing what it keeps: `init_fn(name, tensor, generator)` fills a whole parameter,
            and the generator is that of (seed, name). Default: the model's own `init_weight`.
        sync_batchnorm: BatchNorm takes its statistics over the rows of all ranks.
        options: the strategy's own, as its `apply` lists them: ddp's bucket_mb.

    Raises:
        UserError: an unknown strategy or option, a mesh it does not fit, a unit that matches
            nothing, an optimizer that was built before, a model that is partly on the meta device,
            or weights that differ with broadcast=False.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"parallelize takes a module that has been built, not {model!r:.60}")
    row = _strategy(strategy, impl)
    size = math.prod(mesh[name].size for name in row.axes)
    if size != mesh.size or (strategy == "single" and mesh.size > 1):
        if strategy == "single":
            raise UserError(f"strategy single is for one process, the mesh is {mesh}")
        along = " and ".join(row.axes)
        wanted = " or ".join(f"init_mesh({name}={mesh.size})" for name in row.axes)
        raise UserError(
            f"the mesh is {mesh}, and {strategy} runs along {along} alone; make it by {wanted}"
        )
    _refuse_unknown_options(row.apply, options, f"{strategy}@{impl}")
    _refuse_what_cannot_train(model)
    _refuse_earlier_optimizers(model)
    if sync_batchnorm and not set(row.axes) & set(DATA_AXES):
        raise UserError(
            f"{strategy} shares out no rows for sync_batchnorm to put together; leave it out"
        )
    lanes = [mesh.lane(name) for name in row.axes]
    takes = signature(row.apply).parameters
    value_of = _own(model)
    drawn = is_meta(model)
    if drawn and "value_of" in takes:
        value_of = piece_by_piece(model, seed, mesh.device, init_fn)
    elif drawn:
        come_to_life(model, seed, mesh.device, init_fn)
    _agree(model, mesh, broadcast and not drawn)

    if sync_batchnorm:
        convert_batchnorm(model, mesh.lane(row.axes[0]))
    named = {"": model, **_find_units(model, units)}
    if recompute:
        recompute_units(model, {name: m for name, m in named.items() if name}, recompute)
    names = [name for name, _ in model.named_parameters()]
    first_of = {id(p): name for name, p in model.named_parameters()}
    state = {n: first_of.get(id(t), n) for n, t in model.state_dict(keep_vars=True).items()}
    given: dict[str, Any] = {
        "units": named,
        "value_of": value_of,
        "borrow": mesh.lane(row.axes[0]) if "borrow" in takes else None,
        "sub": partial(mesh.sub, row.axes[0]),
        "param_dtype": param_dtype,
        "compute_in": partial(_narrow, param_dtype) if param_dtype is not None else None,
        "recompute": recompute,
    }
    applied = row.apply(model, *lanes, **{k: v for k, v in given.items() if k in takes}, **options)
    if not isinstance(applied, Applied):
        raise UserError(f"a strategy returns Applied(laid, sync), this one {applied!r:.60}")
    here = [name for name, _ in model.named_parameters()]
    known = names if applied.pipeline is not None else here  # of a pipeline some are elsewhere
    assert names == known == list(applied.laid), "a strategy changes no parameter's name"
    if param_dtype is not None and "compute_in" not in takes:
        compute_in(model, param_dtype, parameters="param_dtype" not in takes)
    leaves = dict(model.named_parameters()) | dict(applied.leaves)
    watch = FirstNonFinite(leaves, kept=applied.pipeline is not None)
    chain = Chain(watch, applied.sync)
    runner: Step
    if applied.pipeline is not None:
        runner = PipelineRunner(model, chain, mesh.wire, applied.pipeline)
    else:
        placements = [how for name in applied.leaves for _, how in applied.laid[name].splits]
        in_parts = any(isinstance(how, Shard) for how in placements)
        runner = Runner(model, chain, mesh.wire, named, leaves, in_parts=in_parts)
    return Job(model, mesh, applied, runner, watch, state)


def _agree(model: nn.Module, mesh: Mesh, broadcast: bool) -> None:
    """See that the ranks start from one model: rank 0's, or each its own, which must be equal."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    check_shapes_agree(state, mesh.world)
    if broadcast:
        for tensor in state.values():
            ops.broadcast_into(tensor.detach(), mesh.world).wait()
    elif not is_meta(model):  # what has no values yet will be drawn by the same seed
        check_tensors_agree(state, mesh.world)


def _narrow(dtype: torch.dtype, part: nn.Module, inputs: bool) -> None:
    compute_in(part, dtype, inputs=inputs)


def _own(model: nn.Module) -> Callable[[str], Tensor]:
    return lambda name: model.get_parameter(name).detach()


def _strategy(strategy: str | Apply, impl: str) -> Strategy:
    if callable(strategy):
        return Strategy(strategy, ("dp",))
    if (strategy, impl) in REFUSED:
        raise UserError(f"no strategy {strategy}@{impl}: {REFUSED[strategy, impl]}")
    if (strategy, impl) not in STRATEGIES:
        known = ", ".join(f"{name}@{by}" for name, by in STRATEGIES)
        raise UserError(f"no strategy {strategy}@{impl}; there is {known}")
    return STRATEGIES[strategy, impl]


def _refuse_unknown_options(apply: Apply, options: Mapping[str, Any], label: str) -> None:
    parameters = signature(apply).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN]
    for name in options:
        if name not in own:
            takes = f"it takes {', '.join(own)}" if own else "it takes none"
            raise UserError(f"{label} has no option {name}; {takes}")


def _find_units(model: nn.Module, units: Iterable[type[nn.Module] | str]) -> dict[str, nn.Module]:
    """Modules by name. Each entry must match: a typo would silently make no unit at all."""
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for unit in units:
        matches = {
            name: module
            for name, module in modules.items()
            if name and (name == unit if isinstance(unit, str) else isinstance(module, unit))
        }
        if not matches:
            label = unit if isinstance(unit, str) else unit.__name__
            classes = sorted({type(module).__name__ for module in modules.values()})
            raise UserError(f"unit {label} matches no module; classes here: {', '.join(classes)}")
        found |= matches
    return found


def _refuse_what_cannot_train(model: nn.Module) -> None:
    for module in model.modules():
        if any(isinstance(hook, ModuleHook) for hook in module._forward_pre_hooks.values()):
            raise UserError("this model is parallelized already; build a fresh one")
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UserError(f"{name} is complex, and sums of its gradient are not; use real parts")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UserError(f"{name} makes sparse gradients, which are not summed; sparse=False")


def _refuse_earlier_optimizers(model: nn.Module) -> None:
    """An optimizer built before holds the tensors of before, which a sharding strategy replaces.

    It would go on stepping them and never train the model. Refused under every strategy, so that
    changing the strategy is changing one word. The collector knows all live objects; asking it
    takes a tenth of a second, once.
    """
    ours = {id(p) for p in model.parameters()}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer):
            held = (p for group in thing.param_groups for p in group["params"])
            if any(id(p) in ours for p in held):
                raise UserError(
                    f"{type(thing).__name__} was built before parallelize() and would step the "
                    "wrong tensors; build it after: job.optimizer(torch.optim.AdamW, lr=...)"
                )
