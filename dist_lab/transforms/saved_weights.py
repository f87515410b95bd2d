"""Rounded weights are not saved for backward where parameters are not: they are rounded again.

    forward     W is unsharded;  W' = round(W);  y = x W'^T        saved: W, by name; its range
    between     W is resharded;  W' is freed
    backward    W is unsharded again;  dx needs W': round(W)

Autograd saves W', which dx needs. Under fsdp the rounded weights of all units would then be in
memory between forward and backward, as many bytes as all parameters, unsharded. So here the
operation saves the parameter instead, which fsdp saves by name (step/saved.py), and backward rounds
it once more. The range is kept, so nothing is sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dist_lab.torch_private import saved_tensors_hooks_around, storage_key

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SavedRounded:
    """A rounded weight, or a view of it, that an operation saved for backward.

    packed: its parameter, as the hooks around ours have saved it
    round: parameter -> rounded weight
    size, stride, offset: of the view
    """

    packed: Any
    round: Round
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class RoundAgain:
    """Hooks on saved tensors, from `start` to `stop`."""

    def __init__(self) -> None:
        self._hooks: saved_tensors_hooks | None = None

    def start(self, weights: Sequence[tuple[Tensor, Tensor, Round]]) -> None:
        """Save parameters in place of these rounded weights. Nothing is done if no hooks save them
        by name: in a forward without gradients.

        Args:
            weights: each parameter, the rounded weight, and the function from one to the other.
        """
        around = saved_tensors_hooks_around()
        if around is None or not torch.is_grad_enabled() or not weights:
            return
        pack_outside, unpack_outside = around
        packed = {storage_key(rounded): (pack_outside(w), again) for w, rounded, again in weights}

        def pack(tensor: Tensor) -> Any:
            if (found := packed.get(storage_key(tensor))) is None:
                return pack_outside(tensor)
            size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
            return SavedRounded(*found, size, stride, offset)

        def unpack(saved: Any) -> Any:
            if not isinstance(saved, SavedRounded):
                return unpack_outside(saved)
            with torch.no_grad():
                rounded = saved.round(unpack_outside(saved.packed))
            return rounded.as_strided(saved.size, saved.stride, saved.offset)

        self._hooks = saved_tensors_hooks(pack, unpack)
        self._hooks.__enter__()

    def stop(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
