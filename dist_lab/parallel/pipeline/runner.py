"""The pipeline's runner: micro-batches through stages, and telling the strategy what has happened.

Where the plain runner hears of events from hooks, this one hears of actions: a stage's parameters
are unsharded by UNSHARD and resharded by RESHARD, and a gradient is complete when the last B of its
stage is done, or the last W of a schedule that does backward in two halves. Strategies that waited
for hooks would wait in vain there: nothing fires when a weight's turn comes outside of backward.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.schedules.actions import Action, Op, Schedule
from dist_lab.parallel.schedules.simulate import TimedAction
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.order import Step
from dist_lab.step.protocol import ROOT, Applied, Chain, Phase

FORWARD = (Op.F, Op.SEND_F, Op.RECV_F, Op.UNSHARD)


class RunnerEvents(Protocol):
    """What a pipeline tells the runner while it runs."""

    def on_action(self, action: Action) -> None:
        """It is about to do this action."""

    def on_phase(self, phase: Phase, what: str) -> None:
        """It is about to do all of this phase: a library does not tell its actions one by one."""

    def on_gradients(self, stage: int, *, last: bool) -> None:
        """A stage's gradients hold one more micro-batch. `last`: nothing will be added to them."""


class Pipeline(Protocol):
    """Runs micro-batches through the stages of all ranks.

    Attributes:
        axis: along which the stages lie.
        parts: this rank's stages, by number.
        slots: when each action of the last run began and ended, by this rank's clock, in seconds;
            none of a library's.
        schedule_for: number of micro-batches -> the schedule.
    """

    axis: Axis
    parts: Mapping[int, nn.Module]
    slots: list[TimedAction]
    schedule_for: Callable[[int], Schedule]

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents) -> Tensor:
        """Forward and backward; the sum of the shares of the loss, 0 where that is not computed."""

    def evaluate(
        self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents
    ) -> Tensor:
        """The same by forward alone."""


class PipelineRunner(Step):
    """Drives this rank's stages under one Sync. The verbs are those of the plain runner.

    Args:
        units: name -> module: what strategies unshard as one; an outer one before those within it.
        applied: what the strategies did to the model.
    """

    def __init__(
        self, model: nn.Module, sync: Chain, comm: CommContext, units: Mapping[str, nn.Module],
        applied: Applied, *, pipeline: Pipeline,
    ) -> None:  # fmt: skip
        super().__init__(model, sync, comm, applied.stepped)
        self.pipeline = pipeline
        self._leaves = dict(model.named_parameters()) | dict(applied.leaves)
        self._last = True  # outside microbatch(), every run is the last one
        self._phase = Phase.FORWARD  # that a RESHARD ends: forward where there is no backward
        name_of = {p: name for name, p in model.named_parameters()}
        self._names = {
            stage: [name_of[p] for p in part.parameters() if p.requires_grad]
            for stage, part in pipeline.parts.items()
        }
        within = {stage: set(part.modules()) for stage, part in pipeline.parts.items()}
        self._units = {
            stage: [name for name, unit in units.items() if name and unit in modules]
            for stage, modules in within.items()
        }
        self._unsharded: list[int] = []  # stages
        self._open: set[int] = set()  # stages whose gradients are not complete
        model.register_forward_pre_hook(ModuleHook(_refuse_forward))

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Around a `run`: whether more of them follow before `finish`."""
        before, self._last = self._last, last
        self.sync.microbatch(last=last)
        try:
            yield
        finally:
            self._last = before
            self.sync.microbatch(last=before)

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        for name in self._parameters:
            self._refuse_closed(name)
        self._open = set(self._names)
        self.sync.microbatch(last=self._last)
        self._phase = Phase.BACKWARD
        with self._inside_model():
            return self.pipeline.run(microbatches, loss_fn, self)

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        self._phase = Phase.FORWARD
        with self._inside_model():
            return self.pipeline.evaluate(microbatches, loss_fn, self)

    @contextmanager
    def _inside_model(self) -> Iterator[None]:
        """The model itself is a unit, too, around all actions; an exception breaks the step off."""
        with self.comm.label():  # what follows is of no action
            self.sync.unshard(ROOT, Phase.FORWARD)
            try:
                yield
                self.sync.reshard(ROOT, self._phase)
            except BaseException:
                with self.comm.label("forget", unit=""):
                    self._phase = Phase.ABORT
                    for stage in list(self._unsharded):
                        self._reshard(stage)
                    self.sync.reshard(ROOT, self._phase)
                    self.sync.forget()
                raise

    # --- what the pipeline tells ------------------------------------------------------------------

    def on_action(self, action: Action) -> None:
        self.on_phase(Phase.FORWARD if action.op in FORWARD else Phase.BACKWARD, str(action))
        if action.op is Op.UNSHARD:
            self._unshard(action.stage)
        elif action.op is Op.RESHARD:
            self._reshard(action.stage)

    def on_phase(self, phase: Phase, what: str) -> None:
        self.comm.phase, self.comm.unit = phase.value, what

    def _unshard(self, stage: int) -> None:
        self._unsharded.append(stage)
        for unit in self._units[stage]:
            self.sync.unshard(unit, Phase.FORWARD)

    def _reshard(self, stage: int) -> None:
        self._unsharded.remove(stage)
        for unit in reversed(self._units[stage]):
            self.sync.reshard(unit, self._phase)

    def on_gradients(self, stage: int, *, last: bool) -> None:
        self.has_gradients = True
        if last:
            self._open.discard(stage)
        elsewhere = {name for other in self._open if other != stage for name in self._names[other]}
        there = [n for n in self._names[stage] if self._leaves[n].grad is not None]
        done = [name for name in there if last and self._last and name not in elsewhere]
        if last and self._last:
            self._closed |= set(done)
        if done:
            self.sync.grads_ready(done, last=True)
        rest = [name for name in there if name not in done]
        if rest:
            self.sync.grads_ready(rest, last=False)

    def timeline(self) -> list[list[TimedAction]]:
        slots = self.pipeline.slots
        return on_one_clock(slots, self.pipeline.axis) if slots else []

    def _before_finish(self) -> None:
        """Nothing is open: a run ends with all its actions."""


def _refuse_forward(module: nn.Module, args: Any) -> None:
    raise UserError(
        "under pp this rank has only some of the layers, and a forward passes through all ranks: "
        "call job.run(microbatches, loss_fn), or job.evaluate"
    )


def on_one_clock(slots: Sequence[TimedAction], axis: Axis) -> list[list[TimedAction]]:
    """The slots of all ranks, in milliseconds from the first of all. Collective.

    Args:
        slots: this rank's, in seconds by time.perf_counter, which is one clock to the processes of
            a machine; several machines are put together by their wall clocks.
    """
    mine = [(s.action.stage, s.action.op.value, s.action.microbatch, s.start, s.end) for s in slots]
    to_wall = time.time() - time.perf_counter()
    told = json.dumps([platform.node(), to_wall, mine]).encode()
    said = [json.loads(row) for row in ops.all_gather_bytes(told, axis)]
    # One `to_wall` for a machine: two readings of it differ a little, and effects that follow at
    # once on their causes would come before them.
    offsets = {machine: to_wall for machine, to_wall, _ in said}
    first = min((row[0][3] + offsets[machine] for machine, _, row in said if row), default=0.0)

    def since(machine: str, moment: float) -> float:
        return (moment + offsets[machine] - first) * 1e3

    return [
        [
            TimedAction(Action(stage, Op(op), m), since(machine, start), since(machine, end))
            for stage, op, m, start, end in row
        ]
        for machine, _, row in said
    ]
