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
    """What a pipeline reports to the runner during a run."""

    def on_action(self, action: Action) -> None:
        """The pipeline is about to do this action."""

    def on_phase(self, phase: Phase, label: str) -> None:
        """The pipeline is about to begin a phase. A library reports phases, not actions."""

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
        units: name -> module that strategies unshard as one; an outer unit before inner ones.
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
        self._phase = Phase.FORWARD  # the phase that RESHARD ends: FORWARD in evaluation
        name_of = {p: name for name, p in model.named_parameters()}
        self._names = {
            stage: [name_of[p] for p in module.parameters() if p.requires_grad]
            for stage, module in pipeline.modules.items()
        }
        submodules = {stage: set(module.modules()) for stage, module in pipeline.modules.items()}
        self._units = {
            stage: [name for name, unit in units.items() if name and unit in modules]
            for stage, modules in submodules.items()
        }
        self._unsharded: list[int] = []  # stages
        self._incomplete: set[int] = set()  # stages whose gradients are not complete
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
        self._phase = Phase.BACKWARD
        with self._inside_model():
            return self.pipeline.run(microbatches, loss_fn, self)

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        self._phase = Phase.FORWARD
        with self._inside_model():
            return self.pipeline.evaluate(microbatches, loss_fn, self)

    @contextmanager
    def _inside_model(self) -> Iterator[None]:
        """Unshard the root unit around all actions. An exception aborts the step."""
        with self.comm.label():  # restores the labels after the run
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

    # --- events of the pipeline -------------------------------------------------------------------

    def on_action(self, action: Action) -> None:
        self.on_phase(Phase.FORWARD if action.op in FORWARD else Phase.BACKWARD, str(action))
        if action.op is Op.UNSHARD:
            self._unshard(action.stage)
        elif action.op is Op.RESHARD:
            self._reshard(action.stage)

    def on_phase(self, phase: Phase, label: str) -> None:
        self.comm.phase, self.comm.unit = phase.value, label

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

    def timeline(self) -> list[list[TimedAction]]:
        timings = self.pipeline.timings
        return on_one_clock(timings, self.pipeline.axis) if timings else []

    def _before_finish(self) -> None:
        """Nothing to do: a run ends with all its actions."""


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
