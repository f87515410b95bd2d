"""What forward saves of a parameter for backward: its name, so that its memory may come and go.

    forward     W is unsharded; an operation saves W, or a view of it       kept: (W, how it lies)
    between     W is sharded again; nothing of it is alive
    backward    the operation asks for what it saved: its unit is opened    given: W as it is now

[Note: every way into a unit] Backward may reach a unit by its outputs, and by other ways: by a
tensor that the unit has kept on itself, one inside an object that it returned, one that was written
to in place since, or once more in a second derivative. But it can do nothing with a parameter
without asking for what forward saved of it. So that is where a unit is opened, whatever the way.

Where somebody else's hooks on saved tensors are in force, such as those of activation checkpoints,
ours stay away: what they keep is kept as it is, and what they compute again opens the unit itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dist_lab.errors import UserError
from dist_lab.torch_private import backward_number, saved_tensors_hooks_around, storage_key


@dataclass(frozen=True)
class Saved:
    """A parameter, or a view of it, as forward saved it.

    Attributes:
        leaf: the tensor that is the parameter to autograd, whatever memory it has at the moment.
        reopen: opens the unit that it was saved in.
        size, stride, offset: of the view.
    """

    leaf: Tensor
    reopen: Callable[[], None]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedByName:
    """Saves parameters of the units that are being computed by name, and all else as it is."""

    def __init__(self) -> None:
        self._memory: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._inside: list[object] = []  # units whose forwards are under way, outermost first
        self._hooks: saved_tensors_hooks | None = None
        self._depth = 0  # of the unit that put the hooks in force

    def enter(self, unit: object) -> None:
        """The forward of a unit begins."""
        self._inside.append(unit)
        foreign = saved_tensors_hooks_around() is not None or backward_number() != -1
        if self._hooks is None and torch.is_grad_enabled() and not foreign:
            self._depth = len(self._inside)
            self._hooks = saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()

    def leave(self, unit: object) -> bool:
        """The forward of a unit is over. Returns whether it had begun: an earlier hook may fail."""
        if not self._inside or self._inside[-1] is not unit:
            return False
        if self._hooks is not None and len(self._inside) == self._depth:
            self._hooks.__exit__()
            self._hooks = None
            self._memory.clear()
        self._inside.pop()
        return True

    def computing(self, unit: object) -> bool:
        """Whether a forward of this unit is under way."""
        return any(inside is unit for inside in self._inside)

    def opened(self, leaves: Iterable[Tensor], reopen: Callable[[], None]) -> None:
        """These leaves have their memory now. `reopen` gives it to them again."""
        if self._hooks is not None:
            self._memory |= {storage_key(leaf): (leaf, reopen) for leaf in leaves}

    def _pack(self, tensor: Tensor) -> Tensor | Saved:
        key = storage_key(tensor)
        owner = self._memory.get(key)
        # It may be of earlier memory, at an address that was used again.
        if owner is None or storage_key(owner[0]) != key:
            return tensor
        return Saved(*owner, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | Saved) -> Any:
    if isinstance(saved, Tensor):
        return saved
    if backward_number() == -1:
        raise UserError("what backward has saved of a sharded parameter can be seen in backward")
    saved.reopen()
    return saved.leaf.detach().as_strided(saved.size, saved.stride, saved.offset)
