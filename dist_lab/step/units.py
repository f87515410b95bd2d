"""Units: when the parameters of one are about to be used, and when they have been, both ways.

[Note: when a unit is open] It is unsharded when a forward or backward reaches it and finds it
closed. It is resharded when a forward leaves it, unless backward is recomputing that forward;
when the last of its gradients is in, and nothing frozen is needed on the way to its inputs;
when backward has left it by the inputs of its forward, because a frozen unit has no last
gradient and an unused parameter never gets one; and at the end of a backward in any case.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.context import Wire
from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, refuse_copy, tensors_in
from dist_lab.step.protocol import Chain, Phase
from dist_lab.torch_private import backward_number, when_backward_ends


class Unit:
    """Tells a strategy when one unit is about to be used and has been used, in both directions.

    Args:
        leaf_of: trained parameter -> the tensor that backward reaches.
    """

    def __init__(
        self, name: str, module: nn.Module, leaf_of: Mapping[nn.Parameter, Tensor],
        sync: Chain, wire: Wire,
    ) -> None:  # fmt: skip
        self.name, self.sync, self.wire = name, sync, wire
        leaves = [leaf_of[p] for p in module.parameters() if p in leaf_of]
        self.trained = {id(leaf) for leaf in leaves}
        self.partly_frozen = any(not p.requires_grad for p in module.parameters())
        self.is_open = self.must_see_outputs = False
        self.missing: set[int] = set()  # gradients that this backward still has to bring
        self.outer = ""  # the unit that this one was called from
        self.backward = -1  # the backward whose end will be told
        self.entered: set[Visit] = set()  # forwards that this backward is in the middle of
        self.visit = Visit()
        module.register_forward_pre_hook(ModuleHook(self._enter_forward), with_kwargs=True)
        module.register_forward_hook(ModuleHook(self._leave_forward), always_call=True)
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(weakly(self._gradient))

    def open(self, phase: Phase) -> None:
        if not self.is_open:
            self.is_open = True
            self.sync.unshard(self.name, phase)

    def close(self, phase: Phase) -> None:
        self.entered.clear()
        if self.is_open:
            self.is_open = False
            self.sync.reshard(self.name, phase)

    def _enter_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.outer, self.wire.unit = self.wire.unit, self.name
        # A forward within backward computes again what backward is about to need.
        phase = Phase.BACKWARD if in_backward() else Phase.FORWARD
        self.wire.phase = phase.value  # also if the unit is called by itself
        self.open(phase)
        if torch.is_grad_enabled():
            self.visit = visit = Visit()
            for tensor in tensors_in([args, kwargs]):
                if tensor.requires_grad:
                    visit.inputs += 1
                    if tensor.grad_fn is not None:  # a leaf would keep the hook for ever
                        tensor.register_hook(lambda gradient: self._leave_backward(visit))

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.wire.unit = self.outer
        if not in_backward():
            self.close(Phase.FORWARD)
        visit, found = self.visit, list(tensors_in(output))
        if self.must_see_outputs and not found and output is not None and torch.is_grad_enabled():
            raise UserError(
                f"{self.name or 'the model'} returns a {type(output).__name__}, and backward could "
                "not be seen to reach it; return tensors, or tuples, dicts or dataclasses of them"
            )
        for tensor in found:
            if tensor.grad_fn is not None:
                # Of the node, whose hooks run after the tensor's own: who leaves goes first.
                tensor.grad_fn.register_prehook(lambda gradients: self._enter_backward(visit))

    def _enter_backward(self, visit: "Visit") -> None:
        self.wire.phase = "backward"
        self.wire.unit = self.name or self.wire.unit  # the model's output is often a unit's, too
        if self.backward != backward_number():
            self.backward, self.missing = backward_number(), set(self.trained)
            when_backward_ends(self._end_backward)
        if visit.inputs > 0:
            self.entered.add(visit)
        self.open(Phase.BACKWARD)

    def _leave_backward(self, visit: "Visit") -> None:
        visit.inputs -= 1
        if visit.inputs == 0 and visit in self.entered:
            self.entered.discard(visit)
            if not self.entered:
                self.close(Phase.BACKWARD)

    def _gradient(self, parameter: Tensor) -> None:
        self.missing.discard(id(parameter))
        # On its way to an input, backward may still need what is frozen.
        if not self.missing and not (self.partly_frozen and self.entered):
            self.close(Phase.BACKWARD)

    def _end_backward(self) -> None:
        self.wire.unit = ""
        self.backward = -1
        self.close(Phase.BACKWARD)


class Visit:
    """One forward of one unit: how many of its inputs backward has still to reach."""

    inputs = 0


def refuse_outside(
    model: nn.Module, units: Sequence[Unit], modules: Mapping[str, nn.Module]
) -> None:
    """See that whatever computes with parameters lies in a unit that is open, the innermost."""
    for unit in units:
        unit.must_see_outputs = True
    inside = {unit.name: set(modules[unit.name].modules()) for unit in units}
    for name, module in model.named_modules():
        if any(p is not None for p in module._parameters.values()):
            around = [unit for unit in units if module in inside[unit.name]]
            known = {modules[unit.name] for unit in around}
            innermost = [u for u in around if inside[u.name] & known == {modules[u.name]}]
            check = partial(_refuse_outside, name, innermost)
            in_a_copy = partial(refuse_copy, type(module).__name__)
            module.register_forward_pre_hook(ModuleHook(check, in_a_copy))


def _refuse_outside(name: str, around: Sequence[Unit], module: nn.Module, args: Any) -> None:
    if not any(unit.is_open for unit in around):
        raise UserError(
            f"{name} was called by itself, and holds this rank's part of its parameters; call the "
            f"model, or parallelize it with units=[{name!r}]"
        )


def weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """A hook for a parameter or its autograd node, which does not keep the hook's owner alive.

    They hold hooks where the garbage collector cannot see it. A hook that held its owner, which
    holds the model, would keep all of them for ever.
    """
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*first, *arguments)

    return hook


def in_backward() -> bool:
    return backward_number() != -1
