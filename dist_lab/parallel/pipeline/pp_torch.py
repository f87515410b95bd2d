"""PyTorch's own pipelining, the twin of pp.py: the same stages, run by the library's schedules.

    gpipe    ScheduleGPipe        interleaved    ScheduleInterleaved1F1B
    1f1b     Schedule1F1B         zbv            ScheduleZBVZeroBubble
    zb       ScheduleInterleavedZeroBubble, which with one stage a rank is ZB-H1

Each does what ours of that name does in the same order, but for zbv: there the library follows the
paper's pattern, which was made for many micro-batches, and ours is made anew for each number.

What the library is told besides: the shapes that stages give each other, or it would send objects
about and learn them from a forward of its own, which BatchNorm counts; and not to divide gradients,
as the shares of the loss are divided already.

It is given a whole batch and cuts it by itself, so micro-batches are of one shape. A stage and its
schedule are for one number of them and one shape; for another, both are made anew. Only training is
the library's: evaluation runs the same stages by executor.py.

Cost per step: as pp.py. Memory per rank: as pp.py, and for each cut at its sides room for all that
is received there in a step, kept from step to step, whatever the schedule. Its zero bubble does the
backward of the first stage, for which nobody waits, in one piece where others do their second half.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair, share_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.pipeline.executor import Executor
from dist_lab.parallel.pipeline.runner import PipelineRunner, RunnerEvents
from dist_lab.parallel.pipeline.stages import Shapes, StageInput, Tied, check_shapes, keep_stages
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Schedule
from dist_lab.parallel.schedules.library import make, placement
from dist_lab.parallel.schedules.simulate import TimedAction
from dist_lab.step.protocol import Applied, Phase, Setup
from dist_lab.torch_private import is_view

LIBRARY_NAMES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
SPLIT_BACKWARD = ("zb", "zbv")
ONE_STAGE = ("gpipe", "1f1b")  # a rank, and no list of them


def apply(
    setup: Setup,
    *,
    schedule: str = "1f1b",
    chunks: int | None = None,
    balance: str = "cost",
    example_inputs: Tensor | None = None,
) -> Applied:
    """Keep this rank's stages of a model, and hand each to `PipelineStage`. Arguments as in pp.py.

    Raises:
        UserError: what pp.py refuses, a schedule from a file, a gradient that would be lost. In a
            step, before anything is sent: micro-batches of several shapes, or of a number that the
            library does not take.
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
    kept = keep_stages(setup, rank_of, balance=balance, example=example_inputs)
    pipeline = TorchPipeline(setup.axis, kept.parts, kept.shapes, rank_of, schedule)
    if example_inputs is not None:
        pipeline.learn(example_inputs)  # now, so that what is refused is, and no step pays for it
    own = "one stage" if len(kept.parts) == 1 else f"{len(kept.parts)} stages"
    about = f"torch {LIBRARY_NAMES[schedule]}, {own} a rank, shapes known, scale_grads=False"
    runner = partial(PipelineRunner, pipeline=pipeline)
    return Applied(
        kept.layouts, Tied(setup.model, kept.tied), about, make_runner=runner, buffers=kept.buffers
    )


