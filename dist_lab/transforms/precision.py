"""Compute in a narrower dtype, on parameters that stay as they are.

[Note: master weights] The parameters in the module are the float32 masters. While a forward runs,
each is shadowed by a copy in the narrower dtype, made by a differentiable cast: compute reads the
copy, and backward casts the gradient back and adds it up in float32. So every strategy, norm and
optimizer sees float32 and needs to know nothing. Micikevicius et al. 2018 (arXiv:1710.03740).

Floating-point inputs of the outermost call are cast, outputs stay narrow, buffers stay as they are.
Normalization with running statistics keeps its float32 weights, as its statistics are float32 too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook, map_tensors
from dist_lab.torch_private import StatisticsNorm, of_plain_tensors
from dist_lab.transforms.recompute import CheckpointedForward


def compute_in(
    model: nn.Module, dtype: torch.dtype, *, parameters: bool = True, inputs: bool = True
) -> None:
    """Make every forward of the model, or of a module in it, compute in `dtype`.

    Args:
        parameters: False where the strategy lends them in that dtype already: inputs alone.
        inputs: False where they come from within the model, in the dtype that they have there.

    Raises:
        UserError: a recurrent layer, which keeps its weights where no shadow reaches.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(f"{name} is recurrent and computes in its own dtype alone: use float32")
    shadows = LowPrecisionView(dtype, parameters, inputs)
    for module in model.modules():
        enter = ModuleHook(shadows.enter)
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(ModuleHook(shadows.leave), always_call=True)
        if isinstance(module.forward, CheckpointedForward):  # without its hooks, in backward
            module.forward.around.append(shadows.around)


class LowPrecisionView:
    """Puts the copies in place for the outermost forward, whichever module's that is.

    Usually it is the root's. In backward it is that of a unit which recomputes; called by itself, a
    submodule's.
    """

    def __init__(self, dtype: torch.dtype, parameters: bool, inputs: bool) -> None:
        self.dtype, self.parameters, self.inputs = dtype, parameters, inputs
        self.inside: list[nn.Module] = []  # whose forwards are under way, outermost first
        self.shadowed: list[tuple[nn.Module, str, Tensor | None]] = []  # and what was there

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        self.inside.append(module)
        if len(self.inside) > 1:
            return None
        self._put(module)
        return (self._cast(args), self._cast(kwargs)) if self.inputs else None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # It is told of every exception, also one of a hook that came before `enter`.
        if self.inside and self.inside[-1] is module:
            self.inside.pop()
            if not self.inside:
                self._take_away()

    @contextmanager
    def around(self, unit: nn.Module) -> Iterator[None]:
        """The second forward of a unit. Its inputs are what the first one had, cast or not."""
        self.inside.append(unit)
        if len(self.inside) == 1:
            self._put(unit)
        try:
            yield
        finally:
            self.leave(unit, (), None)

    def _put(self, module: nn.Module) -> None:
        if not self.parameters:
            return
        copies: dict[Tensor, Tensor] = {}  # a tied parameter is cast once
        for part in module.modules():
            if not isinstance(part, StatisticsNorm):
                for name in part._parameters:
                    parameter = getattr(part, name)  # a strategy may have put a whole before a part
                    if parameter is not None and parameter.is_floating_point():
                        if parameter not in copies:
                            # To users a part may refuse what is done with the copy.
                            copies[parameter] = of_plain_tensors(parameter.to, self.dtype)
                        self.shadowed.append((part, name, part.__dict__.get(name)))
                        part.__dict__[name] = copies[parameter]  # found before _parameters is

    def _take_away(self) -> None:
        while self.shadowed:
            part, name, before = self.shadowed.pop()
            part.__dict__.pop(name, None)
            if before is not None:
                part.__dict__[name] = before

    def _cast(self, value: Any) -> Any:
        return map_tensors(lambda t: t.to(self.dtype) if t.is_floating_point() else t, value)
