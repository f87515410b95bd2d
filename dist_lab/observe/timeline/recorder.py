"""The recorder of one rank: when labels change, collectives start, and waits begin and end.

    with recorded(job) as recorder:
        take some steps
    timeline = recorder.gather()        on rank 0; see timeline.py

It only appends to lists, so that recording takes little time; spans.py makes segments of them. All
its seams exist anyway: the labels that the runners set (comm/context.py), the ledger's listeners,
torch's hooks on the step of every optimizer, and the contexts in which forwards are recomputed. So
no strategy or collective has a line for it, and while it is off nothing is recorded.

[Note: libraries] A library runs its collectives itself, where neither the ledger nor we see them.
Their time counts as forward, backward or optimizer.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dist_lab.comm import ops
from dist_lab.comm.ledger import Call
from dist_lab.job import Job
from dist_lab.mesh.topology import ORDER
from dist_lab.observe.timeline import clocks
from dist_lab.observe.timeline.spans import Record, timeline_of
from dist_lab.observe.timeline.timeline import FORMAT, Timeline
from dist_lab.transforms.recompute import CheckpointedForward

H = TypeVar("H")


@contextmanager
def recorded(job: Job) -> Iterator["Recorder"]:
    """Records the events of this rank inside the block. Every rank must record the same steps."""
    recorder = Recorder(job)
    ledger, labels = job.mesh.comm.ledger, job.mesh.comm.on_label
    with ExitStack() as stack:
        _add(recorder.on_label, labels, stack)
        _add(recorder.on_call, ledger.listeners, stack)
        _add(recorder.on_wait, ledger.on_wait, stack)
        for unit in job.model.modules():
            if isinstance(unit.forward, CheckpointedForward):
                _add(recorder.around_recompute, unit.forward.around, stack)
        for register, begins in (
            (register_optimizer_step_pre_hook, True),
            (register_optimizer_step_post_hook, False),
        ):
            handle = register(recorder.at_optimizer(begins=begins))
            stack.callback(handle.remove)
        yield recorder
        recorder.ended = time.perf_counter()


def _add(hook: H, hooks: list[H], stack: ExitStack) -> None:
    """Add a hook, and remove it when `stack` exits."""
    hooks.append(hook)
    stack.callback(hooks.remove, hook)


class Recorder:
    """The events of one rank.

    Attributes:
        labels: (time, step, phase, unit), when a label changes. Times are seconds of
            time.perf_counter.
        launches: (time, step, call)
        waits: (call, begin, end)
        ended: when the recording ended.
        offset: what to add to get times of rank 0's clock; known after `gather`.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.comm, self.ended, self.offset = job, job.mesh.comm, 0.0, 0.0
        self.step = job.place.step + 1  # the next one
        self._inside = ""  # "optimizer" or "recompute": the phase, whatever the label says
        self._optimizers = 0  # that are stepping: some step another one
        self._last = 0, "", ""
        self.labels: list[tuple[float, int, str, str]] = []
        self.launches: list[tuple[float, int, Call]] = []
        self.waits: list[tuple[Call, float, float]] = []
        self.on_label(self.step, self.comm.phase, self.comm.unit)

    def on_label(self, step: int, phase: str, unit: str) -> None:
        self.step = max(self.step, step)  # the label is that of the last step until a forward
        label = self.step, self._inside or phase, unit
        if label != self._last:
            self._last = label
            self.labels.append((time.perf_counter(), *label))

    def on_call(self, call: Call) -> None:
        self.launches.append((time.perf_counter(), self.step, call))

    def on_wait(self, call: Call, began: float, ended: float) -> None:
        self.waits.append((call, began, ended))

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        before, self._inside = self._inside, phase
        self.on_label(self.comm.step, self.comm.phase, self.comm.unit)
        try:
            yield
        finally:
            self._inside = before
            self.on_label(self.comm.step, self.comm.phase, self.comm.unit)

    def around_recompute(self, unit: nn.Module) -> Callable[[], Any]:
        """Surrounds each second forward of a unit: see transforms/recompute.py."""
        return lambda: self.inside("recompute")

    def at_optimizer(self, *, begins: bool) -> Callable[..., None]:
        """Returns torch's hook for the begin or the end of an optimizer's step."""

        def hook(*_: Any) -> None:
            self._optimizers += 1 if begins else -1
            self._inside = "optimizer" if self._optimizers else ""
            self.on_label(self.comm.step, self.comm.phase, self.comm.unit)

        return hook

    def record(self) -> Record:
        """Returns the events as JSON values."""
        offset = self.offset
        number = {id(call): i for i, (_, _, call) in enumerate(self.launches)}
        calls = [*self.launches]
        for call, _, _ in self.waits:
            if id(call) not in number:  # it was launched before the recording
                number[id(call)] = len(calls)
                calls.append((self.labels[0][0], self.labels[0][1] - 1, call))
        return {
            "rank": self.comm.rank, "place": self.comm.place, "host": clocks.machine(),
            "labels": [(when + offset, *label) for when, *label in self.labels],
            "calls": [
                (
                    when + offset, step, call.number, call.op, call.axis, call.size, call.about,
                    call.payload, call.sent, call.phase, call.unit, call.algorithm, call.where,
                    call.group,
                )
                for when, step, call in calls
            ],
            "waits": [(number[id(x)], a + offset, b + offset) for x, a, b in self.waits],
            "ended": self.ended + offset,
        }  # fmt: skip

    def gather(self) -> Timeline | None:
        """Returns the timeline of all ranks on rank 0, None on the others. Collective."""
        job, mesh = self.job, self.job.mesh
        with mesh.comm.label("timeline", unit=""):
            self.offset = clocks.offset(mesh)
            own = zlib.compress(json.dumps(self.record()).encode(), 1)
            rows = ops.all_gather_bytes(own, mesh.world)
        if mesh.rank:
            return None
        about = {
            "tool": "dist_lab", "format": FORMAT, "strategies": job.strategies,
            "mesh": {name: mesh.axes[name] for name in ORDER if name in mesh.axes},
            "world_size": mesh.size, "library": unseen(job),
        }  # fmt: skip
        return timeline_of([json.loads(zlib.decompress(row)) for row in rows], about)


def unseen(job: Job) -> str:
    """The sentence to print beside a library's timeline, "" for ours: see [Note: libraries]."""
    if not job.about:
        return ""
    return (
        f"the collectives of {job.strategies} run inside the library and are not seen here; their "
        "time counts as forward, backward or optimizer"
    )
