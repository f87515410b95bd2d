"""The comparison engine: is a parallel run equal to one process?

It is not enough that the ranks agree, or that the loss falls. The reference is a dozen lines of
plain PyTorch on the whole batch, with none of our code in it: see reference.py. Every rank runs it.
After every step each rank compares the job under test with the reference: the loss, every gradient
(summed, before clipping), the global gradient norm and every weight after the update. compare.py
defines the error between two tensors and decides what is only rounding.

Verify in float64: there a bug exceeds 1e-10, and rounding does not.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.compose import parallelize
from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.loss import LossFn, Pair, cross_entropy_sum
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.optim.matrices import Groups
from dist_lab.programs.verify import batch as batches
from dist_lab.programs.verify.bits import compare_bits, one_process_by_shards
from dist_lab.programs.verify.compare import TOLERANCE, State, compare, worst_over_ranks
from dist_lab.programs.verify.reference import (
    OnModel,
    batchnorm_in_words,
    check_model,
    checked_steps,
    one_process,
    state,
)
from dist_lab.programs.verify.repeat import repeat_first_step, weights_and_buffers
from dist_lab.programs.verify.report import Comparison, VerifyReport
from dist_lab.step.fixed_order.digest import sha256
from dist_lab.step.fixed_order.order import microbatches_of, shards_of
from dist_lab.step.protocol import Apply
from dist_lab.transforms.recipe import Recipe


def verify(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Pair],
    mesh: Mesh,
    strategy: str | Apply | None = None,
    impl: str = "hand",
    *,
    steps: int = 3,
    microbatches: int | None = None,
    clip: float | None = 1.0,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    loss_sum: LossFn = cross_entropy_sum,
    units: Iterable[type[nn.Module] | str] = (),
    param_dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    sync_batchnorm: bool = False,
    reduce_order: str | None = None,
    reference: Iterable[tuple[Pair, State]] | None = None,
    dropout: str | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    **strategy_options: Any,
) -> VerifyReport:
    """Train a model in parallel and in one process, and compare the two. Collective over the mesh.

    Args:
        build_model: must return the same weights at every call on every rank. Its dtype is the
            dtype of the comparison; of several dtypes, the coarsest.
        build_batch: step -> (inputs, targets), the whole global batch: tensors, or dicts, tuples,
            lists and dataclasses of tensors, with the rows in dim 0. It must return the same at
            every call on every rank. Each rank takes its own rows; any number of rows works.
        microbatches: the number of micro-batches that each rank accumulates; default 1, or one for
            each virtual shard.
        options: the optimizer's keyword arguments; default lr=1e-3.
        groups: the options of each parameter's group, as for `job.optimizer`.
        loss_sum: (output, target) -> the sum over the rows. The engine divides it by the number of
            targets: the elements of the target tensor, or of the first tensor in a structure.
        param_dtype: see `parallelize`; the reference then computes in it too.
        tolerance: default by dtype, see TOLERANCE.
        reduce_order: "fixed" or "fixed:V": compare bits, see bits.py and `parallelize`.
        reference: the steps of `one_process`, if the caller has run them already. Then the first
            step is not run again to check that it is repeatable.
        sync_batchnorm, dropout, recipe, seed, strategy_options: see `parallelize`.

    Raises:
        UserError: on every rank, if all rows are equal (that would hide a missing sum over ranks),
            the one-process run gives another result when repeated, as with plain dropout (see
            `repeat_first_step`), the batch differs between ranks or cannot be split by rows, there
            is nothing to train, or the reference is not finite.
    """
    options = {"lr": 1e-3} if options is None else options
    shards = 0 if reduce_order is None else shards_of(reduce_order)
    if microbatches is None:
        microbatches = microbatches_of(shards, mesh.data.size) if shards else 1
    if min(steps, microbatches) < 1:
        raise UserError(f"steps={steps} and microbatches={microbatches} must be 1 or more")
    with together(mesh.world):
        tested = build_model()
        check_model(tested, dropout, recipe, sync_batchnorm=sync_batchnorm)
        dtype = coarsest(tested, param_dtype, tolerance)
    batchnorm = batchnorm_in_words(tested, mesh.data.size, microbatches, sync_batchnorm)
    tested = tested.to(mesh.device)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    tolerance = 0.0 if shards else tolerance
    built = weights_and_buffers(tested) if reference is None else {}
    job = parallelize(
        tested, mesh, strategy, impl, units=units, param_dtype=param_dtype,
        broadcast=False, sync_batchnorm=sync_batchnorm, reduce_order=reduce_order,
        dropout=dropout, recipe=recipe, seed=seed, **strategy_options,
    )  # fmt: skip
    opt = job.optimizer(optimizer, groups=groups, **options)
    on_model = None if recipe is None else OnModel(recipe, tuple(units))
    source = build_model, build_batch, mesh.data.size, mesh.device
    if reference is None and shards:
        reference = one_process_by_shards(
            *source, shards=shards, steps=steps, clip=clip, optimizer=optimizer, options=options,
            groups=groups, loss_sum=loss_sum, dropout=dropout, recipe=on_model, seed=seed,
        )  # fmt: skip
    elif reference is None:
        run_options: dict[str, Any] = {
            "microbatches": microbatches, "loss_sum": loss_sum, "param_dtype": param_dtype,
            "sync_batchnorm": sync_batchnorm, "dropout": dropout, "recipe": on_model,
            "seed": seed,
        }  # fmt: skip
        reference = one_process(
            *source, steps=steps, clip=clip, optimizer=optimizer, options=options, groups=groups,
            **run_options,
        )  # fmt: skip
        reference = repeat_first_step(
            reference, built, *source, dtype=dtype,
            tolerance=max(tolerance, TOLERANCE.get(dtype, 0.0)), **run_options,
        )  # fmt: skip
    comparisons: list[Comparison] = []
    rounding: dict[str, Tensor] = {}
    for step, (batch, expected) in enumerate(checked_steps(reference, mesh)):
        if step == 0 and mesh.data.size > 1 and batches.all_rows_equal(batch[0]):
            raise UserError(
                "all rows of the batch are equal, which would hide a missing sum over ranks; give "
                "rows that differ"
            )
        pieces = _own_microbatches(batches.copy(batch), mesh.data, microbatches, shards)
        ours = _tested_step(job, opt, pieces, clip, loss_sum)
        if shards:
            comparisons += compare_bits(step, ours, expected)
        else:
            comparisons += compare(step, ours, expected, rounding, dtype)
    weights = {n: w for n, w in ours["weight"].items() if w is not None and n in job.layouts}
    digest = sha256(weights) if shards else ""
    return VerifyReport(
        job.strategies, str(mesh), str(dtype).removeprefix("torch."), tolerance,
        worst_over_ranks(comparisons, mesh), batchnorm, digest, recipe is not None,
    )  # fmt: skip


def _own_microbatches(batch: Pair, data: Axis, microbatches: int, shards: int) -> list[Pair]:
    """This rank's rows, as micro-batches: the batch is split by ranks first, or into shards."""
    if shards:
        return batches.slice_rows(batch, shards)[data.index * microbatches :][:microbatches]
    return batches.slice_rows(batches.slice_rows(batch, data.size)[data.index], microbatches)


