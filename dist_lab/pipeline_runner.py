"""The pipeline's runner: micro-batches through stages, and telling the strategy what has happened.

Where the plain runner hears of events from hooks, this one hears of actions: a gradient is complete
when the last B of its stage is done, or the last W of a schedule that does backward in two halves.
Strategies that waited for hooks would wait in vain there: nothing fires when a weight's turn comes
outside of backward.
"""

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.wire import Wire
from dist_lab.errors import UserError
from dist_lab.hooks import ModuleHook
from dist_lab.loss import LossFn, Pair
from dist_lab.mesh import Axis
from dist_lab.parallel.pp_schedules import Action, Op, Slot
from dist_lab.parallel.sync import Chain, Pipeline
from dist_lab.step import Step


class PipelineRunner(Step):
    """Drives this rank's stages under one Sync. The verbs are those of the plain runner."""

    def __init__(self, model: nn.Module, sync: Chain, wire: Wire, pipeline: Pipeline) -> None:
        super().__init__(model, sync, wire)
        self.pipeline = pipeline
        self._last = True  # outside microbatch(), every run is the last one
        name_of = {p: name for name, p in model.named_parameters()}
        self._names = {
            stage: [name_of[p] for p in part.parameters() if p.requires_grad]
            for stage, part in pipeline.parts.items()
        }
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
        if not torch.is_grad_enabled():
            raise UserError("job.run computes gradients, which are off here; call job.evaluate")
        for name in self._parameters:
            self._refuse_closed(name)
        self._open = set(self._names)
        self.sync.microbatch(last=self._last)
        with self.wire.during():  # what follows is of no action
            try:
                return self.pipeline.run(microbatches, loss_fn, self)
            except BaseException:
                with self.wire.during("forget", unit=""):
                    self.sync.forget()
                raise

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        with self.wire.during():
            return self.pipeline.evaluate(microbatches, loss_fn, self)

    def begins(self, phase: str, what: str) -> None:
        self.wire.phase, self.wire.unit = phase, what

    def gradients(self, stage: int, *, last: bool) -> None:
        self.has_gradients = True
        if last:
            self._open.discard(stage)
        elsewhere = {name for other in self._open if other != stage for name in self._names[other]}
        there = [n for n in self._names[stage] if self._parameters[n].grad is not None]
        done = [name for name in there if last and self._last and name not in elsewhere]
        if last and self._last:
            self._closed |= set(done)
        if done:
            self.sync.grads_ready(done, last=True)
        rest = [name for name in there if name not in done]
        if rest:
            self.sync.grads_ready(rest, last=False)

    def _before_finish(self) -> None:
        """Nothing is open: a run ends with all its actions."""


def _refuse_forward(module: nn.Module, args: Any) -> None:
    raise UserError(
        "under pp this rank has only some of the layers, and a forward passes through all ranks: "
        "call job.run(microbatches, loss_fn), or job.evaluate"
    )


def on_one_clock(slots: Sequence[Slot], axis: Axis) -> list[list[Slot]]:
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
            Slot(Action(stage, Op(op), m), since(machine, start), since(machine, end))
            for stage, op, m, start, end in row
        ]
        for machine, _, row in said
    ]
