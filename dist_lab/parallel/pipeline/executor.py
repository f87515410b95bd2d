"""Executes this rank's actions of a schedule: computes a stage, or sends and receives its tensors.

An `Executor` lives as long as the job. The results, messages and saved forwards of one run are in a
`PipelineRun`. pp.py explains which tensors are sent and how the loss is summed.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dist_lab.comm import ops
from dist_lab.loss import LossFn, Pair, one_number, share_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.pipeline.runner import RunnerEvents
from dist_lab.parallel.pipeline.split_backward import SplitBackward, as_non_leaf
from dist_lab.parallel.pipeline.stages import Shapes, StageInput, check_shapes
from dist_lab.parallel.schedules.actions import (
    BACKWARD,
    COSTS,
    Action,
    Op,
    Result,
    Schedule,
    compute_action,
)
from dist_lab.parallel.schedules.simulate import IN_FLIGHT, TimedAction
from dist_lab.parallel.split_linear import Queue
from dist_lab.step.hooks import map_tensors
from dist_lab.step.protocol import Phase


class Executor:
    """Executes this rank's actions of a schedule, one after another.

    Attributes:
        schedule_for, forwards_for: number of micro-batches -> the schedule of training, and that of
            evaluation.
        modules: stage -> its module, for this rank's stages.
        timings: the last run's actions with start and end, in seconds of this rank's clock.
        peak: the maximum number of micro-batches in flight on this rank in the last run.
    """

    def __init__(
        self,
        axis: Axis,
        modules: Mapping[int, nn.Module],
        shapes: Shapes,
        schedule_for: Callable[[int], Schedule],
        forwards_for: Callable[[int], Schedule],
        splitter: SplitBackward,
        seconds_per_unit: float = 0.0,
    ) -> None:
        self.axis, self.modules, self.shapes = axis, modules, shapes
        self.schedule_for, self.forwards_for = schedule_for, forwards_for
        self.splitter, self.seconds_per_unit = splitter, seconds_per_unit
        self.timings: list[TimedAction] = []
        self.peak = 0

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents) -> Tensor:
        schedule = self.schedule_for(len(microbatches))
        if schedule.splits_backward:
            for module in self.modules.values():
                self.splitter.split(module)
        return self._execute(schedule, microbatches, loss_fn, events)

    def evaluate(
        self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents
    ) -> Tensor:
        return self._execute(self.forwards_for(len(microbatches)), microbatches, loss_fn, events)

    def _execute(
        self, schedule: Schedule, microbatches: Sequence[Pair], loss_fn: LossFn,
        events: RunnerEvents,
    ) -> Tensor:  # fmt: skip
        run = PipelineRun(self, schedule, microbatches, loss_fn)
        row = schedule.ranks[self.axis.index]
        for i, action in enumerate(row):
            in_backward = compute_action(row, i).op in BACKWARD
            with events.action(action, Phase.BACKWARD if in_backward else Phase.FORWARD):
                run.execute(action)
            if action.op in (Op.B, Op.W):
                events.on_gradients(action.stage, last=action.last)
        run.finish()
        if run.training:
            self.timings, self.peak = run.timings, run.peak
        return run.total


Values = tuple[Tensor, ...]


@dataclass
class SavedForward:
    """What a forward saves for its backward.

    inputs: the stage's inputs, as leaves
    roots: where backward begins: a gradient edge for each output that needs a gradient. An edge
        does not keep the output's memory alive.
    weight_work: the weight gradients that W will compute
    """

    inputs: Values
    roots: list[GradientEdge | None]
    weight_work: Queue


class PipelineRun:
    """One run: its results, its pending messages, and the forwards saved for backward."""

    def __init__(
        self, executor: Executor, schedule: Schedule, microbatches: Sequence[Pair], loss_fn: LossFn
    ) -> None:
        self.executor, self.schedule, self.axis = executor, schedule, executor.axis
        self.microbatches, self.loss_fn = microbatches, loss_fn
        self.results: dict[Result, Values] = {}  # F: outputs of a stage, I: gradients of its inputs
        self.pending_receives: dict[Result, list[ops.Pending]] = {}
        self.pending_sends: deque[list[ops.Pending]] = deque()
        self.saved: dict[tuple[int, int], SavedForward] = {}  # by stage and micro-batch
        self.timings: list[TimedAction] = []
        self.inputs_ready_at = 0.0  # of the next action, see [Note: an emulated device]
        self.peak = 0
        self.training = torch.is_grad_enabled()
        self.shapes = [executor.shapes.of(x, training=self.training) for x, _ in microbatches]
        self.total = torch.zeros((), dtype=torch.float64, device=self.axis.device)

    def execute(self, action: Action) -> None:
        stage, m = action.stage, action.microbatch
        match action.op:
            case Op.F:
                self.forward(action, self.take((Op.F, stage - 1, m)) if stage else ())
            case Op.B | Op.I:
                self.backward(action, self.take((Op.I, stage + 1, m)))
            case Op.W:
                with self.timed(action):
                    self.run_deferred(self.saved.pop((stage, m)).weight_work)
            case Op.RECV_F:
                self.receive((Op.F, stage - 1, m), self.shapes[m][stage])
            case Op.RECV_B:
                shapes = self.shapes[m][stage + 1]
                self.receive((Op.I, stage + 1, m), [s for s in shapes if s.has_grad])
            case Op.SEND_F:
                self.send(self.results.pop((Op.F, stage, m)), stage + 1)
            case Op.SEND_B:
                self.send(self.results.pop((Op.I, stage, m)), stage - 1)

    def finish(self) -> None:
        self.wait_for_sends(at_most=0)
        assert not {*self.results, *self.pending_receives, *self.saved}, "unused results are left"

    # --- compute ----------------------------------------------------------------------------------

    def forward(self, action: Action, inputs: Values) -> None:
        stage, m = action.stage, action.microbatch
        x, targets = self.microbatches[m]
        weight_work: Queue = []
        with self.timed(action), self.executor.splitter.deferring(weight_work):
            if stage == 0:
                inputs = (x,)
            elif self.training:
                pairs = zip(inputs, self.shapes[m][stage], strict=True)
                inputs = tuple(x.detach().requires_grad_(s.has_grad) for x, s in pairs)
            output = self.executor.modules[stage](*map_tensors(as_non_leaf, inputs))
            if stage == self.schedule.stages - 1:
                loss = self.loss_fn(output, targets)
                share = share_of(output, loss) if self.training else one_number(loss)
                self.total += share.detach()
                outputs: Values = (share,)
                if self.training:  # d loss / d loss, as if a next stage had sent it
                    self.results[Op.I, stage + 1, m] = (torch.ones_like(share),)
            else:
                check_shapes(stage, output, self.shapes[m][stage + 1])
                pairs = zip(output, self.shapes[m][stage + 1], strict=True)
                outputs = tuple(y for y, s in pairs if s.has_grad)
                self.results[Op.F, stage, m] = tuple(y.detach() for y in output)
        if self.training:
            roots = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
            self.saved[stage, m] = SavedForward(inputs if stage else (), roots, weight_work)
            self.peak = max(self.peak, len(self.saved))

    def backward(self, action: Action, gradients: Values) -> None:
        stage, m = action.stage, action.microbatch
        saved = self.saved[stage, m]
        with self.timed(action):
            roots = [root for root in saved.roots if root is not None]
            dys = [dy for root, dy in zip(saved.roots, gradients, strict=True) if root]
            if roots:
                torch.autograd.backward(roots, dys)
            if stage:
                self.results[Op.I, stage, m] = tuple(
                    torch.zeros_like(x) if x.grad is None else x.grad
                    for x in saved.inputs
                    if x.requires_grad
                )
            saved.inputs, saved.roots = (), []
            if action.op is Op.B:
                self.run_deferred(self.saved.pop((stage, m)).weight_work)

    def run_deferred(self, weight_work: Queue) -> None:
        while weight_work:  # the last layer first, as in backward; each call frees its tensors
            weight_work.pop()()

    @contextmanager
    def timed(self, action: Action) -> Iterator[None]:
        """Record when the action begins and ends, and sleep for the rest of its emulated time.

        [Note: an emulated device] On a real device, work is queued ahead and the network is
        fast. So the recorded start of an action is the time at which the previous one had ended
        and its inputs were computed, and its end is at least its emulated duration later. A process
        that wakes up late, or a slow message, adds no time unless it takes longer than the action.
        Each message carries the time its tensors were computed; all ranks must be on one machine.
        """
        least = COSTS[action.op] * self.executor.seconds_per_unit
        start = time.perf_counter()
        if least and (self.timings or self.inputs_ready_at):
            start = max(self.timings[-1].end if self.timings else 0.0, self.inputs_ready_at)
        yield
        end = max(start + least, time.perf_counter())
        time.sleep(max(0.0, end - time.perf_counter()))
        self.timings.append(TimedAction(action, start, end))
        self.inputs_ready_at = 0.0

    # --- messages ---------------------------------------------------------------------------------

    def take(self, result: Result) -> Values:
        """A neighboring stage's result: computed on this rank, or received."""
        if result in self.results:
            return self.results.pop(result)
        values = [pending.wait() for pending in self.pending_receives.pop(result)]
        if self.executor.seconds_per_unit:
            self.inputs_ready_at = float(values.pop())
        return tuple(values)

    def receive(self, result: Result, shapes: Sequence[StageInput]) -> None:
        """Post the receives of a result that another rank computes, or will compute."""
        # In a dry run nothing is received, so the buffers must be initialized.
        new = torch.zeros if self.axis.comm.dry_run else torch.empty
        device, peer = self.axis.device, self.schedule.rank_of[result[1]]
        buffers = [new(s.shape, dtype=s.dtype, device=device) for s in shapes]
        if self.executor.seconds_per_unit:
            buffers.append(torch.zeros(1, dtype=torch.float64, device=device))
        self.pending_receives[result] = ops.exchange([], [(b, peer) for b in buffers], self.axis)

    def send(self, values: Values, to: int) -> None:
        peer = self.schedule.rank_of[to]
        if self.executor.seconds_per_unit:
            values = (*values, torch.tensor([self.timings[-1].end], dtype=torch.float64))
        self.pending_sends.append(ops.exchange([(x, peer) for x in values], [], self.axis))
        self.wait_for_sends(at_most=IN_FLIGHT)

    def wait_for_sends(self, *, at_most: int) -> None:
        """Wait, for the oldest first, until at most this many sends are pending."""
        while len(self.pending_sends) > at_most:
            for pending in self.pending_sends.popleft():
                pending.wait()