def _tested_step(
    job: Job,
    optimizer: torch.optim.Optimizer,
    microbatches: list[Pair],
    clip: float | None,
    loss_sum: LossFn,
) -> State:
    """Runs the same step as a user of the library would write it."""
    total = job.count(sum(batches.count(target) for _, target in microbatches))
    loss = job.run(microbatches, lambda output, target: loss_sum(output, target) / total)
    job.finish()
    gradients = job.full_gradients()
    norm = job.clip_grad_norm(clip)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()
    weights = job.full_state_dict()
    return state(loss, gradients, norm, weights, weights)


def coarsest(
    model: nn.Module, param_dtype: torch.dtype | None, tolerance: float | None
) -> torch.dtype:
    """Returns the least precise dtype that the model computes in."""
    named = reversed([*model.named_parameters()])  # the first of each dtype wins
    first_of_dtype = {p.dtype: name for name, p in named if p.is_floating_point()}
    dtypes = [param_dtype] if param_dtype is not None else list(first_of_dtype)
    coarsest = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, math.inf))
    if coarsest not in TOLERANCE and tolerance is None:
        name = str(coarsest).removeprefix("torch.")
        raise UserError(
            f"{first_of_dtype.get(coarsest, 'param_dtype')} is {name}, which has no default "
            "tolerance; build the model in float64 to verify, or give tolerance="
        )
    return coarsest
