"""Pipeline parallelism: the layers are split into stages, and micro-batches flow through them.

    stage 0   F0 F1 F2 .  .  B0 .  ...        x -> layers 0, 1 -> send
    stage 1   .  F0 F1 .  B0 F2 B1 ...        receive -> layers 2, 3 -> send
    stage 2   .  .  F0 B0 F1 B1 F2 ...        receive -> layers 4, 5 -> loss

Other strategies shard tensors; this one orders work in time. So actions drive it, not hooks: a
schedule (schedules/library.py) puts the actions in order, and executor.py executes them one by one.
partition.py chooses the split points of the model.

Cost per step: at each of its stage boundaries a rank sends m micro-batches of B T D elements, as
activations to the next stage or as gradients to the previous one. Memory per rank: parameters,
gradients and optimizer state of its own stages, 1/p of the model, and the activations of as many
micro-batches as the schedule keeps in flight.

[Note: what travels] A stage sends a tuple of tensors: all that the next stage or a later one reads.
Shapes are never sent. Each rank has a copy of the whole model on the meta device, which takes no
memory, and runs each new shape of micro-batch through it once; so micro-batches may differ in rows.
Receives are posted while the sender still computes (`add_communication`). A sent tensor is kept
until its send completes; at most two sends are outstanding.

[Note: whole gradients] loss_fn returns the micro-batch's share of the loss, already divided by the
global count. Shares and gradients add up (step/protocol.py), for any number and order of
micro-batches. A parameter of several stages, such as an embedding tied to the head, gets a part of
its gradient on each; `finish` sums them. The copies start equal and get equal gradients, so they
stay equal. A stage sends zeros for an input that got no gradient, so its peer always gets a tensor.
"""

from functools import cache, partial
from typing import Any

from torch import nn

from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.parallel.pipeline.executor import Executor
from dist_lab.parallel.pipeline.runner import PipelineRunner
from dist_lab.parallel.pipeline.split_backward import SplitBackward
from dist_lab.parallel.pipeline.stages import Tied, keep_stages
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.library import example, forward_only, make
from dist_lab.parallel.schedules.passes import (
    add_communication,
    add_unshard,
    mark_gradients_complete,
)
from dist_lab.step.protocol import Applied, Chain
from dist_lab.step.setup import Setup


def apply(
    setup: Setup,
    *,
    schedule: str = "1f1b",
    chunks: int | None = None,
    balance: str = "cost",
    example_inputs: Any = None,
    emulate_compute: float = 0.0,
) -> Applied:
    """Keep this rank's stages of the model, and build the pipeline that runs them.

    Args:
        schedule: a name in SCHEDULES, or a file: see `load`.
        chunks: stages per rank, if the schedule lets the user choose them (interleaved); default 2.
        balance: "cost": make the slowest stage as fast as possible; "count": make the largest
            number of blocks in a stage as small as possible.
        example_inputs: one micro-batch, used to estimate costs. Without it, a model with `stages`
            is split by parameter counts, and a model without them cannot be split.
        emulate_compute: milliseconds; a unit of compute that takes less is followed by a sleep.
            It shows a schedule's effect on a machine with fewer cores than ranks.

    Raises:
        UserError: there are more stages than blocks; the model cannot be split; the schedule has an
            error, is for another number of ranks, or splits the backward of recomputed blocks.
    """
    axis = setup.axis
    sample = example(schedule, axis.size, chunks)
    if setup.recompute and sample.splits_backward:
        raise UserError(
            f"recompute needs a backward in one piece, but schedule {schedule} splits it in two "
            "halves; leave recompute out, or take schedule 1f1b"
        )
    local = keep_stages(setup, sample.rank_of, balance=balance, example=example_inputs)

    def make_runner(
        model: nn.Module, sync: Chain, comm: CommContext, units: Any, applied: Applied
    ) -> PipelineRunner:
        local.shapes.complete()
        if example_inputs is not None:
            local.shapes.of(example_inputs, training=True)  # now, not in the first step
        prepare = partial(prepared, applied=applied)
        executor = Executor(
            axis, local.stages.modules, local.shapes,
            cache(lambda m: prepare(make(schedule, axis.size, m, chunks))),
            cache(lambda m: prepare(forward_only(sample.rank_of, m))),
            SplitBackward(setup.weight_work, fixed_order=setup.fixed_order), emulate_compute / 1000,
        )  # fmt: skip
        return PipelineRunner(model, sync, comm, units, applied, pipeline=executor)

    return Applied(
        local.layouts, Tied(setup, local.tied), make_runner=make_runner, buffers=local.buffers,
        stages=local.stages,
    )  # fmt: skip


def prepared(schedule: Schedule, applied: Applied) -> Schedule:
    """A schedule with messages, and with the actions of the strategy inside the pipeline."""
    schedule = mark_gradients_complete(add_communication(schedule))
    if applied.sharded_between_units:
        schedule = add_unshard(schedule, each_action=applied.unshard_each_action)
    return schedule
