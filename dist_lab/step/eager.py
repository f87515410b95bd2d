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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dist_lab.comm.context import Wire
from dist_lab.errors import UserError
from dist_lab.loss import LossFn, Pair, one_number
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.order import Step
from dist_lab.step.protocol import Chain, Phase
from dist_lab.step.units import Unit, in_backward, refuse_outside, weakly


class Runner(Step):
    """Drives one model's forward and backward under one Sync.

    Args:
        units: name -> module: what is borrowed and returned together; an outer one before those
            within it.
        leaves: name -> the tensor that backward reaches, where it is not the parameter itself.
        sharded_between_units: outside of units the model holds shards alone, and computes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        sync: Chain,
        wire: Wire,
        units: Mapping[str, nn.Module],
        leaves: Mapping[str, Tensor] = {},
        *,
        sharded_between_units: bool = False,
    ) -> None:
        super().__init__(model, sync, wire)
        self._last = True  # outside microbatch(), every backward is the last one
        self._in_block = False
        self._touched: set[str] = set()  # gradients of the micro-batch that is under way
        trained = self._parameters
        self._trained: dict[str, Tensor] = {n: leaves.get(n, p) for n, p in trained.items()}
        # Kept here because a parameter does not keep the node that adds to its gradient alive.
        self._accumulators = [get_gradient_edge(p).node for p in self._trained.values()]
        for name, node in zip(self._trained, self._accumulators, strict=True):
            node.register_prehook(weakly(self._before_accumulation, name))
            after = weakly(self._after_gradient, name)
            self._trained[name].register_post_accumulate_grad_hook(after)
        model.register_forward_pre_hook(ModuleHook(self._enter_forward))
        # After the gradients' own hooks: a unit is returned when its last gradient has been told.
        leaf_of = {p: self._trained[name] for name, p in trained.items()}
        self._units = [Unit(name, m, leaf_of, sync, wire) for name, m in units.items()]
        if sharded_between_units:
            for name, parameter in trained.items():
                if parameter is not self._trained[name]:
                    parameter.register_hook(partial(_refuse_gradient, name))
            refuse_outside(model, self._units, units)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Backwards inside the block belong to one micro-batch; `last` says whether more follow."""
        before = self._last, self._in_block
        self._last, self._in_block = last, True
        self.sync.microbatch(last=last)
        try:
            yield
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
        total = torch.zeros((), dtype=torch.float64, device=self.wire.device)
        for i, (inputs, targets) in enumerate(microbatches):
            with self.microbatch(last=self._last and i == len(microbatches) - 1):
                share = one_number(loss_fn(self.model(inputs), targets))
                share.backward()
                total += share.detach()
        return total

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """The same by forward alone."""
        total = torch.zeros((), dtype=torch.float64, device=self.wire.device)
        for inputs, targets in microbatches:
            total += loss_fn(self.model(inputs), targets)
        return total

    def timeline(self) -> list[list[Any]]:
        return []

    def _before_finish(self) -> None:
        for unit in self._units:
            unit.close(Phase.BACKWARD)

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        if not in_backward():
            self.wire.phase, self.wire.unit = "forward", ""
            if any(unit.is_open for unit in self._units):  # by an exception in the last backward
                self._forget()

    def _forget(self) -> None:
        with self.wire.during("forget", unit=""):  # nothing is summed any more
            for unit in self._units:
                unit.close(Phase.ABORT)
            self.sync.forget()

    def _before_accumulation(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        self.wire.phase = "backward"
        if not self.has_gradients:  # what has been cleared since finish() is open, used here or not
            self._closed = {closed for closed in self._closed if self._holds_gradient(closed)}
        self._refuse_closed(name)

    def _after_gradient(self, name: str, parameter: Tensor) -> None:
        if not parameter.requires_grad:  # frozen since its forward: backward has passed it by
            return
        self.has_gradients = True
        (self._touched if self._in_block else self._closed).add(name)
        self.sync.grads_ready([name], last=self._last)


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise UserError(
        f"{name} was used outside of its unit, where it is this rank's part alone: the gradient "
        "would be lost; use it in the forward of what holds it"
    )
