"""Compute in a narrower dtype, on parameters that stay as they are.

[Note: master weights] The parameters in the module are the float32 masters. While a forward runs,
each is shadowed by a copy in the narrower dtype, made by a differentiable cast: compute reads the
copy, and backward casts the gradient back and adds it up in float32. So every strategy, norm and
optimizer sees float32 and needs to know nothing. Micikevicius et al. 2018 (arXiv:1710.03740).

Floating-point inputs of the outermost call are cast, outputs stay narrow, buffers stay as they are.
Normalization with running statistics keeps its float32 weights, as its statistics are float32 too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dist_lab.errors import UserError
from dist_lab.hooks import ModuleHook


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every forward of the model, or of a module in it, compute in `dtype`.

    Raises:
        UserError: a recurrent layer, which keeps its weights where no shadow reaches.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(f"{name} is recurrent and computes in its own dtype alone: use float32")
    shadows = Shadows(dtype)
    for module in model.modules():
        module.register_forward_pre_hook(ModuleHook(shadows.enter), with_kwargs=True)
        module.register_forward_hook(ModuleHook(shadows.leave), always_call=True)


class Shadows:
    """Puts the copies in place for the outermost forward, whichever module's that is.

    Usually it is the root's. Under activation recomputation it is a block's, in the middle of
    backward; called by itself, a submodule's.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.depth = dtype, 0

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        self.depth += 1
        if self.depth > 1:
            return None
        copies: dict[nn.Parameter, Tensor] = {}  # a tied parameter is cast once
        for part in module.modules():
            if not isinstance(part, _NormBase):
                for name, parameter in part._parameters.items():
                    if parameter is not None and parameter.is_floating_point():
                        if parameter not in copies:
                            copies[parameter] = parameter.to(self.dtype)
                        part.__dict__[name] = copies[parameter]  # found before _parameters is
        return self._cast(args), self._cast(kwargs)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            for part in module.modules():
                for name in part._parameters:
                    part.__dict__.pop(name, None)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {key: self._cast(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cast(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: self._cast(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value
