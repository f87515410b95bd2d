"""PyTorch's pipelining, the twin of pp.py: the same stages, run by the library's schedules.

    gpipe    ScheduleGPipe        interleaved    ScheduleInterleaved1F1B
    1f1b     Schedule1F1B         zbv            ScheduleZBVZeroBubble
    zb       ScheduleInterleavedZeroBubble, which with one stage a rank is ZB-H1

Each has the same actions in the same order as our schedule of that name. The exception is zbv: the
library follows the paper's pattern for many micro-batches; we compute an order for each number.

We pass the library the shapes of the tensors between stages. Otherwise it would find them by a
forward of its own, which BatchNorm would count, and send them as objects. We also tell it not to
scale gradients, because the shares of the loss are divided already.

The library takes a whole batch and splits it, so all micro-batches have one shape. Its stages and
schedule are for one number of micro-batches and one shape; for another we build new ones. The
library only trains: evaluation runs the same stages by executor.py.

With fsdp a stage's module is an FSDPModule, with ddp or zero1 a DistributedDataParallel. The
library knows it by its class, and reduces the stage's gradients after its last backward.

Cost per step: as pp.py. Memory per rank: as pp.py, plus receive buffers for all micro-batches of a
step at each stage boundary, kept from step to step, with any schedule. Its zero-bubble schedules do
not split the backward of the first stage, for which no rank waits: all of it runs at the time of W.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lab.comm.agree import together
from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair, share_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.pipeline.executor import Executor
from dist_lab.parallel.pipeline.library_stages import (
    StageForward,
    check_lost_gradients,
    check_one_shape,
    meta_tensor,
)
from dist_lab.parallel.pipeline.runner import PipelineRunner, RunnerEvents
from dist_lab.parallel.pipeline.split_backward import SplitBackward
from dist_lab.parallel.pipeline.stages import Shapes, StageInput, Tied, keep_stages
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Schedule
from dist_lab.parallel.schedules.library import forward_only, make, placement
from dist_lab.parallel.schedules.passes import add_communication
from dist_lab.parallel.schedules.simulate import TimedAction
from dist_lab.step.protocol import Applied, Chain, Phase
from dist_lab.step.setup import Setup, WeightWork

LIBRARY_NAMES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
SPLIT_BACKWARD = ("zb", "zbv")
ONE_STAGE = ("gpipe", "1f1b")  # these take a stage, not a list of stages


def apply(
    setup: Setup,
    *,
    schedule: str = "1f1b",
    chunks: int | None = None,
    balance: str = "cost",
    example_inputs: Tensor | None = None,
) -> Applied:
    """Keep this rank's stages of the model, and make each a `PipelineStage`. Arguments as in pp.py.

    Raises:
        UserError: as in pp.py; the schedule is a file; or a gradient would be lost. In a step,
            before anything is sent: the micro-batches have several shapes, or the library does not
            take their number.
    """
    if schedule not in LIBRARY_NAMES:
        raise UserError(
            f"PyTorch's pipelining runs schedules by name, not {schedule!r:.40} (schedule=); give "
            f'{", ".join(LIBRARY_NAMES)}, or impl="hand"'
        )
    if not dist.is_initialized():
        raise UserError(
            "PyTorch's pipelining needs a process group, even for one: torchrun --nproc_per_node=1"
        )
    rank_of = placement(schedule, setup.axis.size, chunks)
    local = keep_stages(setup, rank_of, balance=balance, example=example_inputs)

    def make_runner(
        model: nn.Module, sync: Chain, comm: CommContext, units: Any, applied: Applied
    ) -> PipelineRunner:
        local.shapes.complete()
        assert applied.stages is not None
        if schedule in SPLIT_BACKWARD and applied.stages is not local.stages:
            raise UserError(
                "PyTorch's zero bubble computes weight gradients by torch.autograd.grad, which "
                "calls no hook of DistributedDataParallel, so they would not be summed over dp; "
                'give schedule="1f1b", or impl="hand"'
            )
        if schedule in SPLIT_BACKWARD and applied.unshard_each_action:
            raise UserError(
                "PyTorch's zero bubble looks for a stage's weights after its forward, when "
                "reshard_after_forward has put shards in their place; leave that out, or give "
                'schedule="1f1b", or impl="hand"'
            )
        pipeline = TorchPipeline(
            setup.axis, setup.mesh.data, applied.stages.modules, local.shapes, rank_of, schedule
        )
        if example_inputs is not None:
            pipeline.find_shapes(example_inputs)  # now, so that errors come early
        return PipelineRunner(model, sync, comm, units, applied, pipeline=pipeline)

    count = len(local.stages.modules)
    stages = "one stage" if count == 1 else f"{count} stages"
    about = f"torch {LIBRARY_NAMES[schedule]}, {stages} a rank, shapes known, scale_grads=False"
    return Applied(
        local.layouts, Tied(setup, local.tied), about, make_runner=make_runner,
        buffers=local.buffers, stages=local.stages,
    )  # fmt: skip


class TorchPipeline:
    """Runs the micro-batches of a step by the library, as one batch.

    Attributes:
        modules: stage -> its module, for this rank's stages. The library knows FSDPModule and
            DistributedDataParallel, and reduces their gradients after the last backward.
        timings: always empty, because the library does not report the times of its actions.
        schedule_for: number of micro-batches -> the library's schedule.
    """

    def __init__(
        self,
        axis: Axis,
        data: Axis,
        modules: Mapping[int, nn.Module],
        shapes: Shapes,
        rank_of: Mapping[int, int],
        name: str,
    ) -> None:
        from torch.distributed import pipelining  # not at the top: this import takes seconds

        self.library: Any = pipelining
        self.axis, self.data, self.modules, self.shapes = axis, data, modules, shapes
        self.num_stages, self.name = len(rank_of), name
        self.timings: list[TimedAction] = []
        self.group = axis.group_even_of_one()
        self.schedule_for: Callable[[int], Schedule] = cache(self._schedule)
        forwards_for = cache(lambda m: add_communication(forward_only(rank_of, m)))
        self.evaluator = Executor(
            axis, modules, shapes, self.schedule_for, forwards_for, SplitBackward(WeightWork())
        )
        # The library's schedule and stages, with receive buffers; and the sizes they are for.
        self.built: tuple[Any, list[Any]] | None = None
        self.built_for: tuple[int, torch.Size, torch.dtype] | None = None
        self.loss_fn: LossFn | None = None  # of the current run, as is the next
        self.events: RunnerEvents | None = None
        self.forwards: dict[int, int] = {}  # stage -> the number of forwards so far
        self.model_outputs: list[Any] = []  # of micro-batches whose loss is not computed yet
        self.gradients_checked = name not in SPLIT_BACKWARD  # that no stage loses a gradient

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents) -> Tensor:
        self._check_number(len(microbatches))
        with together(self.data):  # a rank that is refused alone would leave others waiting
            check_one_shape(microbatches)
        # This label covers backward too: the library does not report when backward begins.
        events.on_phase(Phase.FORWARD, LIBRARY_NAMES[self.name])
        self.loss_fn, self.events = loss_fn, events
        return self._step(microbatches)

    def evaluate(
        self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents
    ) -> Tensor:
        return self.evaluator.evaluate(microbatches, loss_fn, events)

    def _step(self, microbatches: Sequence[Pair]) -> Tensor:
        schedule, stages = self._prepare(len(microbatches), microbatches[0][0])
        inputs = [torch.cat([x for x, _ in microbatches])] if 0 in self.modules else []
        has_last = self.num_stages - 1 in self.modules
        targets = torch.cat([y for _, y in microbatches]) if has_last else None
        losses: list[Tensor] = []
        self.forwards = dict.fromkeys(self.modules, 0)
        try:
            schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        except BaseException as error:
            self.built = self.built_for = None  # they are in the middle of a run
            self.model_outputs.clear()
            if isinstance(error.__cause__, UserError):  # the library wraps it, with all arguments
                raise error.__cause__ from None
            raise
        for stage in stages:
            stage.clear_runtime_states()  # or its outputs would be kept until the next run
        zero = torch.zeros((), dtype=torch.float64, device=self.axis.device)
        return sum((share.detach() for share in losses), zero)

    def _forward_of(self, stage: int) -> AbstractContextManager[None]:
        """Around a forward of a stage. The library runs those of a stage in order."""
        assert self.events is not None
        self.forwards[stage] += 1
        return self.events.forward(self.forwards[stage] - 1)

    def _backward(
        self, backward: Callable[..., Any], microbatch: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The library's backward. What it recomputes belongs to the same micro-batch."""
        assert self.events is not None
        with self.events.forward(microbatch):
            return backward(microbatch, *args, **kwargs)

    def _share(self, nothing: tuple[()], targets: Tensor) -> Tensor:
        assert self.loss_fn is not None
        output = self.model_outputs.pop()
        # .sum() of one number makes a copy: the library cannot detach a view in place.
        return share_of(output, self.loss_fn(output, targets)).sum()

    def _reduce(self, stage: int, reduce: Callable[[int], None], scale: int) -> None:
        """A stage's backward is over, and the library is about to reduce what FSDP2 shards."""
        assert self.events is not None
        self.events.on_phase(Phase.BACKWARD, LIBRARY_NAMES[self.name])
        self.events.on_gradients(stage, last=True)
        reduce(scale)

    # --- the library's objects --------------------------------------------------------------------

    def find_shapes(self, x: Tensor) -> list[list[StageInput]]:
        """Each stage's inputs for a micro-batch like x. Checks once that no gradient is lost."""
        shapes = self.shapes.of(x, training=True)
        if not self.gradients_checked:
            check_lost_gradients(self.shapes, shapes)
            self.gradients_checked = True
        return shapes

    def _prepare(self, microbatches: int, x: Tensor) -> tuple[Any, list[Any]]:
        """The library's schedule and stages for this number of micro-batches like x."""
        key = (microbatches, x.shape, x.dtype)
        if self.built is None or self.built_for != key:
            self.built = None  # first, to free its receive buffers
            self.built, self.built_for = self._build(microbatches, self.find_shapes(x)), key
        return self.built

    def _build(
        self, microbatches: int, shapes: Sequence[Sequence[StageInput]] = ()
    ) -> tuple[Any, list[Any]]:
        """Build the library's schedule and stages. Without shapes they cannot run, only be read."""
        # The output of the last stage is not sent, so its shape does not matter.
        metas = [tuple(map(meta_tensor, inputs)) for inputs in shapes]
        metas.append((torch.empty(0, device="meta"),))
        stages = []
        for s, module in self.modules.items():
            args = {"input_args": metas[s], "output_args": metas[s + 1]} if shapes else {}
            stage = self.library.PipelineStage(
                module, s, self.num_stages, self.axis.device, group=self.group, **args
            )
            output_shapes = shapes[s + 1] if s + 1 < len(shapes) else None
            forward = stage.forward_maybe_with_nosync
            stage.forward_maybe_with_nosync = StageForward(
                s, forward, output_shapes, self.model_outputs, self._forward_of
            )
            for name in ("backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, name, partial(self._backward, getattr(stage, name)))
            stage.perform_reduce_grad = partial(self._reduce, s, stage.perform_reduce_grad)
            stages.append(stage)
        schedule = getattr(self.library, LIBRARY_NAMES[self.name])(
            stages[0] if self.name in ONE_STAGE else stages,
            microbatches,
            loss_fn=self._share,
            scale_grads=False,
        )
        return schedule, stages

    def _schedule(self, microbatches: int) -> Schedule:
        self._check_number(microbatches)
        if self.name in ONE_STAGE:  # the library runs these by loops, in the same order as ours
            return make(self.name, self.axis.size, microbatches)
        schedule, _ = self._build(microbatches)
        rows = ((Action.parse(str(a)) for a in row) for row in schedule.pipeline_order.values())
        return Schedule(
            self.name, tuple(tuple(a for a in row if a and a.op in COMPUTE) for row in rows)
        )

    def _check_number(self, microbatches: int) -> None:
        """Raise UserError, the same on every rank, if the library does not take this number."""
        ranks = self.axis.size
        if self.name == "interleaved":
            make(self.name, ranks, microbatches, self.num_stages // ranks)
        if self.name == "1f1b" and microbatches < ranks:
            raise UserError(
                f"PyTorch's 1f1b takes at least one micro-batch per rank, {ranks}, not "
                f"{microbatches} (microbatches=); give microbatches={ranks}, "
                'schedule="gpipe" or impl="hand"'
            )
        rounds = max(1, microbatches // ranks)
        if self.name == "zb" and microbatches % rounds:
            raise UserError(
                f"PyTorch's zero bubble takes micro-batches in {rounds} equal rounds of at least "
                f"{ranks}, but {microbatches} do not divide by {rounds} (microbatches=); give "
                f'microbatches={rounds * ranks}, or impl="hand"'
            )
