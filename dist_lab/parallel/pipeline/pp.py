"""Pipeline parallelism: layers in stages, and micro-batches that follow each other through them.

    stage 0   F0 F1 F2 .  .  B0 .  ...        x -> layers 0, 1 -> send
    stage 1   .  F0 F1 .  B0 F2 B1 ...        receive -> layers 2, 3 -> send
    stage 2   .  .  F0 B0 F1 B1 F2 ...        receive -> layers 4, 5 -> loss

Other strategies share out space; this one splits time, so it is run by actions and not by hooks:
a schedule (schedules/library.py) says in which order, and executor.py does what each of them says.
Where the model is cut is partition.py's.

Cost per step, sent by a rank for each cut at its sides: m micro-batches of B T D elements forward,
and as much backward. Memory per rank: the parameters, gradients and optimizer state of its own
stages, 1/p of each, and the activations of so many micro-batches as the schedule holds at once.

[Note: what travels] Stages give each other tuples of tensors: what the next one reads, or one
further on. Their shapes need no message: each rank has the whole model on the meta device, where it
costs nothing, and passes the shape of each kind of micro-batch through it once; so micro-batches
may differ in rows. A receive is posted while its message is being made (`add_communication`), and
what is sent is held until it has left: of sends to others two at most are on their way.

[Note: whole gradients] loss_fn gives each micro-batch's share of the loss, already divided by the
global count; shares and gradients add up (see step/protocol.py), however many micro-batches and
in whatever order. A tensor that several stages hold, such as an embedding that is tied to the head,
has on each a part of its gradient, which is `partial` over their ranks; the sum is in `finish`.
Both start from one value and are updated by one gradient, so they stay equal. What comes back to a
stage is a tensor in any case: zeros where one process would have no gradient at all.
"""

from functools import cache, partial
from typing import Any

from dist_lab.errors import UserError
from dist_lab.parallel.pipeline.executor import Executor
from dist_lab.parallel.pipeline.runner import PipelineRunner
from dist_lab.parallel.pipeline.stages import Tied, keep_stages
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.library import example, make
from dist_lab.parallel.schedules.passes import (
    add_communication,
    add_unshard,
    mark_gradients_complete,
)
from dist_lab.step.protocol import Applied, Setup


def apply(
    setup: Setup,
    *,
    schedule: str = "1f1b",
    chunks: int | None = None,
    balance: str = "cost",
    example_inputs: Any = None,
    emulate_compute: float = 0.0,
) -> Applied:
    """Keep this rank's stages of a model, and make the pipeline that runs them.

    Args:
        schedule: a name in SCHEDULES, or a file: see `load`.
        chunks: stages a rank, where the schedule leaves it open; default 2.
        balance: "cost": cut so that the slowest stage is as fast as can be; "count": so that it
            has as few blocks as can be.
        example_inputs: one micro-batch, by which cost is measured. Without it a block of a model
            that has `stages` costs its parameters, and any other model cannot be cut.
        emulate_compute: milliseconds that a unit of compute is made to take at least, asleep:
            to see what a schedule is worth with fewer cores than ranks.

    Raises:
        UserError: more stages than blocks, a model that cannot be cut, a schedule that is not
            right or not for so many ranks, or one whose backward is in two halves where blocks
            compute again for the whole of theirs.
    """
    axis = setup.axis
    one = example(schedule, axis.size, chunks)
    if setup.recompute and one.splits_backward:
        raise UserError(
            "recompute computes a block again for the whole of its backward, which schedule "
            f"{schedule} does in two halves; leave it out, or take schedule 1f1b"
        )
    kept = keep_stages(setup, one.rank_of, balance=balance, example=example_inputs)
    if example_inputs is not None:
        kept.shapes.of(example_inputs, training=True)  # now, and not in a step that is measured
    schedule_for = cache(partial(_schedule, schedule, axis.size, chunks))
    executor = Executor(
        axis, kept.parts, kept.shapes, one.rank_of, schedule_for, emulate_compute / 1000
    )
    runner = partial(PipelineRunner, pipeline=executor)
    return Applied(
        kept.layouts, Tied(setup.model, kept.tied), make_runner=runner, buffers=kept.buffers
    )


def _schedule(name: str, ranks: int, chunks: int | None, microbatches: int) -> Schedule:
    schedule = make(name, ranks, microbatches, chunks)
    return add_unshard(mark_gradients_complete(add_communication(schedule)))
