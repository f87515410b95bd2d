"""Mixed precision: compute in a lower precision, with float32 master weights.

[Note: master weights] The parameters in the module are the float32 master weights. While a forward
runs, the module's `__dict__` has a low-precision copy of each, made by a differentiable cast. The
forward reads the copy; backward casts the gradient back and accumulates it in float32. So every
strategy, norm and optimizer sees float32 only. Micikevicius et al. 2018 (arXiv:1710.03740).

Floating-point inputs of the outermost call are cast. Outputs stay in low precision, buffers keep
their dtype. Normalization with running statistics keeps float32 weights, like its statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, map_tensors
from dist_lab.torch_private import StatisticsNorm, of_plain_tensors
from dist_lab.transforms.operands import ShownTensors
from dist_lab.transforms.recompute import CheckpointedForward


def compute_in(
    model: nn.Module, dtype: torch.dtype, *, parameters: bool = True, inputs: bool = True
) -> None:
    """Make every forward of the model, or of a module in it, compute in `dtype`.

    Args:
        parameters: cast parameters; False if the strategy unshards them in that dtype already.
        inputs: cast inputs; False if they come from an earlier stage, in the right dtype.

    Raises:
        UserError: the model has a recurrent layer, which stores its weights in a second place.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(f"{name} is recurrent and computes only in its own dtype: use float32")
    view = LowPrecisionView(dtype, parameters, inputs)
    for module in model.modules():
        enter = ModuleHook(view.enter)
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(ModuleHook(view.leave), always_call=True)
        if isinstance(module.forward, CheckpointedForward):  # in backward it runs without hooks
            module.forward.around.append(lambda unit: partial(view.around, unit))


class LowPrecisionView:
    """Shows low-precision copies of the parameters during the outermost forward.

    The outermost forward is usually the model's. In backward it is the recomputed unit's, and if a
    submodule is called directly, it is the submodule's.
    """

    def __init__(self, dtype: torch.dtype, parameters: bool, inputs: bool) -> None:
        self.dtype, self.parameters, self.inputs = dtype, parameters, inputs
        self.running: list[nn.Module] = []  # modules in the middle of forward, outermost first
        self.shown = ShownTensors()

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        self.running.append(module)
        if len(self.running) > 1:
            return None
        self._show_copies(module)
        return (self._cast(args), self._cast(kwargs)) if self.inputs else None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Called after every exception, also after that of a hook that runs before `enter`.
        if self.running and self.running[-1] is module:
            self.running.pop()
            if not self.running:
                self.shown.hide()

    @contextmanager
    def around(self, unit: nn.Module) -> Iterator[None]:
        """Surrounds the second forward of a unit. Its inputs are saved, and not cast again."""
        self.running.append(unit)
        if len(self.running) == 1:
            self._show_copies(unit)
        try:
            yield
        finally:
            self.leave(unit, (), None)

    def _show_copies(self, module: nn.Module) -> None:
        if not self.parameters:
            return
        copies: dict[Tensor, Tensor] = {}  # a tied parameter is cast once
        for submodule in module.modules():
            if not isinstance(submodule, StatisticsNorm):
                for name in submodule._parameters:
                    parameter = getattr(submodule, name)  # unsharded, if the strategy shards it
                    if parameter is not None and parameter.is_floating_point():
                        if parameter not in copies:
                            # Guards are off: the copy of a guarded parameter is a plain tensor.
                            copies[parameter] = of_plain_tensors(parameter.to, self.dtype)
                        self.shown.show(submodule, name, copies[parameter])

    def _cast(self, value: Any) -> Any:
        return map_tensors(lambda t: t.to(self.dtype) if t.is_floating_point() else t, value)
