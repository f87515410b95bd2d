"""Makes the faults of `--fault` happen on this rank, from outside the code that they hit.

    with injected(faults, job, folder) as injector:
        injector.begin(0)
        for step in ...:
            train the step
            injector.tick(step)

An event of a step reaches us through one of four seams that exist anyway: the job's chain of Syncs,
in which we are the first and the last link, the listeners of the ledger, torch's hooks on the step
of every optimizer, and the object that carries out the file operations of a checkpoint. So no
strategy, collective or checkpoint contains a line about faults.

[Note: once a run] A fault happens once in a run, also when the run is restarted and takes the step
again: before it happens, its number and text are added to the file faults.jsonl in the output
folder, which all attempts share. A run that resumes may be given other faults. The line also has
the time, from which a test knows how long the recovery took.
"""

import ctypes
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dist_lab.comm import ops
from dist_lab.comm.context import SHARED_MEMORY
from dist_lab.comm.ledger import Call
from dist_lab.errors import UserError
from dist_lab.faults.files import FilesWithFaults
from dist_lab.faults.grammar import FILE, PHASES, Fault
from dist_lab.job import Job
from dist_lab.layout.gather import local_part
from dist_lab.observe.sinks import Sink
from dist_lab.step.protocol import Phase, Sync

OF_CALLS = {"finish": "reduce", "after_step": "optimizer"}  # the ledger's phase -> ours
SLOW_STEPS = 20
FOR_EVER = 7 * 86400.0  # seconds


@contextmanager
def injected(faults: Sequence[Fault], job: Job, folder: Path) -> Iterator["Injector"]:
    """Make those of the faults happen that are of this rank and have not happened yet.

    Args:
        faults: all faults of the run, the same list on every rank.
        folder: the output folder that all attempts of the run share.
    """
    injector = Injector(faults, job, folder / FILE)
    chain, ledger = job.sync, job.mesh.comm.ledger
    links, chain.links = chain.links, (First(injector), *chain.links, Last(injector))
    ledger.listeners.append(injector.on_call)
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: injector.event("optimizer")),
        register_optimizer_step_post_hook(lambda *_: injector.event("optimizer")),
    ]
    try:
        yield injector
    finally:
        chain.links = links
        ledger.listeners.remove(injector.on_call)
        for hook in hooks:
            hook.remove()


class Injector(Sink):
    """Counts the events of each step, and makes a fault happen at its event.

    Attributes:
        files: carries out the file operations of checkpoints, with the faults of the phase save.
    """

    def __init__(self, faults: Sequence[Fault], job: Job, path: Path) -> None:
        self.job, self.path, self.rank = job, path, job.mesh.rank
        past = happened(path)
        self.faults = {
            number: fault
            for number, fault in enumerate(faults)
            if fault.rank == self.rank and (number, str(fault)) not in past
        }
        self.files = FilesWithFaults(self.faults, self.happen)
        self.step, self.counts = 0, Counter[tuple[str, bool]]()
        self.axis = job.mesh.world  # of the last collective
        self.slow_until, self.began, self.blocked = 0, 0.0, 0.0

    def begin(self, step: int) -> None:
        """Faults of the step after this one are due."""
        self.step, self.counts = step + 1, Counter()
        self.began, self.blocked = time.perf_counter(), self.job.mesh.comm.ledger.total.blocked

    def tick(self, step: int) -> None:
        """The step has ended, apart from its checkpoint: all its faults must have happened."""
        for fault in self.faults.values():
            if fault.step == step and fault.phase != "save":
                of_tensors = fault.kind in CHANGES
                events = self.counts[fault.phase, of_tensors]
                what = "tensors to change" if of_tensors else "events"
                raise UserError(
                    f"fault {fault} did not happen: {fault.phase} of step {step} on rank "
                    f"{self.rank} has {events} {what} (--fault); give op={max(1, events)} or less"
                    + ("" if events else ", or another phase")
                )
        self.begin(step)

    def event(self, phase: str, tensor: Tensor | None = None) -> None:
        """An event of a phase. Faults that change a tensor count only events that have one."""
        if phase == "optimizer" and tensor is None:
            self._be_slow()
        kind_of_event = phase, tensor is not None
        self.counts[kind_of_event] += 1
        for number, fault in list(self.faults.items()):
            is_due = (fault.step, fault.phase, fault.op) == (
                self.step, phase, self.counts[kind_of_event],
            )  # fmt: skip
            if is_due and (fault.kind in CHANGES) == (tensor is not None):
                self.happen(number, fault, tensor)

    def happen(self, number: int, fault: Fault, tensor: Tensor | None = None) -> None:
        """Make the fault happen now: see [Note: once a run]."""
        del self.faults[number]
        entry = {"number": number, "fault": str(fault), "time": time.time()}
        is_torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:  # one write, so the lines of several ranks do not mix
            file.write("\n" * is_torn + json.dumps(entry) + "\n")
        if fault.kind in CHANGES:
            assert tensor is not None, fault
            CHANGES[fault.kind](tensor.data)  # unseen by autograd, as a broken memory would do it
        elif fault.kind == "mismatch":
            ops.all_reduce(torch.zeros(3, device=self.job.mesh.device), self.axis)
        elif fault.kind == "slow":
            self.slow_until = self.step + SLOW_STEPS
        elif fault.kind in ENDS:
            ENDS[fault.kind]()

    def on_call(self, call: Call) -> None:
        """A collective is about to be launched."""
        phase = OF_CALLS.get(call.phase, call.phase)
        if phase in PHASES and call.unit != SHARED_MEMORY:
            self.event(phase)

    def _be_slow(self) -> None:
        """Sleep as long as this rank has computed in this step: it then takes twice as long."""
        if self.step < self.slow_until and self.counts["optimizer", False] == 0:
            waited = self.job.mesh.comm.ledger.total.blocked - self.blocked
            time.sleep(max(0.0, time.perf_counter() - self.began - waited))


