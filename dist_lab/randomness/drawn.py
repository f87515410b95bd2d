"""Refuses random numbers that are not exact, with exact dropout or a fixed order of additions.

Any form of dropout may hide in a forward: `dropout_p` of scaled_dot_product_attention, F.dropout,
noise. It asks torch's or Python's generator, so its mask differs in every layout. Its name does not
tell. So the first forward in training compares the state of the generators before and after each
module, and the error names the innermost one. Later forwards, 2, 4, 8 and so on, compare it around
the model only: a layer may draw in some steps only.
"""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_lab.errors import UserError
from dist_lab.step.hooks import ModuleHook
from dist_lab.torch_private import backward_number


class RefuseDraws:
    """Watches the forwards of a model, or of one stage of a pipeline.

    Args:
        names: module -> its name, for the modules inside.
    """

    def __init__(self, root: nn.Module, names: Mapping[nn.Module, str]) -> None:
        self.root, self.names, self.forwards = root, names, 0
        self.states: list[list[object]] = []  # at the start of each running forward
        self.inner: list[RemovableHandle] = []
        for module in root.modules():
            if module is not root and module in names:
                self.inner += self._hook(module)
        self._hook(root)

    def _hook(self, module: nn.Module) -> list[RemovableHandle]:
        enter, leave = ModuleHook(self._enter), ModuleHook(self._leave)
        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module is self.root:
            self.states.clear()  # the last forward may have raised
            if self.root.training and backward_number() == -1:
                self.forwards += 1
        self.states.append(_states() if self._is_due() else [])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        before = self.states.pop() if self.states else []
        if before and self._is_due() and _states() != before:
            name = self.names.get(module) or "the model"
            raise UserError(
                f"{name} ({type(module).__name__}) draws random numbers in its forward, by dropout "
                "inside attention (dropout_p), F.dropout or other noise, which differ in every "
                'layout; set that to 0, use an nn.Dropout module with dropout="exact", or leave '
                "out exact dropout and reduce_order"
            )
        if module is self.root and self.root.training:
            for handle in self.inner:
                handle.remove()
            self.inner.clear()

    def _is_due(self) -> bool:
        often = self.forwards & (self.forwards - 1) == 0
        return self.root.training and often and backward_number() == -1


def _states() -> list[object]:
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return states
