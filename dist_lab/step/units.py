"""Units: decides when a unit's parameters are unsharded and resharded, in forward and backward.

[Note: when a unit is open] A closed unit is unsharded when its forward begins, also if backward
recomputes this forward, and when backward reaches its outputs or a saved tensor of its parameters
(step/saved.py). It is resharded
* when its forward ends, unless backward is recomputing that forward;
* when its last gradient is ready, unless backward still needs a frozen parameter for its inputs;
* when backward has reached all its inputs, because frozen or unused parameters get no gradient;
* when backward ends, in any case.
"""

import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.context import CommContext
from dist_lab.errors import CollectiveError, UserError
from dist_lab.step.hooks import ModuleHook, map_tensors, tensors_in
from dist_lab.step.protocol import Chain, Phase
from dist_lab.step.reads import close_read_units
from dist_lab.step.saved import SavedByName, Visit
from dist_lab.torch_private import backward_number, when_backward_ends


class Unit:
    """Tells a strategy when to unshard and reshard one unit, in forward and in backward.

    Args:
        leaf_of: parameter -> its autograd leaf.
        root: the unit of the whole model; None if this is that unit.
        saver: saves parameters for backward; shared by all units.
        unsharded: the leaves that have memory only while this unit is open: see step/saved.py.
    """

    def __init__(
        self, name: str, module: nn.Module, leaf_of: Mapping[nn.Parameter, Tensor],
        sync: Chain, comm: CommContext, root: "Unit | None", saver: SavedByName,
        unsharded: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.name, self.sync, self.comm = name, sync, comm
        self.root, self.saver = root, saver
        self.unsharded = {id(leaf): leaf for leaf in unsharded}
        parameters = list(module.parameters())
        self.trained = {id(leaf_of[p]) for p in parameters if p.requires_grad}
        self.partly_frozen = not all(p.requires_grad for p in parameters)
        self.is_open = self.must_see_outputs = False
        self.expects_backward = False  # a forward with gradients has run, and no backward yet
        self.missing_grads: set[int] = set()  # leaves whose gradients this backward still computes
        self.outer = ""  # comm.unit before this forward: the caller's name
        self.backward = -1  # the number of the backward that will call _end_backward
        self.entered: set[Visit] = set()  # forwards whose inputs this backward has not reached
        self.visit = Visit()  # the latest forward
        self.reader: Unit | None = None  # a running unit that has read a parameter of this one
        self.read_units: list[Unit] = []  # the units of which this unit is the reader
        # Before all other hooks: some compute with parameters, as the old weight_norm does.
        enter = ModuleHook(self._enter_forward)
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(ModuleHook(self._leave_forward), always_call=True)

    def open(self, phase: Phase) -> None:
        if not self.is_open:
            self.is_open = True
            self.sync.unshard(self.name, phase)
        self.saver.watch_storages(self.unsharded.values(), self, self.visit)

    def close(self, phase: Phase) -> None:
        self.entered.clear()
        if phase is Phase.ABORT:
            self.backward, self.expects_backward = -1, False  # _end_backward will not be called
            self.reader = None
            self.read_units.clear()
        if self.is_open:
            self.is_open = False
            self.sync.reshard(self.name, phase)

    def _enter_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.outer = self.comm.unit
        phase = Phase.BACKWARD if in_backward() else Phase.FORWARD  # BACKWARD: recomputed
        self.comm.begin(self.comm.step, phase.value, self.name)
        self.visit = visit = Visit()
        self.saver.enter(self)
        self.open(phase)
        # A unit with a reader stays open in backward until it has all gradients: no input hooks.
        if torch.is_grad_enabled() and self.reader is None:
            for tensor in tensors_in([args, kwargs]):
                if tensor.requires_grad:
                    visit.inputs += 1
                    if tensor.grad_fn is not None:  # hooks on a leaf would stay
                        tensor.register_hook(lambda gradient: self._leave_backward(visit))

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.saver.leave(self):
            return None
        self.comm.unit = self.outer
        if isinstance(sys.exception(), CollectiveError):
            return None  # no rank answers any more: leave the unit open, and send nothing
        visit, outputs = self.visit, list(tensors_in(output))
        unsharded = ChainMap(self.unsharded, *(unit.unsharded for unit in self.read_units))
        replaced = None  # the output that the hook returns, if it changes it
        if any(id(tensor) in unsharded for tensor in outputs):
            # Resharding frees the memory of a returned parameter, but not that of a view of it.
            replaced = map_tensors(lambda t: t.view_as(t) if id(t) in unsharded else t, output)
            outputs = list(tensors_in(replaced))
        close_read_units(self)
        if not in_backward():
            if visit.saved or any(tensor.requires_grad for tensor in outputs):
                self.sync.backward_will_come(self.name, visit)
            self.expects_backward |= torch.is_grad_enabled()  # other ranks may run one
            if self.reader is None:  # a reader may still use a parameter
                self.close(Phase.FORWARD)
        if self.must_see_outputs and not outputs and output is not None and torch.is_grad_enabled():
            raise UserError(
                f"{self.name or 'the model'} returns a {type(output).__name__}, in which backward "
                "cannot be hooked; return tensors, or tuples, dicts or dataclasses of them"
            )
        for tensor in outputs:
            if tensor.grad_fn is not None:
                # On the node, whose hooks run after the tensor's: _leave_backward comes first.
                tensor.grad_fn.register_prehook(lambda gradients: self.enter_backward(visit))
        return replaced

    def enter_backward(self, visit: Visit) -> None:
        """Backward has reached the unit: its outputs, or a tensor that its forward saved."""
        backward = backward_number()
        self.expects_backward = False
        self.comm.phase = "backward"
        if self.root is not None and self.root.backward == -1:
            self.root.enter_backward(Visit())
        if self.saver.is_running(self) or self.reader is not None:
            return  # a gradient is computed inside a forward, which keeps the unit open
        if visit.outer is not None and visit.outer[0] is not self.root:
            outer, outer_visit = visit.outer  # opens first: it may return the same tensor
            outer.enter_backward(outer_visit)
        self.comm.unit = self.name or self.comm.unit  # the model may return a unit's output
        if self.backward != backward:
            self.backward, self.missing_grads = backward, set(self.trained)
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
        """Called when this parameter's gradient is ready, after the strategy's grads_ready()."""
        self.missing_grads.discard(id(leaf))
        # Backward may still need a frozen parameter to reach an input.
        if not self.missing_grads and not (self.partly_frozen and self.entered):
            self.close(Phase.BACKWARD)

    def _end_backward(self) -> None:
        self.comm.unit = ""
        self.backward = -1
        self.close(Phase.BACKWARD)


def in_backward() -> bool:
    return backward_number() != -1
