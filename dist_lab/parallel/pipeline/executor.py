"""What each action of a pipeline's schedule does: it computes a stage, or sends what that made.

An `Executor` does this rank's actions one after another. What is made, on its way and held for
backward during one run is a `PipelineRun`. See pp.py for what travels, and which loss it is.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dist_lab.comm import ops
from dist_lab.loss import LossFn, Pair, one_number, share_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.pipeline.runner import RunnerEvents
from dist_lab.parallel.pipeline.split_backward import SplitBackward, WeightWork, fresh
from dist_lab.parallel.pipeline.stages import Shapes, StageInput, check_shapes
from dist_lab.parallel.schedules.actions import COSTS, Action, Op, Schedule
from dist_lab.parallel.schedules.library import forward_only
from dist_lab.parallel.schedules.passes import add_communication, add_unshard
from dist_lab.parallel.schedules.simulate import IN_FLIGHT, TimedAction
from dist_lab.step.hooks import map_tensors


class Executor:
    """Does this rank's actions of a schedule, one after another.

    Attributes:
        parts: this rank's stages, by number.
        slots: of the last run: when each action began and ended, in seconds of this rank's clock.
        peak: of the last run: how many forwards were held at once.
    """

    def __init__(
        self,
        axis: Axis,
        parts: Mapping[int, nn.Module],
        shapes: Shapes,
        rank_of: Mapping[int, int],
        schedule_for: Callable[[int], Schedule],
        seconds_per_unit: float = 0.0,
    ) -> None:
        self.axis, self.parts, self.shapes = axis, parts, shapes
        self.schedule_for, self.seconds_per_unit = schedule_for, seconds_per_unit
        self.forwards = cache(lambda m: add_unshard(add_communication(forward_only(rank_of, m))))
        self.splitter = SplitBackward()
        self.slots: list[TimedAction] = []
        self.peak = 0

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents) -> Tensor:
        schedule = self.schedule_for(len(microbatches))
        if schedule.splits_backward:
            for part in self.parts.values():
                self.splitter.split(part)
        return self._play(schedule, microbatches, loss_fn, events)

    def evaluate(
        self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents
    ) -> Tensor:
        return self._play(self.forwards(len(microbatches)), microbatches, loss_fn, events)

    def _play(
        self, schedule: Schedule, microbatches: Sequence[Pair], loss_fn: LossFn,
        events: RunnerEvents,
    ) -> Tensor:  # fmt: skip
        run = PipelineRun(self, schedule, microbatches, loss_fn)
        for action in schedule.ranks[self.axis.index]:
            events.on_action(action)
            run.do(action)
            if action.op in (Op.B, Op.W):
                events.on_gradients(action.stage, last=action.last)
        run.land()
        if run.training:
            self.slots, self.peak = run.slots, run.peak
        return run.total


Values = tuple[Tensor, ...]


@dataclass
class SavedForward:
    """What a forward leaves for its backward.

    inputs: what the stage was given, as leaves
    roots: where backward begins, an edge for each output that needs a gradient; unlike the output
        it keeps no memory
    weight_work: what W will have to do
    """

    inputs: Values
    roots: list[GradientEdge | None]
    weight_work: WeightWork


class PipelineRun:
    """One run: what has been made, what is on its way, and what is held for backward."""

    def __init__(
        self, executor: Executor, schedule: Schedule, microbatches: Sequence[Pair], loss_fn: LossFn
    ) -> None:
        self.executor, self.schedule, self.axis = executor, schedule, executor.axis
        self.microbatches, self.loss_fn = microbatches, loss_fn
        self.made: dict[tuple[Op, int, int], Values] = {}  # outputs (F), gradients of inputs (I)
        self.coming: dict[tuple[Op, int, int], list[ops.Pending]] = {}
        self.leaving: deque[list[ops.Pending]] = deque()
        self.held: dict[tuple[int, int], SavedForward] = {}
        self.slots: list[TimedAction] = []
        self.made_at = 0.0  # when, of what the next action is given: [Note: an emulated device]
        self.peak = 0
        self.training = torch.is_grad_enabled()
        self.shapes = [executor.shapes.of(x, training=self.training) for x, _ in microbatches]
        self.total = torch.zeros((), dtype=torch.float64, device=self.axis.device)

    def do(self, action: Action) -> None:
        stage, m = action.stage, action.microbatch
        match action.op:
            case Op.F:
                self.forward(action, self.given(Op.F, stage - 1, m) if stage else ())
            case Op.B | Op.I:
                self.backward(action, self.given(Op.I, stage + 1, m))
            case Op.W:
                with self.timed(action):
                    self.run_deferred(self.held.pop((stage, m)).weight_work)
            case Op.RECV_F:
                self.receive(Op.F, stage - 1, m, self.shapes[m][stage])
            case Op.RECV_B:
                shapes = self.shapes[m][stage + 1]
                self.receive(Op.I, stage + 1, m, [s for s in shapes if s.has_grad])
            case Op.SEND_F:
                self.send(self.made.pop((Op.F, stage, m)), stage + 1)
            case Op.SEND_B:
                self.send(self.made.pop((Op.I, stage, m)), stage - 1)

    def land(self) -> None:
        """All that was sent has left."""
        while self.leaving:
            self.until_left()
        assert not {*self.made, *self.coming, *self.held}, "the schedule leaves something behind"

    # --- compute ----------------------------------------------------------------------------------

    def forward(self, action: Action, given: Values) -> None:
        stage, m = action.stage, action.microbatch
        inputs, targets = self.microbatches[m]
        weight_work: WeightWork = []
        with self.timed(action), self.executor.splitter.deferring(weight_work):
            if stage == 0:
                given = (inputs,)
            elif self.training:
                pairs = zip(given, self.shapes[m][stage], strict=True)
                given = tuple(x.detach().requires_grad_(s.has_grad) for x, s in pairs)
            output = self.executor.parts[stage](*map_tensors(fresh, given))
            if stage == self.schedule.stages - 1:
                loss = self.loss_fn(output, targets)
                share = share_of(output, loss) if self.training else one_number(loss)
                self.total += share.detach()
                results: Values = (share,)
                if self.training:  # as if a stage after the last had sent it back
                    self.made[Op.I, stage + 1, m] = (torch.ones_like(share),)
            else:
                check_shapes(stage, output, self.shapes[m][stage + 1])
                pairs = zip(output, self.shapes[m][stage + 1], strict=True)
                results = tuple(x for x, s in pairs if s.has_grad)
                self.made[Op.F, stage, m] = tuple(x.detach() for x in output)
        if self.training:
            roots = [get_gradient_edge(x) if x.requires_grad else None for x in results]
            self.held[stage, m] = SavedForward(given if stage else (), roots, weight_work)
            self.peak = max(self.peak, len(self.held))

    def backward(self, action: Action, gradients: Values) -> None:
        stage, m = action.stage, action.microbatch
        held = self.held[stage, m]
        with self.timed(action):
            roots = [root for root in held.roots if root is not None]
            given = [dy for root, dy in zip(held.roots, gradients, strict=True) if root]
            if roots:
                torch.autograd.backward(roots, given)
            if stage:
                self.made[Op.I, stage, m] = tuple(
                    torch.zeros_like(x) if x.grad is None else x.grad
                    for x in held.inputs
                    if x.requires_grad
                )
            held.inputs, held.roots = (), []
            if action.op is Op.B:
                self.run_deferred(self.held.pop((stage, m)).weight_work)

    def run_deferred(self, weight_work: WeightWork) -> None:
        while weight_work:
            weight_work.pop()()  # the last layer first, as in backward; and each frees what it kept

    @contextmanager
    def timed(self, action: Action) -> Iterator[None]:
        """Note when it began and ended; and have it take as long as is emulated.

        [Note: an emulated device] It is like a real one that has its work queued, and a network
        that is fast: an action begins when the one before it has ended and what it is given has
        been made, by the clock, and ends so much later. That a process woke up late, or a message
        took its time, does not count, unless it takes longer than the action. For that a message
        carries when it was made; the ranks are taken to be on one machine, and to have one clock.
        """
        least = COSTS[action.op] * self.executor.seconds_per_unit
        began = time.perf_counter()
        if least and (self.slots or self.made_at):
            began = max(self.slots[-1].end if self.slots else 0.0, self.made_at)
        yield
        ended = max(began + least, time.perf_counter())
        time.sleep(max(0.0, ended - time.perf_counter()))
        self.slots.append(TimedAction(action, began, ended))
        self.made_at = 0.0

    # --- messages ---------------------------------------------------------------------------------

    def given(self, made: Op, by: int, m: int) -> Values:
        """What a neighboring stage has made: here, or on another rank."""
        if (made, by, m) in self.made:
            return self.made.pop((made, by, m))
        values = [pending.wait() for pending in self.coming.pop((made, by, m))]
        if self.executor.seconds_per_unit:
            self.made_at = float(values.pop())
        return tuple(values)

    def receive(self, made: Op, by: int, m: int, shapes: Sequence[StageInput]) -> None:
        """Post the receives of what a stage on another rank is making, or about to make."""
        # On a pretended mesh nothing comes, and what is there must at least be numbers.
        new = torch.zeros if self.axis.comm.dry_run else torch.empty
        device, peer = self.axis.device, self.schedule.rank_of[by]
        buffers = [new(s.shape, dtype=s.dtype, device=device) for s in shapes]
        if self.executor.seconds_per_unit:
            buffers.append(torch.zeros(1, dtype=torch.float64, device=device))
        self.coming[made, by, m] = ops.exchange([], [(b, peer) for b in buffers], self.axis)

    def send(self, values: Values, to: int) -> None:
        peer = self.schedule.rank_of[to]
        if self.executor.seconds_per_unit:
            values = (*values, torch.tensor([self.slots[-1].end], dtype=torch.float64))
        self.leaving.append(ops.exchange([(x, peer) for x in values], [], self.axis))
        while len(self.leaving) > IN_FLIGHT:
            self.until_left()

    def until_left(self) -> None:
        for pending in self.leaving.popleft():
            pending.wait()
