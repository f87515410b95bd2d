"""The plain runner: forward, backward, and telling the strategy what has happened.

It is the only place (with the pipeline's runner) that registers hooks, so the order of events in a
step is read off here:

    model(x)        for each unit in turn: unshard, compute, reshard        phase "forward"
    loss.backward() for each unit, last first: unshard, gradients ready     phase "backward"
                    (each told to the strategy), reshard
    finish()        whatever is still owed                                  phase "finish"
    after_step()    what the new weights owe                                phase "after_step"

[Note: sums do not forgive] Gradients of micro-batches and ranks add up (see parallel/sync.py). A
backward onto gradients that were already summed over ranks would count the others' share again, and
an average would have hidden it. So each gradient is closed once the last micro-batch is in, and
opens again when it is cleared; a backward on a closed one is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.wire import Wire
from dist_lab.errors import UserError
from dist_lab.parallel.sync import Sync


class Runner:
    """Drives one model's forward and backward under one Sync.

    Args:
        units: name -> module: what is borrowed and returned together. The root is not a unit.
    """

    def __init__(
        self, model: nn.Module, sync: Sync, wire: Wire, units: Mapping[str, nn.Module]
    ) -> None:
        self.model, self.sync, self.wire, self.units = model, sync, wire, units
        self.last = True  # outside microbatch(), every backward is the last one
        self.has_gradients = False  # since the last finish()
        self._closed: set[str] = set()  # gradients that hold their last micro-batch
        model.register_forward_pre_hook(self._enter_forward)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._before_gradient(name, parameter))
                parameter.register_post_accumulate_grad_hook(self._after_gradient(name))
        # After the gradients' own hooks: a unit is returned when its last gradient has been told.
        self._hooks = [_UnitHooks(name, module, sync, wire) for name, module in units.items()]

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Backwards inside the block belong to one micro-batch; `last` says whether more follow."""
        before, self.last = self.last, last
        try:
            yield
        finally:
            self.last = before

    def finish(self) -> None:
        """Raises UserError if there was no backward since the last finish()."""
        if not self.has_gradients:
            raise UserError(
                "finish() without a backward since the last one: the gradients are summed over "
                "the ranks already, a second sum would multiply them; call finish() once a step"
            )
        self.has_gradients = False
        for hooks in self._hooks:
            hooks.end_backward()
        with self.wire.during("finish"):
            self.sync.finish()
        self._closed = set(dict(self.model.named_parameters()))

    def after_step(self) -> None:
        with self.wire.during("after_step"):
            self.sync.after_step()

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        self.wire.phase = "forward"

    def _before_gradient(self, name: str, parameter: nn.Parameter) -> Any:
        def check(gradient: Tensor) -> None:
            self.wire.phase = "backward"
            if name in self._closed:
                if parameter.grad is not None and parameter.grad.any():
                    raise UserError(
                        f"backward on gradients that hold their last micro-batch ({name}): call "
                        "optimizer.zero_grad() after the step, or wrap all micro-batches but the "
                        "last in job.microbatch(last=False)"
                    )
                self._closed.discard(name)

        return check

    def _after_gradient(self, name: str) -> Any:
        def ready(parameter: Tensor) -> None:
            self.has_gradients = True
            if self.last:
                self._closed.add(name)
            self.sync.grads_ready([name], last=self.last)

        return ready


class _UnitHooks:
    """Tells a strategy when one unit is about to be used and has been used, in both directions."""

    def __init__(self, name: str, module: nn.Module, sync: Sync, wire: Wire) -> None:
        self.name, self.sync, self.wire = name, sync, wire
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.missing = 0  # gradients that this backward still has to bring
        module.register_forward_pre_hook(self._enter_forward)
        module.register_forward_hook(self._leave_forward, always_call=True)
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._gradient)

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        self.wire.unit = self.name
        self.sync.unshard(self.name)

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.sync.reshard(self.name)
        self.wire.unit = ""
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._enter_backward)

    def _enter_backward(self, gradient: Tensor) -> None:
        self.wire.phase, self.wire.unit = "backward", self.name
        if self.missing == 0:
            self.missing = len(self.trained)
            self.sync.unshard(self.name)

    def _gradient(self, parameter: Tensor) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.sync.reshard(self.name)
            self.wire.unit = ""

    def end_backward(self) -> None:
        """Return a unit of which some parameters got no gradient."""
        if self.missing > 0:
            self.missing = 0
            self.sync.reshard(self.name)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, whatever it is made of."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute in a narrower dtype, on parameters that stay as they are.

    [Note: master weights] The parameters in the module are the float32 masters. While the root's
    forward runs, each is shadowed by a copy in `dtype`, made by a differentiable cast: compute
    reads the copy, and backward casts the gradient back and adds it up in float32. So every
    strategy, norm and optimizer sees float32 and needs to know nothing. Floating-point inputs are
    cast too; outputs stay in `dtype`. Micikevicius et al. 2018 (arXiv:1710.03740).

    A submodule called on its own, outside the root's forward, computes on the masters.
    """

    def shadow(
        root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        copies: dict[nn.Parameter, Tensor] = {}  # a tied parameter is cast once
        for module in root.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    if parameter not in copies:
                        copies[parameter] = parameter.to(dtype)
                    module.__dict__[name] = copies[parameter]  # found before _parameters is
        return (
            tuple(_cast(arg, dtype) for arg in args),
            {name: _cast(arg, dtype) for name, arg in kwargs.items()},
        )

    def reveal(root: nn.Module, args: Any, output: Any) -> None:
        for module in root.modules():
            for name in module._parameters:
                module.__dict__.pop(name, None)

    model.register_forward_pre_hook(shadow, with_kwargs=True)
    model.register_forward_hook(reveal, always_call=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
