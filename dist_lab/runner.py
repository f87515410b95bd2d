"""The plain runner: forward, backward, and telling the strategy what has happened.

It is the only place (with the pipeline's runner) that registers hooks, so the order of events in a
step is read off here:

    model(x)        for each unit in turn: unshard, compute, reshard        phase "forward"
    loss.backward() for each unit, last first: unshard, gradients ready     phase "backward"
                    (each told to the strategy), reshard

The model itself is a unit, too: named "", open from the first moment of a forward or backward to
the last.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dist_lab.comm.wire import Wire
from dist_lab.errors import UserError
from dist_lab.hooks import ModuleHook, tensors_in
from dist_lab.loss import LossFn, Pair, one_number
from dist_lab.parallel.sync import Chain, Phase
from dist_lab.step import Step


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
            node.register_prehook(_weakly(self._before_accumulation, name))
            after = _weakly(self._after_gradient, name)
            self._trained[name].register_post_accumulate_grad_hook(after)
        model.register_forward_pre_hook(ModuleHook(self._enter_forward))
        # After the gradients' own hooks: a unit is returned when its last gradient has been told.
        leaf_of = {p: self._trained[name] for name, p in trained.items()}
        self._units = [
            _Unit(name, module, [leaf_of[p] for p in module.parameters() if p in leaf_of], self)
            for name, module in units.items()
        ]
        if sharded_between_units:
            self._refuse_parts(units)

    def _refuse_parts(self, units: Mapping[str, nn.Module]) -> None:
        """See that whatever computes with parameters lies in a unit that is open, the innermost."""
        for name, parameter in self._parameters.items():
            if parameter is not self._trained[name]:
                parameter.register_hook(partial(_refuse_gradient, name))
        for unit in self._units:
            unit.must_see_outputs = True
        inside = {unit.name: set(units[unit.name].modules()) for unit in self._units}
        for name, module in self.model.named_modules():
            if any(p is not None for p in module._parameters.values()):
                around = [unit for unit in self._units if module in inside[unit.name]]
                known = {units[unit.name] for unit in around}
                innermost = [u for u in around if inside[u.name] & known == {units[u.name]}]
                check = partial(_refuse_outside, name, innermost)
                module.register_forward_pre_hook(ModuleHook(check, of_copy=_refuse_copy))

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
        self.has_gradients = True
        (self._touched if self._in_block else self._closed).add(name)
        self.sync.grads_ready([name], last=self._last)


class _Unit:
    """Tells a strategy when one unit is about to be used and has been used, in both directions.

    [Note: when a unit is open] It is unsharded when a forward or backward reaches it and finds it
    closed. It is resharded when a forward leaves it, unless backward is recomputing that forward;
    when the last of its gradients is in, and nothing frozen is needed on the way to its inputs;
    when backward has left it by the inputs of its forward, because a frozen unit has no last
    gradient and an unused parameter never gets one; and at the end of a backward in any case.
    """

    def __init__(
        self, name: str, module: nn.Module, leaves: Sequence[Tensor], runner: Runner
    ) -> None:
        self.name, self.sync, self.wire = name, runner.sync, runner.wire
        self.trained = {id(leaf) for leaf in leaves}
        self.partly_frozen = any(not p.requires_grad for p in module.parameters())
        self.is_open = self.must_see_outputs = False
        self.missing: set[int] = set()  # gradients that this backward still has to bring
        self.outer = ""  # the unit that this one was called from
        self.backward = -1  # the backward whose end will be told
        self.entered: set[_Visit] = set()  # forwards that this backward is in the middle of
        self.visit = _Visit()
        module.register_forward_pre_hook(ModuleHook(self._enter_forward), with_kwargs=True)
        module.register_forward_hook(ModuleHook(self._leave_forward), always_call=True)
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(_weakly(self._gradient))

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
            self.visit = visit = _Visit()
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

    def _enter_backward(self, visit: "_Visit") -> None:
        self.wire.phase = "backward"
        self.wire.unit = self.name or self.wire.unit  # the model's output is often a unit's, too
        if self.backward != _backward_number():
            self.backward, self.missing = _backward_number(), set(self.trained)
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if visit.inputs > 0:
            self.entered.add(visit)
        self.open(Phase.BACKWARD)

    def _leave_backward(self, visit: "_Visit") -> None:
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


def _refuse_outside(name: str, around: Sequence[_Unit], module: nn.Module, args: Any) -> None:
    if not any(unit.is_open for unit in around):
        raise UserError(
            f"{name} was called by itself, and holds this rank's part of its parameters; call the "
            f"model, or parallelize it with units=[{name!r}]"
        )


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise UserError(
        f"{name} was used outside of its unit, where it is this rank's part alone: the gradient "
        "would be lost; use it in the forward of what holds it"
    )


def _refuse_copy(module: nn.Module, args: Any) -> None:
    raise UserError(
        f"a copy of a model that is split holds this rank's part of {type(module).__name__}; load "
        "job.full_state_dict() into a fresh model"
    )


class _Visit:
    """One forward of one unit: how many of its inputs backward has still to reach."""

    inputs = 0


def _weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
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


def _backward_number() -> int:
    """Which backward this thread is in the middle of; -1 outside of any."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    return _backward_number() != -1
