"""When parameters and gradients refuse what is wrong for a rank's part: see parts.py.

    shards of FSDP and ZeRO      whenever the model is in no forward or backward
    parameters of tp             the same, except between a forward and the backward that it is for
    whole parameters of ZeRO     from the optimizer's step to after_step(), when other parts are old
    gradients not summed yet     between backward and finish()
    gradients of parts           from backward to the next one

The strategy, the model and optimizers compute with plain tensors, at no cost. Torch tells us of the
step of every optimizer of its class, whoever has built it. An optimizer of another class computes
with guarded tensors, which is as right, and slower.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, OnlyOn, Shard
from dist_lab.mesh.mesh import Mesh
from dist_lab.step.hooks import StaysBehind
from dist_lab.step.parts import UNSUMMED, Part, PartOf, put_on, take_off
from dist_lab.step.protocol import ROOT, Applied, Phase, Sync
from dist_lab.torch_private import backward_number, of_plain_tensors

Guards = list[tuple[nn.Parameter, PartOf]]
MARK = "stepped_on_for_a_job"


class Parts:
    """The tensors of which this rank has parts.

    Attributes:
        aside: the parts that no forward computes with: shards under FSDP and ZeRO.
        inside: the parameters that forwards compute with, and keep for backward.
        stale: the parameters of which a step leaves one part new.
        gradients: the parameters whose `.grad` is a part.
        unsummed: the parameters whose `.grad` is this rank's own until finish().
        summed: finish() has seen all gradients that have come.
    """

    def __init__(self, model: nn.Module, applied: Applied, mesh: Mesh) -> None:
        self.aside: Guards = []
        self.inside: Guards = []
        self.stale: Guards = []
        self.gradients: Guards = []
        self.unsummed: Guards = []
        self.summed = True
        self._settle: Callable[[], None] = applied.sync.settle
        mark = SteppedOn(self)
        for name, own in model.named_parameters():
            stepped = applied.stepped.get(name, own)
            if mesh.size > 1:
                setattr(own, MARK, mark)
                setattr(stepped, MARK, mark)
            layout = applied.layouts[name]
            shape, held = layout.shape, parts_of(layout, mesh)
            if type(own) is not nn.Parameter:  # a library's speak of the whole
                continue
            # Along the axes that FSDP shards a parameter over, it sums the gradient in backward.
            by_then = {axis for axis, _ in layout.splits} if name in applied.leaves else set()
            if any(mesh[o.axis].size > 1 for o in layout.partial if o.axis not in by_then):
                advice = "call job.finish() before you use it"
                of = PartOf(f"the gradient of {name}", own.shape, advice, how=UNSUMMED)
                self.unsummed.append((own, of))
            if not held:
                continue
            advice = "call job.clip_grad_norm, or job.full_gradients for the whole"
            of = PartOf(f"the gradient of {name}", shape, advice)
            if "part" not in held:
                of = replace(of, how="is one of this stage alone")
            self.gradients.append((stepped, of))
            if stepped is not own:  # until all ranks give each other what they have stepped on
                advice = "call job.after_step() after the optimizer's step, before you use weights"
                self.stale.append((own, PartOf(name, shape, advice, stale=True)))
            if "part" in held:
                advice = "job.full_state_dict gives the whole"
                of = PartOf(name, shape, advice, inside=True)
                if stepped is own and name not in applied.leaves:
                    self.inside.append((own, of))
                    continue
                advice += ", and in its module's forward it is whole"
                self.aside.append((stepped, PartOf(name, shape, advice)))
        hear_of_steps()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Any optimizer is about to step: it meets plain tensors, and what a user has done."""
        if backward_number() != -1:
            raise UserError(
                f"{type(optimizer).__name__} steps in the middle of backward, on gradients that "
                "are not summed over the ranks: step after job.finish()"
            )
        self._settle()
        self.plain_parameters()
        self.plain_gradients()

    def after_step(self) -> None:
        self.guard_parameters(stale=True)

    def plain_parameters(self, *, stale: bool = True) -> None:
        for parameter, _ in self._parameters(stale=stale):
            take_off(parameter)

    def guard_parameters(self, *, stale: bool = False) -> None:
        for parameter, of in self._parameters(stale=stale):
            put_on(parameter, of)

    def guard_aside(self) -> None:
        for parameter, of in self.aside:
            put_on(parameter, of)

    def plain_gradients(self) -> None:
        for gradient, _ in _gradients([*self.gradients, *self.unsummed]):
            if gradient is not None:
                take_off(gradient)

    def guard_gradients(self) -> None:
        for gradient, of in _gradients([*self.gradients, *(() if self.summed else self.unsummed)]):
            if gradient is not None and type(gradient) in (Tensor, Part):
                put_on(gradient, of)

    def _parameters(self, *, stale: bool) -> Guards:
        return [*self.aside, *self.inside, *(self.stale if stale else ())]


