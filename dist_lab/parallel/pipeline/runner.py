"""The pipeline's runner: runs micro-batches through the stages, and tells strategies about it.

The plain runner calls strategies from hooks; this one calls them at actions. UNSHARD and RESHARD
unshard and reshard a stage's parameters. A gradient is complete after the last B of its stage, or
after the last W if the schedule splits backward. Hooks are not enough: none runs for a weight
gradient that is computed outside of backward.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from dist_lab.step.saved import SavedByName, Visit
from dist_lab.step.setup import unit_of_stage


class RunnerEvents(Protocol):
    """What a pipeline reports to the runner during a run."""

    def action(self, action: Action, phase: Phase) -> AbstractContextManager[None]:
        """The pipeline does this action inside the block."""

    def on_phase(self, phase: Phase, label: str) -> None:
        """The pipeline is about to begin a phase. A library reports phases, not actions."""

    def forward(self, microbatch: int) -> AbstractContextManager[None]:
        """The library computes the forward of this micro-batch inside the block."""

    def on_gradients(self, stage: int, *, last: bool) -> None:
        """A micro-batch has been added to a stage's gradients. `last`: they are complete."""


class Pipeline(Protocol):
    """Runs micro-batches through the stages of all ranks.

    Attributes:
        axis: the mesh axis over which the stages are spread.
        modules: stage -> its module, for this rank's stages.
        timings: the last run's actions with start and end, in seconds of this rank's clock; empty
            for a library's pipeline.
        schedule_for: number of micro-batches -> the schedule.
    """

    axis: Axis
    modules: Mapping[int, nn.Module]
    timings: list[TimedAction]
    schedule_for: Callable[[int], Schedule]

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents) -> Tensor:
        """Forward and backward. Returns this rank's part of the loss: a sum of shares, or 0."""

    def evaluate(
        self, microbatches: Sequence[Pair], loss_fn: LossFn, events: RunnerEvents
    ) -> Tensor:
        """Forward only. Returns this rank's part of the loss, as `run` does."""


