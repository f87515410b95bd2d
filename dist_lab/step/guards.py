"""When parameters and gradients are guarded: see guarded_tensor.py.

    shards of FSDP and ZeRO      whenever the model is not in forward or backward
    parameters of tp             likewise, but not between a forward and its backward
    full parameters of ZeRO      from the optimizer's step to after_step(): other shards are stale
    gradients not summed yet     between backward and finish()
    sharded gradients            from backward to the next backward

The strategy, the model and optimizers compute with plain tensors, at no cost. We register torch's
global hooks on optimizer steps, so this holds for any torch.optim.Optimizer, also a user's own. An
optimizer of another base class computes with guarded tensors, which is correct but slower.
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
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.step.guarded_tensor import UNSUMMED, Guard, GuardedTensor, put_guard, remove_guard
from dist_lab.step.hooks import StaysBehind
from dist_lab.step.protocol import ROOT, Applied, Phase, Sync
from dist_lab.torch_private import backward_number, of_plain_tensors

GuardList = list[tuple[nn.Parameter, Guard]]
MARK = "stepped_on_for_a_job"


class Guards:
    """The tensors of one job that are guarded, with the guard of each.

    Attributes:
        shards: the shards that no forward computes with: those of FSDP and ZeRO.
        used_in_forward: the sharded parameters that forwards compute with and save for backward.
        stale: the full parameters; an optimizer step updates only this rank's shard of each.
        sharded_grads: the parameters whose `.grad` is a shard.
        unsummed_grads: the parameters whose `.grad` is local to this rank until finish().
        summed: finish() has summed all gradients.
    """

    def __init__(self, model: nn.Module, applied: Applied, mesh: Mesh) -> None:
        self.shards: GuardList = []
        self.used_in_forward: GuardList = []
        self.stale: GuardList = []
        self.sharded_grads: GuardList = []
        self.unsummed_grads: GuardList = []
        self._guarded_grads: list[weakref.ref[Tensor]] = []
        self.summed = True
        self._settle: Callable[[], None] = applied.sync.settle
        mark = StepMark(self)
        for name, parameter in model.named_parameters():
            stepped = applied.stepped.get(name, parameter)
            if mesh.size > 1:
                setattr(parameter, MARK, mark)
                setattr(stepped, MARK, mark)
            layout = applied.layouts[name]
            shape, kinds = layout.shape, split_kinds(layout, mesh)
            if type(parameter) is not nn.Parameter:  # a DTensor needs no guard
                continue
            # FSDP sums a gradient in backward already, over the data axes that shard the parameter.
            axes = {axis for axis, _ in layout.splits if axis in DATA_AXES}
            summed_axes = axes if name in applied.leaves else set()
            if any(mesh[o.axis].size > 1 for o in layout.partial if o.axis not in summed_axes):
                advice = "call job.finish() before you use it"
                label = f"the gradient of {name}"
                guard = Guard(label, parameter.shape, advice, reason=UNSUMMED)
                self.unsummed_grads.append((parameter, guard))
            if not kinds:
                continue
            advice = "call job.clip_grad_norm, or job.full_gradients for the full gradient"
            guard = Guard(f"the gradient of {name}", shape, advice)
            if "shard" not in kinds:
                guard = replace(guard, reason="belongs to this pipeline stage only")
            self.sharded_grads.append((stepped, guard))
            if stepped is not parameter:  # stale until ranks all-gather the updated shards
                advice = "call job.after_step() after the optimizer's step, before you use weights"
                self.stale.append((parameter, Guard(name, shape, advice, stale=True)))
            if "shard" in kinds:
                advice = "call job.full_state_dict for the full tensor"
                guard = Guard(name, shape, advice, used_in_forward=True)
                if stepped is parameter and name not in applied.leaves:
                    self.used_in_forward.append((parameter, guard))
                    continue
                advice += ", or use it in its module's forward, where it is unsharded"
                self.shards.append((stepped, Guard(name, shape, advice)))
        register_step_hooks()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step: give it plain tensors that have all the user's edits."""
        if backward_number() != -1:
            raise UserError(
                f"{type(optimizer).__name__} steps in the middle of backward, on gradients that "
                "are not summed over the ranks yet: step after job.finish()"
            )
        self._settle()
        self.unguard_parameters()
        self.unguard_gradients()

    def after_step(self) -> None:
        self.guard_parameters(stale=True)

    def unguard_parameters(self, *, stale: bool = True) -> None:
        for parameter, _ in self._parameters(stale=stale):
            remove_guard(parameter)

    def guard_parameters(self, *, stale: bool = False) -> None:
        for parameter, guard in self._parameters(stale=stale):
            put_guard(parameter, guard)

    def guard_shards(self) -> None:
        for parameter, guard in self.shards:
            put_guard(parameter, guard)

    def unguard_gradients(self) -> None:
        # Also those that the user has cleared: a library may put the same tensor back into `.grad`.
        for reference in self._guarded_grads:
            if (cleared := reference()) is not None:
                remove_guard(cleared)
        self._guarded_grads.clear()
        for gradient, _ in _grads([*self.sharded_grads, *self.unsummed_grads]):
            if gradient is not None:
                remove_guard(gradient)

    def guard_gradients(self) -> None:
        unsummed = () if self.summed else self.unsummed_grads
        for gradient, guard in _grads([*self.sharded_grads, *unsummed]):
            if gradient is not None and type(gradient) in (Tensor, GuardedTensor):
                put_guard(gradient, guard)
                self._guarded_grads.append(weakref.ref(gradient))

    def _parameters(self, *, stale: bool) -> GuardList:
        return [*self.shards, *self.used_in_forward, *(self.stale if stale else ())]


