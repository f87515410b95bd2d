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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dist_lab.errors import UserError
from dist_lab.torch_private import backward_number, saved_tensors_hooks_around, storage_key


class Visit:
    """One forward of one unit.

    Attributes:
        outer: the unit that this one was called from, and which forward of that.
        inputs: how many of its inputs backward has still to reach.
        saved: whether it has saved parameters of the unit for backward.
    """

    outer: "tuple[Opens, Visit] | None" = None
    inputs = 0
    saved = False


class Opens(Protocol):
    """A unit, which backward may come to at any moment."""

    visit: Visit

    def enter_backward(self, visit: Visit) -> None: ...


@dataclass(frozen=True)
class Saved:
    """A parameter, or a view of it, as a unit's forward saved it.

    Attributes:
        leaf: the tensor that is the parameter to autograd, whatever memory it has at the moment.
        size, stride, offset: of the view.
    """

    leaf: Tensor
    unit: Opens
    visit: Visit
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedByName:
    """Saves parameters of the units that are being computed by name, and all else as it is.

    Args:
        lends: units lend memory that comes and goes. Otherwise nothing is watched, at no cost.
    """

    def __init__(self, *, lends: bool) -> None:
        self.lends = lends
        self._memory: dict[int, tuple[Tensor, Opens, Visit]] = {}
        self._inside: list[Opens] = []  # units whose forwards are under way, outermost first
        self._hooks: saved_tensors_hooks | None = None
        self.began = False  # a forward that backward may come back to, since somebody has looked
        self._depth = 0  # of the unit that put the hooks in force

    def enter(self, unit: Opens) -> None:
        """The forward of a unit begins."""
        for outer in self._inside[-1:]:
            unit.visit.outer = (outer, outer.visit)
        self._inside.append(unit)
        self.began = self.began or torch.is_grad_enabled()
        if not self.lends or self._hooks is not None or not torch.is_grad_enabled():
            return
        if saved_tensors_hooks_around() is None and backward_number() == -1:
            hooks = saved_tensors_hooks(self._pack, _unpack)
            try:
                hooks.__enter__()
            except RuntimeError as error:
                raise UserError(
                    "torch.func's grad and its like allow no hooks on what forward saves, by "
                    "which sharded parameters come back in backward; take dp, ddp or zero2"
                ) from error
            self._depth, self._hooks = len(self._inside), hooks

    def leave(self, unit: Opens) -> bool:
        """The forward of a unit is over. Returns whether it had begun: an earlier hook may fail."""
        if not self._inside or self._inside[-1] is not unit:
            return False
        if self._hooks is not None and len(self._inside) == self._depth:
            self._hooks.__exit__()
            self._hooks = None
            self._memory.clear()
        self._inside.pop()
        return True

    @property
    def innermost(self) -> Any:
        """The unit whose forward is under way, if there is one."""
        return self._inside[-1] if self._inside else None

    def computing(self, unit: Opens) -> bool:
        """Whether a forward of this unit is under way."""
        return any(inside is unit for inside in self._inside)

    def opened(self, leaves: Iterable[Tensor], unit: Opens, visit: Visit) -> None:
        """These leaves have their memory now, and whenever the unit is open."""
        if self._hooks is not None:
            self._memory |= {storage_key(leaf): (leaf, unit, visit) for leaf in leaves}

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int] | Saved:
        key = storage_key(tensor)
        owner = self._memory.get(key)
        # It may be of earlier memory, at an address that was used again.
        if owner is None or storage_key(owner[0]) != key:
            # An operation that saves its own output would hold itself by it, for ever if no
            # backward comes. Autograd puts the history back, but leaves it to us to see that
            # nobody has written to the tensor in between.
            return tensor if tensor.grad_fn is None else tensor.detach(), tensor._version
        _, _, visit = owner
        visit.saved = True
        return Saved(*owner, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: tuple[Tensor, int] | Saved) -> Any:
    if isinstance(saved, tuple):
        tensor, version = saved
        if tensor._version != version:
            raise UserError(
                f"a tensor of shape {tuple(tensor.shape)} that backward needs was written to in "
                "place after forward had saved it; write to a clone() of it"
            )
        return tensor
    if backward_number() == -1:
        raise UserError("what backward has saved of a sharded parameter can be seen in backward")
    saved.unit.enter_backward(saved.visit)
    return saved.leaf.detach().as_strided(saved.size, saved.stride, saved.offset)