class PipelineRunner(Step):
    """Runs this rank's stages, with the interface of the plain runner.

    Args:
        units: name -> module that strategies unshard as one: the stages, and the model.
        applied: what the strategies did to the model.

    Attributes:
        after_backward: called with (unit, action) after each action that computes gradients, before
            the strategies hear of them.
    """

    def __init__(
        self, model: nn.Module, sync: Chain, comm: CommContext, units: Mapping[str, nn.Module],
        applied: Applied, *, pipeline: Pipeline,
    ) -> None:  # fmt: skip
        super().__init__(model, sync, comm, applied.stepped)
        self.pipeline = pipeline
        self._last = True  # outside microbatch(), every run is the last one
        self._leaves = dict(model.named_parameters()) | dict(applied.leaves)
        name_of = {p: name for name, p in model.named_parameters()}
        self._names = {
            stage: [name_of[p] for p in module.parameters() if p.requires_grad]
            for stage, module in pipeline.modules.items()
        }
        self._saver = SavedByName(has_shards=bool(applied.unit_of))
        self._stages = {
            stage: StageUnit([self._leaves[name_of[p]] for p in module.parameters()])
            for stage, module in pipeline.modules.items()
        }
        self._unsharded: list[int] = []  # stages
        self._incomplete: set[int] = set()  # stages whose gradients are not complete
        self.after_backward: Callable[[str, Action], None] | None = None
        model.register_forward_pre_hook(ModuleHook(_refuse_forward))

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """`last`: the runs inside the block are the last before `finish`."""
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
        self._incomplete = set(self._names)
        self.sync.microbatch(last=self._last)
        with self._inside_model(Phase.BACKWARD):
            total = self.pipeline.run(microbatches, loss_fn, self)
            self.sync.backward_done(ROOT, last=self._last)
        return total

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        with self._inside_model(Phase.FORWARD):
            return self.pipeline.evaluate(microbatches, loss_fn, self)

    @contextmanager
    def _inside_model(self, phase: Phase) -> Iterator[None]:
        """Unshard the root unit around all actions, for forward and, unless this is an evaluation,
        for backward too. An exception aborts the step.
        """
        with self.comm.label():  # restores the labels after the run
            self.comm.begin(self.place.step + (phase is Phase.BACKWARD), "forward")
            self.sync.unshard(ROOT, Phase.FORWARD)
            if phase is Phase.BACKWARD:
                self.sync.unshard(ROOT, Phase.BACKWARD)
            try:
                yield
                self.sync.reshard(ROOT, phase)
            except BaseException:
                with self.comm.label("forget", unit=""):
                    for unit in [*map(unit_of_stage, self._unsharded), ROOT]:
                        self.sync.reshard(unit, Phase.ABORT)
                    self._unsharded.clear()
                    self.sync.forget()
                raise

    # --- events of the pipeline -------------------------------------------------------------------

    @contextmanager
    def action(self, action: Action, phase: Phase) -> Iterator[None]:
        self.on_phase(phase, str(action))
        stage, unit = action.stage, unit_of_stage(action.stage)
        if action.op is Op.UNSHARD:
            self._unsharded.append(stage)
            self.sync.unshard(unit, phase)
        elif action.op is Op.RESHARD:
            self._unsharded.remove(stage)
            self.sync.reshard(unit, phase)
        if action.op is not Op.F:
            with self.place.at(action.microbatch):
                yield
            if self.after_backward is not None and action.op in (Op.B, Op.I, Op.W):
                self.after_backward(unit, action)
            return
        stage_unit = self._stages[stage]
        self._saver.enter(stage_unit)  # saves the stage's parameters by name: see step/saved.py
        self._saver.watch_storages(stage_unit.leaves, stage_unit, stage_unit.visit)
        try:
            with self.place.at(action.microbatch):
                yield
        finally:
            self._saver.leave(stage_unit)

    def on_phase(self, phase: Phase, label: str) -> None:
        self.comm.begin(self.comm.step, phase.value, label)

    def forward(self, microbatch: int) -> AbstractContextManager[None]:
        return self.place.at(microbatch)

    def on_gradients(self, stage: int, *, last: bool) -> None:
        self.has_gradients = True
        if last:
            self._incomplete.discard(stage)
        # A parameter of two stages of this rank is complete after the later one.
        shared = {n for other in self._incomplete if other != stage for n in self._names[other]}
        names = [n for n in self._names[stage] if self._leaves[n].grad is not None]
        complete = [n for n in names if last and self._last and n not in shared]
        if last and self._last:
            self._closed |= set(complete)
        if complete:
            self.sync.grads_ready(complete, last=True)
        rest = [n for n in names if n not in complete]
        if rest:
            self.sync.grads_ready(rest, last=False)
        self.sync.backward_done(unit_of_stage(stage), last=last and self._last)

    def timeline(self) -> list[list[TimedAction]]:
        timings = self.pipeline.timings
        return on_one_clock(timings, self.pipeline.axis) if timings else []

    def _before_finish(self) -> None:
        """Nothing to do: a run ends with all its actions."""


class StageUnit:
    """A stage whose parameters a forward saves by name. In backward the schedule unshards it."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.leaves, self.visit = leaves, Visit()

    def enter_backward(self, visit: Visit) -> None:
        """Nothing to do: UNSHARD came before."""


def _refuse_forward(module: nn.Module, args: Any) -> None:
    raise UserError(
        "under pp this rank has only some of the layers, and a forward passes through all ranks: "
        "call job.run(microbatches, loss_fn), or job.evaluate"
    )


def on_one_clock(timings: Sequence[TimedAction], axis: Axis) -> list[list[TimedAction]]:
    """The timings of all ranks, in milliseconds since the first action began. Collective.

    Args:
        timings: this rank's, in seconds of time.perf_counter, a clock that all processes of a
            machine share; the clocks of several machines are aligned by their wall clocks.
    """
    local = [(t.action, t.start, t.end) for t in timings]
    row = [(a.stage, a.op.value, a.microbatch, start, end) for a, start, end in local]
    to_wall = time.time() - time.perf_counter()
    message = json.dumps([platform.node(), to_wall, row]).encode()
    messages = [json.loads(text) for text in ops.all_gather_bytes(message, axis)]
    # One `to_wall` per machine: two readings differ a little, and a receive could seem to come
    # before its send.
    offsets = {machine: to_wall for machine, to_wall, _ in messages}
    first = min((row[0][3] + offsets[machine] for machine, _, row in messages if row), default=0.0)

    def since(machine: str, moment: float) -> float:
        return (moment + offsets[machine] - first) * 1e3

    return [
        [
            TimedAction(Action(stage, Op(op), m), since(machine, start), since(machine, end))
            for stage, op, m, start, end in row
        ]
        for machine, _, row in messages
    ]
