"""The plain runner: runs forward and backward, and calls the strategy at each event.

Only this file and the pipeline's runner register hooks for strategies. So the order of events in a
step can be read here:

    model(x)        for each unit in order: unshard, compute, reshard       phase "forward"
    loss.backward() for each unit, last first: unshard, grads_ready for     phase "backward"
                    each of its parameters, reshard

The model itself is a unit, too. Its name is "", and it is open from the start of a forward or
backward to the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dist_lab.comm.context import CommContext
from dist_lab.loss import LossFn, Pair, share_of
from dist_lab.step.hooks import ModuleHook, weak_hook
from dist_lab.step.order import Step
from dist_lab.step.outside import refuse_gradients, refuse_outside
from dist_lab.step.protocol import ROOT, Applied, Chain, Phase
from dist_lab.step.reads import open_when_read
from dist_lab.step.saved import SavedByName, Visit
from dist_lab.step.units import Unit, in_backward


class Runner(Step):
    """Drives one model's forward and backward under one Sync.

    Args:
        units: name -> the module that is unsharded and resharded as one. The model itself is first,
            and an outer unit comes before the units inside it.
        applied: the result of the strategy: see step/protocol.py.
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
        self._in_microbatch = False
        self._touched: set[str] = set()  # names of gradients that this micro-batch has added to
        if applied.sharded_between_units:
            refuse_outside(model, units, lambda name: self._units[name].is_open)
        parameters = dict(model.named_parameters())
        leaf_of = {p: applied.leaves.get(name, p) for name, p in parameters.items()}
        self._units: dict[str, Unit] = {}
        self._saver = SavedByName(has_shards=bool(applied.unit_of))
        self._in_step = False  # there was a micro-batch since the last finish()
        for name, module in units.items():
            root = self._units.get(ROOT)
            leaves = [applied.leaves[n] for n, owner in applied.unit_of.items() if owner == name]
            unit = Unit(name, module, leaf_of, sync, comm, root, self._saver, leaves)
            unit.must_see_outputs = applied.sharded_between_units and not applied.unit_of
            self._units[name] = unit
        unit_of = {parameters[n]: self._units[owner] for n, owner in applied.unit_of.items()}
        open_when_read(model, unit_of, leaf_of)
        # id of a leaf -> the units that hold it, innermost first: a unit closes before its parent.
        self._units_of: dict[int, list[Unit]] = {}
        for unit in reversed(self._units.values()):
            for leaf in unit.trained:
                self._units_of.setdefault(leaf, []).append(unit)
        model.register_forward_pre_hook(ModuleHook(self._enter_forward), prepend=True)
        self._hook_gradients({n: leaf_of[p] for n, p in parameters.items() if p.requires_grad})
        if applied.sharded_between_units:
            shards = {n: p for n, p in parameters.items() if p is not leaf_of[p]}
            self._grad_nodes += refuse_gradients(shards)

    def _hook_gradients(self, leaves: Mapping[str, Tensor]) -> None:
        """Hook each leaf's AccumulateGrad node, which runs after all hooks on the leaf itself.

        So a user's hook may change a gradient, whether that hook was registered before ours or
        after. The strategy sees the final `.grad`.
        """
        # We keep the nodes in a list: a parameter does not keep its AccumulateGrad node alive.
        self._grad_nodes = [get_gradient_edge(leaf).node for leaf in leaves.values()]
        for (name, leaf), node in zip(leaves.items(), self._grad_nodes, strict=True):
            node.register_prehook(weak_hook(self._before_accumulation, name))
            node.register_hook(weak_hook(self._after_gradient, name, leaf))

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Backwards inside the block belong to one micro-batch. `last`: it is the step's last."""
        before = self._last, self._in_microbatch
        self._last, self._in_microbatch, self._in_step = last, True, True
        self._reopen()  # before other ranks' gradients arrive
        self.sync.microbatch(last=last)
        try:
            yield
            self._join_forward()
            self._join_backward()
        except BaseException:
            self._abort()
            raise
        finally:
            self._last, self._in_microbatch = before
            self.sync.microbatch(last=self._last)
            if last:
                self._closed |= self._touched
            self._touched = set()

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """Forward and backward of each in order. Returns the sum of their shares of the loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for i, (inputs, targets) in enumerate(microbatches):
            with self.place.at(i), self.microbatch(last=self._last and i == len(microbatches) - 1):
                output = self.model(inputs)
                share = share_of(output, loss_fn(output, targets))
                del output  # this reference would keep it alive during backward
                share.backward()
                total += share.detach()
        return total

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """Forward only. Returns the same sum."""
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for inputs, targets in microbatches:
            total += loss_fn(self.model(inputs), targets)
        return total

    def timeline(self) -> list[list[Any]]:
        return []

    def _join_forward(self) -> None:
        """Join the all-gathers of other ranks' forwards, if this rank had no rows to forward."""
        forward_ran, self._saver.forward_ran = self._saver.forward_ran, False
        if self._saver.has_shards and not (forward_ran or self._touched):
            root = self._units[ROOT]
            with self.comm.label("forward", unit=""), torch.enable_grad():
                root.open(Phase.FORWARD)
                root.close(Phase.FORWARD)
            root.expects_backward = True

    def _join_backward(self) -> None:
        """Join the collectives of other ranks' backward, if this rank's loss needs no gradient."""
        root = self._units.get(ROOT)
        if root is not None and root.expects_backward:
            root.expects_backward = False
            with self.comm.label("backward", unit=""):
                root.open(Phase.BACKWARD)
                self.sync.grads_ready((), last=self._last)
                root.close(Phase.BACKWARD)

    def _before_finish(self) -> None:
        if not (self._in_step or self.has_gradients):
            self._join_forward()
        self._in_step = self._saver.forward_ran = False
        self._join_backward()
        for unit in reversed(self._units.values()):
            unit.close(Phase.BACKWARD)

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        if not in_backward():
            self.comm.begin(self.place.step + torch.is_grad_enabled(), "forward")
            if any(unit.is_open for unit in self._units.values()):  # the last step was aborted
                self._abort()

    def _abort(self) -> None:
        with self.comm.label("forget", unit=""):  # drops gradients not in `.grad` yet
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
        if not leaf.requires_grad:  # frozen after its forward: it gets no gradient
            return
        self.has_gradients = True
        (self._touched if self._in_microbatch else self._closed).add(name)
        self.sync.grads_ready([name], last=self._last)
        for unit in self._units_of.get(id(leaf), []):
            unit.gradient(leaf)
