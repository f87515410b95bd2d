"""Units: when the parameters of one are about to be used, and when they have been, both ways.

[Note: when a unit is open] It is unsharded when a forward or backward reaches it and finds it
closed: by its outputs, by what was saved of its parameters (step/saved.py), or by recomputing its
forward. It is resharded when a forward leaves it, unless backward is recomputing that forward;
when the last of its gradients is in, and nothing frozen is needed on the way to its inputs;
when backward has left it by the inputs of its forward, because a frozen unit has no last
gradient and an unused parameter never gets one; and at the end of a backward in any case.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, map_tensors, tensors_in
from dist_lab.step.protocol import Chain, Phase
from dist_lab.step.reads import give_back
from dist_lab.step.saved import SavedByName, Visit
from dist_lab.torch_private import backward_number, when_backward_ends


class Unit:
    """Tells a strategy when one unit is about to be used and has been used, in both directions.

    Args:
        leaf_of: parameter -> the tensor that backward reaches.
        root: the unit that is the model; None: this one.
        saved: what forwards save; shared by all units.
        lent: leaves that have memory while it is open alone: see step/saved.py.
    """

    def __init__(
        self, name: str, module: nn.Module, leaf_of: Mapping[nn.Parameter, Tensor],
        sync: Chain, comm: CommContext, root: "Unit | None", saved: SavedByName,
        lent: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.name, self.sync, self.comm = name, sync, comm
        self.root, self.saved = root, saved
        self.lent = {id(leaf): leaf for leaf in lent}
        parameters = list(module.parameters())
        self.trained = {id(leaf_of[p]) for p in parameters if p.requires_grad}
        self.partly_frozen = not all(p.requires_grad for p in parameters)
        self.is_open = self.must_see_outputs = False
        self.awaits_backward = False  # a forward was here that backward may come back to
        self.missing: set[int] = set()  # gradients that this backward still has to bring
        self.outer = ""  # the unit that this one was called from
        self.backward = -1  # the backward whose end will be told
        self.entered: set[Visit] = set()  # forwards that this backward is in the middle of
        self.visit = Visit()
        self.reader: Unit | None = None  # whose forward has read a parameter, and is under way
        self.read: list[Unit] = []  # units of which this one's forward has read parameters
        # Before all other hooks: what they do with parameters, as the old weight_norm does, is part
        # of the forward.
        enter = ModuleHook(self._enter_forward)
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(ModuleHook(self._leave_forward), always_call=True)

    def open(self, phase: Phase) -> None:
        if not self.is_open:
            self.is_open = True
            self.sync.unshard(self.name, phase)
        self.saved.opened(self.lent.values(), self, self.visit)

    def close(self, phase: Phase) -> None:
        self.entered.clear()
        if phase is Phase.ABORT:
            self.backward, self.awaits_backward = -1, False  # its end will not be told
            self.reader = None
            self.read.clear()
        if self.is_open:
            self.is_open = False
            self.sync.reshard(self.name, phase)

    def _enter_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.outer, self.comm.unit = self.comm.unit, self.name
        # A forward within backward computes again what backward is about to need.
        phase = Phase.BACKWARD if in_backward() else Phase.FORWARD
        self.comm.phase = phase.value  # also if the unit is called by itself
        self.visit = visit = Visit()
        self.saved.enter(self)
        self.open(phase)
        # One that stays open for its reader is opened once in backward, too: until it has all.
        if torch.is_grad_enabled() and self.reader is None:
            for tensor in tensors_in([args, kwargs]):
                if tensor.requires_grad:
                    visit.inputs += 1
                    if tensor.grad_fn is not None:  # a leaf would keep the hook for ever
                        tensor.register_hook(lambda gradient: self._leave_backward(visit))

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.saved.leave(self):
            return None
        self.comm.unit = self.outer
        visit, found = self.visit, list(tensors_in(output))
        lent = ChainMap(self.lent, *(unit.lent for unit in self.read)) if self.read else self.lent
        returned = None  # what stands for the output
        if any(id(tensor) in lent for tensor in found):
            # A parameter itself is about to lose its memory, which a view of it keeps alive.
            returned = map_tensors(lambda t: t.view_as(t) if id(t) in lent else t, output)
            found = list(tensors_in(returned))
        give_back(self)
        if not in_backward():
            if visit.saved or any(tensor.requires_grad for tensor in found):
                self.sync.backward_will_come(self.name, visit)
            self.awaits_backward |= torch.is_grad_enabled()  # others may, whose rows are other ones
            if self.reader is None:  # otherwise that may still hold a parameter
                self.close(Phase.FORWARD)
        if self.must_see_outputs and not found and output is not None and torch.is_grad_enabled():
            raise UserError(
                f"{self.name or 'the model'} returns a {type(output).__name__}, and backward could "
                "not be seen to reach it; return tensors, or tuples, dicts or dataclasses of them"
            )
        for tensor in found:
            if tensor.grad_fn is not None:
                # Of the node, whose hooks run after the tensor's own: who leaves goes first.
                tensor.grad_fn.register_prehook(lambda gradients: self.enter_backward(visit))
        return returned

    def enter_backward(self, visit: Visit) -> None:
        """Backward has reached the unit, in whatever way."""
        now = backward_number()
        self.awaits_backward = False
        self.comm.phase = "backward"
        if self.root is not None and self.root.backward == -1:
            self.root.enter_backward(Visit())
        if self.saved.computing(self) or self.reader is not None:
            return  # a gradient is taken inside a forward, which keeps it open
        if visit.outer is not None and visit.outer[0] is not self.root:
            outer, of_outer = visit.outer  # which may end in the same tensor: it comes first
            outer.enter_backward(of_outer)
        self.comm.unit = self.name or self.comm.unit  # the model's output is often a unit's, too
        if self.backward != now:
            self.backward, self.missing = now, set(self.trained)
            when_backward_ends(self._end_backward)
        if visit.inputs > 0:
            self.entered.add(visit)
        self.open(Phase.BACKWARD)

    def _leave_backward(self, visit: Visit) -> None:
        visit.inputs -= 1
        if visit.inputs == 0 and visit in self.entered:
            self.entered.discard(visit)
            if not self.entered:
                self.close(Phase.BACKWARD)

    def gradient(self, leaf: Tensor) -> None:
        """The gradient of a parameter in the unit is complete, and has been told."""
        self.missing.discard(id(leaf))
        # On its way to an input, backward may still need what is frozen.
        if not self.missing and not (self.partly_frozen and self.entered):
            self.close(Phase.BACKWARD)

    def _end_backward(self) -> None:
        self.comm.unit = ""
        self.backward = -1
        self.close(Phase.BACKWARD)


def in_backward() -> bool:
    return backward_number() != -1
