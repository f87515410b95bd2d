"""Saved tensors: parameters are saved by name, so that their memory can be freed until backward.

    forward     W is unsharded; an operation saves W, or a view of it      saved: (W, the view)
    between     W is resharded; its memory is free
    backward    the operation unpacks W: its unit is unsharded             unpacked: W as it is now

[Note: every way into a unit] Backward usually reaches a unit through its outputs. It may also reach
it through a tensor that the unit stored as an attribute, a tensor inside an object that it returned
or one that was written to in place later, or again in a second derivative. But backward always
unpacks a saved tensor before it uses a parameter. So unpacking unshards the unit in every case.

While other hooks on saved tensors are active, such as those of activation checkpointing, ours are
off: the other hooks save the tensor itself, or recompute it in a forward that unshards the unit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dist_lab.errors import UserError
from dist_lab.torch_private import backward_number, saved_tensors_hooks_around, storage_key


class Visit:
    """One forward call of one unit.

    Attributes:
        outer: the unit that called this one, and the visit of that unit; None at the top.
        inputs: the number of its inputs that backward has not reached yet.
        saved: the forward has saved parameters of the unit for backward.
    """

    outer: "tuple[UnitLike, Visit] | None" = None
    inputs = 0
    saved = False


class UnitLike(Protocol):
    """The part of `units.Unit` that this file uses."""

    visit: Visit

    def enter_backward(self, visit: Visit) -> None: ...


@dataclass(frozen=True)
class SavedParameter:
    """A parameter, or a view of it, that a unit's forward saved for backward.

    Attributes:
        leaf: the autograd leaf. Its storage is empty while the unit is resharded.
        size, stride, offset: of the view.
    """

    leaf: Tensor
    unit: UnitLike
    visit: Visit
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedByName:
    """Saves the parameters of the units that are running by name, and other tensors as they are.

    Args:
        has_shards: units are resharded after use. If not, no hooks are set, at no cost.
    """

    def __init__(self, *, has_shards: bool) -> None:
        self.has_shards = has_shards
        self._by_storage: dict[int, tuple[Tensor, UnitLike, Visit]] = {}
        self._running: list[UnitLike] = []  # units in the middle of their forward, outermost first
        self._hooks: saved_tensors_hooks | None = None
        self.forward_ran = False  # with gradients; the runner resets it
        self._depth = 0  # the length of `_running` when the hooks were set

    def enter(self, unit: UnitLike) -> None:
        """The forward of a unit begins."""
        for outer in self._running[-1:]:
            unit.visit.outer = (outer, outer.visit)
        self._running.append(unit)
        self.forward_ran = self.forward_ran or torch.is_grad_enabled()
        if not self.has_shards or self._hooks is not None or not torch.is_grad_enabled():
            return
        if saved_tensors_hooks_around() is None and backward_number() == -1:
            hooks = saved_tensors_hooks(self._pack, _unpack)
            try:
                hooks.__enter__()
            except RuntimeError as error:
                raise UserError(
                    "torch.func.grad and similar transforms allow no hooks on saved tensors, which "
                    "unshard parameters in backward; use dp, ddp or zero2"
                ) from error
            self._depth, self._hooks = len(self._running), hooks

    def leave(self, unit: UnitLike) -> bool:
        """The forward of a unit is over. Returns False if `enter` was not called: another hook of
        the module may have raised an exception first.
        """
        if not self._running or self._running[-1] is not unit:
            return False
        if self._hooks is not None and len(self._running) == self._depth:
            self._hooks.__exit__()
            self._hooks = None
            self._by_storage.clear()
        self._running.pop()
        return True

    @property
    def innermost(self) -> Any:
        """The innermost unit whose forward is running, or None."""
        return self._running[-1] if self._running else None

    def is_running(self, unit: UnitLike) -> bool:
        """Whether a forward of this unit is running."""
        return any(running is unit for running in self._running)

    def watch_storages(self, leaves: Iterable[Tensor], unit: UnitLike, visit: Visit) -> None:
        """Save these leaves by name from now on: they have memory only while the unit is open."""
        if self._hooks is not None:
            self._by_storage |= {storage_key(leaf): (leaf, unit, visit) for leaf in leaves}

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int] | SavedParameter:
        key = storage_key(tensor)
        entry = self._by_storage.get(key)
        # The entry may be out of date: its memory was freed, and the address used again.
        if entry is None or storage_key(entry[0]) != key:
            # Detached: an operation may save its own output, whose grad_fn is the operation. This
            # reference cycle would be freed only by a backward. Autograd restores the grad_fn, but
            # we must check for in-place writes in between ourselves.
            return tensor if tensor.grad_fn is None else tensor.detach(), tensor._version
        _, _, visit = entry
        visit.saved = True
        return SavedParameter(*entry, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: tuple[Tensor, int] | SavedParameter) -> Any:
    if isinstance(saved, tuple):
        tensor, version = saved
        if tensor._version != version:
            raise UserError(
                f"a tensor of shape {tuple(tensor.shape)} that backward needs was written to in "
                "place after forward had saved it; write to a clone() of it"
            )
        return tensor
    if backward_number() == -1:
        raise UserError(
            "a saved tensor of a sharded parameter can be read only in backward: at other times it "
            "has no memory"
        )
    saved.unit.enter_backward(saved.visit)
    return saved.leaf.detach().as_strided(saved.size, saved.stride, saved.offset)