class TorchPipeline:
    """Hands the micro-batches of a step to the library, as one batch.

    Attributes:
        parts: this rank's stages, by number.
        slots: none: the library does not say when it does what.
        schedule_for: number of micro-batches -> what the library will do.
    """

    def __init__(
        self,
        axis: Axis,
        parts: Mapping[int, nn.Module],
        shapes: Shapes,
        rank_of: Mapping[int, int],
        name: str,
    ) -> None:
        from torch.distributed import pipelining  # here: it takes seconds

        self.library: Any = pipelining
        self.axis, self.parts, self.shapes = axis, parts, shapes
        self.stages, self.name = len(rank_of), name
        self.slots: list[TimedAction] = []
        self.group = axis.group_even_of_one()
        self.schedule_for: Callable[[int], Schedule] = cache(self._schedule)
        self.forwards = Executor(axis, parts, shapes, rank_of, self.schedule_for)
        # The library's schedule and stages, with room for what is received, and for what they are.
        self.made: tuple[Any, list[Any]] | None = None
        self.made_for: tuple[int, torch.Size, torch.dtype] | None = None
        self.loss_fn: LossFn | None = None  # of the run that is under way
        self.safe = name not in SPLIT_BACKWARD  # no stage loses a gradient

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents) -> Tensor:
        self._refuse_number(len(microbatches))
        _refuse_unlike(microbatches)
        # And backward: the library does not say which.
        events.on_phase(Phase.FORWARD, LIBRARY_NAMES[self.name])
        total = self._play(microbatches, loss_fn)
        events.on_phase(Phase.BACKWARD, LIBRARY_NAMES[self.name])
        for stage in self.parts:
            events.on_gradients(stage, last=True)
        return total

    def evaluate(
        self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents
    ) -> Tensor:
        return self.forwards.evaluate(microbatches, loss_fn, events)

    def _play(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        schedule, stages = self._prepare(len(microbatches), microbatches[0][0])
        inputs = [torch.cat([x for x, _ in microbatches])] if 0 in self.parts else []
        last = self.stages - 1 in self.parts
        targets = torch.cat([y for _, y in microbatches]) if last else None
        losses: list[Tensor] = []
        self.loss_fn = loss_fn
        try:
            schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        except BaseException as error:
            self.made = self.made_for = None  # half of a run is left in it
            if isinstance(error.__cause__, UserError):  # of a stage, with all its arguments around
                raise error.__cause__ from None
            raise
        for stage in stages:
            stage.clear_runtime_states()  # what it has given, which would stay till the next run
        zero = torch.zeros((), dtype=torch.float64, device=self.axis.device)
        return sum((share.detach() for share in losses), zero)

    def _share(self, output: Any, targets: Tensor) -> Tensor:
        assert self.loss_fn is not None
        # Summed, though it is one number: what is a view the library cannot detach.
        return share_of(output, self.loss_fn(output, targets)).sum()

    # --- the library's objects --------------------------------------------------------------------

    def learn(self, x: Tensor) -> list[list[StageInput]]:
        """What stages are given of a micro-batch like x."""
        given = self.shapes.of(x, training=True)
        if not self.safe:
            _refuse_lost_gradients(self.shapes, given)
            self.safe = True
        return given

    def _prepare(self, microbatches: int, x: Tensor) -> tuple[Any, list[Any]]:
        """The library's schedule and stages for so many micro-batches like x."""
        wanted = (microbatches, x.shape, x.dtype)
        if self.made is None or self.made_for != wanted:
            self.made = None  # first, as it has room for what it receives
            self.made, self.made_for = self._make(microbatches, self.learn(x)), wanted
        return self.made

    def _make(
        self, microbatches: int, given: Sequence[Sequence[StageInput]] = ()
    ) -> tuple[Any, list[Any]]:
        """The same. given: what each stage is given; without it they can be read, and not run."""
        # What the last one gives is not sent, and may be said to be anything.
        metas = [tuple(map(_meta, shapes)) for shapes in given] + [(torch.empty(0, device="meta"),)]
        stages = []
        for s, module in self.parts.items():
            part = Part(s, module, given[s + 1] if s + 1 < len(given) else None)
            ends = {"input_args": metas[s], "output_args": metas[s + 1]} if given else {}
            device = self.axis.device
            stages.append(
                self.library.PipelineStage(part, s, self.stages, device, group=self.group, **ends)
            )
        schedule = getattr(self.library, LIBRARY_NAMES[self.name])(
            stages[0] if self.name in ONE_STAGE else stages,
            microbatches,
            loss_fn=self._share,
            scale_grads=False,
        )
        return schedule, stages

    def _schedule(self, microbatches: int) -> Schedule:
        self._refuse_number(microbatches)
        if self.name in ONE_STAGE:  # which it runs by loops of its own, in this order
            return make(self.name, self.axis.size, microbatches)
        theirs, _ = self._make(microbatches)
        rows = ((Action.parse(str(a)) for a in row) for row in theirs.pipeline_order.values())
        return Schedule(
            self.name, tuple(tuple(a for a in row if a and a.op in COMPUTE) for row in rows)
        )

    def _refuse_number(self, microbatches: int) -> None:
        """Before anything is sent, and the same on every rank."""
        ranks = self.axis.size
        if self.name == "interleaved":
            make(self.name, ranks, microbatches, self.stages // ranks)
        if self.name == "1f1b" and microbatches < ranks:
            raise UserError(
                f"PyTorch's 1f1b takes a micro-batch a rank at least, {ranks}, not {microbatches} "
                f'(microbatches=); give microbatches={ranks}, schedule="gpipe" or impl="hand"'
            )
        rounds = max(1, microbatches // ranks)
        if self.name == "zb" and microbatches % rounds:
            raise UserError(
                f"PyTorch's zero bubble takes micro-batches in {rounds} equal rounds of {ranks} or "
                f"more, and {microbatches} do not divide so (microbatches=); give microbatches="
                f'{rounds * ranks}, or impl="hand"'
            )


class Part(nn.Module):
    """A stage as the library can take it: what it sends is contiguous, and as it was told.

    What is a view is copied: the library detaches outputs in place, and a view it cannot.
    """

    def __init__(self, stage: int, part: nn.Module, gives: Sequence[StageInput] | None) -> None:
        super().__init__()
        self.stage, self.part, self.gives = stage, part, gives

    # Not `forward`, so that no hook sees it: torch's FlopCounterMode has hooks for the gradients of
    # what any module is given, and cannot have them for leaves, which the library gives to this.
    def __call__(self, *given: Tensor) -> Any:
        output = self.part(*(self._received(x) for x in given))
        if self.gives is None:
            return output
        check_shapes(self.stage, output, self.gives)
        return tuple(
            x.clone(memory_format=torch.contiguous_format) if is_view(x) else x.contiguous()
            for x in output
        )

    def _received(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.view_as(x)  # a node of this micro-batch's, or hooks would pile up on the buffer
            x.register_hook(Tensor.contiguous)
        return x


def _meta(shape: StageInput) -> Tensor:
    floats = shape.dtype.is_floating_point
    return torch.empty(shape.shape, dtype=shape.dtype, device="meta", requires_grad=floats)


def _refuse_unlike(microbatches: Sequence[Pair]) -> None:
    odd = next((v for pair in microbatches for v in pair if not isinstance(v, Tensor)), None)
    if odd is not None:
        raise UserError(
            f"PyTorch's pipelining puts micro-batches together, and a {type(odd).__name__} is not "
            'put together; give pairs of one tensor and targets, or impl="hand"'
        )
    kinds = {(x.shape, x.dtype, y.shape, y.dtype) for x, y in microbatches}
    rows = sorted({len(x) for x, _ in microbatches})
    if len(kinds) != 1 or rows[0] == 0:
        raise UserError(
            "PyTorch's pipelining takes micro-batches of one shape, and of a row at least; these "
            f"have {' and '.join(map(str, rows)) or 'no'} rows, in {len(kinds)} shapes; give a "
            'batch that divides, or impl="hand"'
        )


def _refuse_lost_gradients(shapes: Shapes, given: Sequence[Sequence[StageInput]]) -> None:
    """The library finds the weights of a half backward by way of what the stage was given.

    So what a stage makes of its weights alone would have no gradient, and nobody would say so. The
    first stage, which is given nothing that has one, it leaves to do its backward whole.
    """
    for stage, meta_model in list(enumerate(shapes.meta_stages))[1:-1]:
        inputs = [_meta(shape) for shape in given[stage]]
        trained = [p for p in meta_model.parameters() if p.requires_grad]
        with torch.enable_grad():
            whole = [x.requires_grad for x in meta_model(*inputs)]
            for p in trained:
                p.requires_grad_(False)
            by_inputs = [x.requires_grad for x in meta_model(*inputs)]
            for p in trained:
                p.requires_grad_(True)
        if whole != by_inputs:
            raise UserError(
                f"stage {stage} gives what depends on its weights alone, and PyTorch's zero bubble "
                'would lose their gradient; give schedule="1f1b", or impl="hand"'
            )