class StepMark(StaysBehind):
    """A mark on a parameter that optimizers may step on: it refers to the job's guards."""

    in_a_copy = None

    def __init__(self, guards: Guards) -> None:
        self.guards = weakref.ref(guards)


@cache
def register_step_hooks() -> None:
    """Register the global hooks on optimizer steps: once in a process, and never removed.

    A hook cannot be removed together with its job. The garbage collector might do it while torch
    iterates over its hooks.
    """

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for guards in _stepped_by(optimizer):
            guards.before_step(optimizer)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for guards in _stepped_by(optimizer):
            guards.after_step()

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _stepped_by(optimizer: torch.optim.Optimizer) -> Iterable[Guards]:
    """The guards of the jobs on whose parameters the optimizer steps."""
    marks = {getattr(p, MARK, None) for group in optimizer.param_groups for p in group["params"]}
    alive = (mark.guards() for mark in marks if mark is not None)
    return {id(guards): guards for guards in alive if guards is not None}.values()


def _grads(guards: GuardList) -> list[tuple[Tensor | None, Guard]]:
    """Read each `.grad` with guards switched off: guards make the read twenty times slower."""
    grads: list[tuple[Tensor | None, Guard]]
    grads = of_plain_tensors(lambda: [(parameter.grad, guard) for parameter, guard in guards])
    return grads


def split_kinds(layout: Layout, mesh: Mesh) -> set[str]:
    """How a tensor is split: "shard" if by elements, "stage" if only some pp stages have it."""
    kinds = set()
    for axis, how in layout.splits:
        if isinstance(how, OnlyOn) and mesh[axis].size > 1:
            kinds.add("stage")
        elif mesh[axis].size > (how.copies if isinstance(how, Shard) else 1):
            kinds.add("shard")
    return kinds


class GuardsOff(Sync):
    """The first link of the chain: removes guards before the strategy and the model compute."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def microbatch(self, *, last: bool) -> None:
        self.guards.unguard_gradients()

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            self.guards.unguard_parameters(stale=phase is Phase.FORWARD)
            if phase is Phase.BACKWARD or torch.is_grad_enabled():  # autograd accumulates there
                self.guards.unguard_gradients()

    def finish(self) -> None:
        self.guards.unguard_parameters(stale=False)
        self.guards.unguard_gradients()

    def after_step(self) -> None:
        self.guards.unguard_parameters()


class GuardsOn(Sync):
    """The last link of the chain: puts guards back before users can reach the tensors."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def microbatch(self, *, last: bool) -> None:
        self.guards.guard_gradients()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.guards.summed = False

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit != ROOT:
            return
        if phase is Phase.FORWARD and not torch.is_grad_enabled():
            self.guards.guard_parameters()
        else:  # backward may still compute with the parameters used in forward
            self.guards.guard_shards()
        if phase is Phase.BACKWARD:
            self.guards.guard_gradients()

    def finish(self) -> None:
        self.guards.summed = True
        self.guards.guard_parameters()
        self.guards.guard_gradients()

    def after_step(self) -> None:
        self.guards.guard_parameters()