class SteppedOn(StaysBehind):
    """Stands on a parameter that optimizers may step on: of which job's parts it is one."""

    in_a_copy = None

    def __init__(self, parts: Parts) -> None:
        self.parts = weakref.ref(parts)


@cache
def hear_of_steps() -> None:
    """Tell jobs of the steps of all optimizers of torch. Once in a process, and for good.

    Torch looks at its hooks while it calls them, so a hook cannot go when its job does: the garbage
    collector may choose that moment.
    """

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parts in _stepped_by(optimizer):
            parts.before_step(optimizer)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parts in _stepped_by(optimizer):
            parts.after_step()

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _stepped_by(optimizer: torch.optim.Optimizer) -> Iterable[Parts]:
    """The parts of the jobs on whose parameters the optimizer steps."""
    marks = {getattr(p, MARK, None) for group in optimizer.param_groups for p in group["params"]}
    alive = (mark.parts() for mark in marks if mark is not None)
    return {id(parts): parts for parts in alive if parts is not None}.values()


def _gradients(guards: Guards) -> list[tuple[Tensor | None, PartOf]]:
    """Read each `.grad`, as if no parameter were guarded: it would take twenty times as long."""
    found: list[tuple[Tensor | None, PartOf]]
    found = of_plain_tensors(lambda: [(parameter.grad, of) for parameter, of in guards])
    return found


def parts_of(layout: Layout, mesh: Mesh) -> set[str]:
    """How this rank holds less than all: a "part" of the tensor, or one of the "stages"."""
    held = set()
    for axis, how in layout.splits:
        if isinstance(how, OnlyOn) and mesh[axis].size > 1:
            held.add("stage")
        elif mesh[axis].size > (how.copies if isinstance(how, Shard) else 1):
            held.add("part")
    return held


class Plain(Sync):
    """Told first: parts are about to be computed with."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def microbatch(self, *, last: bool) -> None:
        self.parts.plain_gradients()

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            self.parts.plain_parameters(stale=phase is Phase.FORWARD)
            if phase is Phase.BACKWARD or torch.is_grad_enabled():  # backward adds to them
                self.parts.plain_gradients()

    def finish(self) -> None:
        self.parts.plain_parameters(stale=False)
        self.parts.plain_gradients()

    def after_step(self) -> None:
        self.parts.plain_parameters()


class Guarded(Sync):
    """Told last: users are about to meet parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def microbatch(self, *, last: bool) -> None:
        self.parts.guard_gradients()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.parts.summed = False

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit != ROOT:
            return
        if phase is Phase.FORWARD and not torch.is_grad_enabled():
            self.parts.guard_parameters()
        else:  # what forwards compute with, backward may still have to
            self.parts.guard_aside()
        if phase is Phase.BACKWARD:
            self.parts.guard_gradients()

    def finish(self) -> None:
        self.parts.summed = True
        self.parts.guard_parameters()
        self.parts.guard_gradients()

    def after_step(self) -> None:
        self.parts.guard_parameters()