class First(Sync):
    """The link before the strategy's: events begin, and gradients are this rank's own."""

    def __init__(self, injector: Injector) -> None:
        self.injector, job = injector, injector.job
        self.leaves = dict(job.model.named_parameters()) | dict(job.leaves)

    def unshard(self, unit: str, phase: Phase) -> None:
        if torch.is_grad_enabled() or phase is Phase.BACKWARD:  # not in a validation
            self.injector.event(phase.value)

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.injector.event("backward")
        for name in names:
            gradient = self.leaves[name].grad
            if gradient is not None and gradient.numel():
                self.injector.event("backward", gradient)

    def finish(self) -> None:
        self.injector.event("reduce")

    def after_step(self) -> None:
        self.injector.event("optimizer")


class Last(Sync):
    """The link after the strategy's: gradients are summed, new weights have been sent."""

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    def finish(self) -> None:
        self.injector.event("reduce")
        for _, parameter in self.injector.job.named_parameters():
            if parameter.grad is not None and local_part(parameter.grad).numel():
                gradient = local_part(parameter.grad)
                self.injector.event("reduce", gradient)

    def after_step(self) -> None:
        for _, parameter in self.injector.job.named_parameters():
            if local_part(parameter.detach()).numel():
                weight = local_part(parameter.detach())
                self.injector.event("optimizer", weight)


# --- what happens ---------------------------------------------------------------------------------


def sleep_with_the_gil() -> None:
    """Sleep in C. PyDLL keeps the GIL, so no other thread of this process runs Python."""
    until = time.monotonic() + FOR_EVER
    while (left := until - time.monotonic()) > 0:  # a signal ends the sleep, such as where.py's
        ctypes.PyDLL(None).sleep(max(1, int(left)))


def raise_exception() -> None:
    raise RuntimeError("a fault on purpose (--fault)")


def flip_a_bit(tensor: Tensor) -> None:
    """Flip a bit in the middle of the mantissa of the largest element."""
    element = tensor.view(-1)[int(tensor.abs().argmax()) :][:1]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bit = {2: 5, 4: 16, 8: 40}[tensor.element_size()]
    element.view(integers).bitwise_xor_(1 << bit)


def set_to(value: float) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor.view(-1)[tensor.numel() // 2] = value

    return change


ENDS: Mapping[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(3),
    "exc": raise_exception,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(FOR_EVER),
    "gil": sleep_with_the_gil,
}
CHANGES: Mapping[str, Callable[[Tensor], None]] = {
    "nan": set_to(float("nan")),
    "inf": set_to(float("inf")),
    "flip": flip_a_bit,
}


def happened(path: Path) -> set[tuple[int, str]]:
    """The number and the text of each fault that has happened in this run."""
    past = set()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # the machine stopped, or the disk was full, within a line
            entry = json.loads(line)
            past.add((entry["number"], entry["fault"]))
    return past
