"""The plain runner: forward, backward, and telling the strategy what has happened.

It is the only place (with the pipeline's runner) that registers hooks, so the order of events in a
step is read off here:

    model(x)        for each unit in turn: unshard, compute, reshard        phase "forward"
    loss.backward() for each unit, last first: unshard, gradients ready     phase "backward"
                    (each told to the strategy), reshard

The model itself is a unit, too: named "", open from the first moment of a forward or backward to
the last.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dist_lab.comm.context import CommContext
from dist_lab.loss import LossFn, Pair, share_of
from dist_lab.step.hooks import ModuleHook, weakly
from dist_lab.step.order import Step
from dist_lab.step.outside import refuse_gradients, refuse_outside
from dist_lab.step.protocol import ROOT, Applied, Chain, Phase
from dist_lab.step.reads import open_when_read
from dist_lab.step.saved import SavedByName, Visit
from dist_lab.step.units import Unit, in_backward


class Runner(Step):
    """Drives one model's forward and backward under one Sync.

    Args:
        units: name -> module: what is borrowed and returned together, the model itself first; an
            outer one before those within it.
        applied: what the strategy did to the model: see step/protocol.py.
    """

    def __init__(
        self,
        model: nn.Module,
        sync: Chain,
        comm: CommContext,
        units: Mapping[str, nn.Module],
        applied: Applied,
    ) -> None:
        super().__init__(model, sync, comm, applied.stepped)
        self._last = True  # outside microbatch(), every backward is the last one
        self._in_block = False
        self._touched: set[str] = set()  # gradients of the micro-batch that is under way
        if applied.sharded_between_units:
            refuse_outside(model, units, lambda name: self._units[name].is_open)
        parameters = dict(model.named_parameters())
        leaf_of = {p: applied.leaves.get(name, p) for name, p in parameters.items()}
        self._units: dict[str, Unit] = {}
        self._saved = SavedByName(lends=bool(applied.unit_of))
        self._in_step = False  # there was a micro-batch since the last finish
        for name, module in units.items():
            root = self._units.get(ROOT)
            lent = [applied.leaves[n] for n, owner in applied.unit_of.items() if owner == name]
            unit = Unit(name, module, leaf_of, sync, comm, root, self._saved, lent)
            unit.must_see_outputs = applied.sharded_between_units and not applied.unit_of
            self._units[name] = unit
        lenders = {parameters[n]: self._units[owner] for n, owner in applied.unit_of.items()}
        open_when_read(model, lenders, leaf_of)
        # id of a leaf -> the units that hold it, the innermost first: those around it close later.
        self._units_of: dict[int, list[Unit]] = {}
        for unit in reversed(self._units.values()):
            for leaf in unit.trained:
                self._units_of.setdefault(leaf, []).append(unit)
        model.register_forward_pre_hook(ModuleHook(self._enter_forward), prepend=True)
        self._watch_gradients({n: leaf_of[p] for n, p in parameters.items() if p.requires_grad})
        if applied.sharded_between_units:
            shards = {n: p for n, p in parameters.items() if p is not leaf_of[p]}
            self._watched += refuse_gradients(shards)

    def _watch_gradients(self, leaves: Mapping[str, Tensor]) -> None:
        """Hear of each gradient before autograd adds it up, and after all hooks of the tensor.

        So a hook may change a gradient, whether it was there before ours or not: what the strategy
        is told is what is left in `.grad`.
        """
        # Kept here because a parameter does not keep the node that adds to its gradient alive.
        self._watched = [get_gradient_edge(leaf).node for leaf in leaves.values()]
        for (name, leaf), node in zip(leaves.items(), self._watched, strict=True):
            node.register_prehook(weakly(self._before_accumulation, name))
            node.register_hook(weakly(self._after_gradient, name, leaf))

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Backwards inside the block belong to one micro-batch; `last` says whether more follow."""
        before = self._last, self._in_block
        self._last, self._in_block, self._in_step = last, True, True
        self._reopen()  # before other ranks' gradients come in
        self.sync.microbatch(last=last)
        try:
            yield
            self._join_forward()
            self._join_backward()
        except BaseException:
            self._forget()
            raise
        finally:
            self._last, self._in_block = before
            self.sync.microbatch(last=self._last)
            if last:
                self._closed |= self._touched
            self._touched = set()

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """Forward and backward of one after another. Returns the sum of their shares."""
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for i, (inputs, targets) in enumerate(microbatches):
            with self.microbatch(last=self._last and i == len(microbatches) - 1):
                output = self.model(inputs)
                share = share_of(output, loss_fn(output, targets))
                del output  # or it would be kept while backward runs
                share.backward()
                total += share.detach()
        return total

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """The same by forward alone."""
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for inputs, targets in microbatches:
            total += loss_fn(self.model(inputs), targets)
        return total

    def timeline(self) -> list[list[Any]]:
        return []

    def _join_forward(self) -> None:
        """Take part in the forward of other ranks, if this rank has had no rows for one."""
        began, self._saved.began = self._saved.began, False
        if self._saved.lends and not (began or self._touched):
            root = self._units[ROOT]
            with self.comm.label("forward", unit=""), torch.enable_grad():
                root.open(Phase.FORWARD)
                root.close(Phase.FORWARD)
            root.awaits_backward = True

    def _join_backward(self) -> None:
        """Take part in the backward of other ranks, if this rank's loss came from nothing here."""
        root = self._units.get(ROOT)
        if root is not None and root.awaits_backward:
            root.awaits_backward = False
            with self.comm.label("backward", unit=""):
                root.open(Phase.BACKWARD)
                self.sync.grads_ready((), last=self._last)
                root.close(Phase.BACKWARD)

    def _before_finish(self) -> None:
        if not (self._in_step or self.has_gradients):
            self._join_forward()
        self._in_step = self._saved.began = False
        self._join_backward()
        for unit in reversed(self._units.values()):
            unit.close(Phase.BACKWARD)

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        if not in_backward():
            self.comm.phase, self.comm.unit = "forward", ""
            if any(unit.is_open for unit in self._units.values()):  # by an exception in backward
                self._forget()

    def _forget(self) -> None:
        with self.comm.label("forget", unit=""):  # nothing is summed any more
            for unit in self._units.values():
                unit.close(Phase.ABORT)
            self.sync.forget()

    def _before_accumulation(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        self.comm.phase = "backward"
        root = self._units.get(ROOT)
        if root is not None and root.backward == -1:
            root.enter_backward(Visit())
        self._reopen()
        self._refuse_closed(name)

    def _after_gradient(self, name: str, leaf: Tensor, *gradients: Any) -> None:
        if not leaf.requires_grad:  # frozen since its forward: backward has passed it by
            return
        self.has_gradients = True
        (self._touched if self._in_block else self._closed).add(name)
        self.sync.grads_ready([name], last=self._last)
        for unit in self._units_of.get(id(leaf), []):
            unit.gradient(leaf)
