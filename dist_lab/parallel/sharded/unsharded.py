"""The unsharded tensor, of which it is seen when a forward writes to it by `.data`.

A forward that masks or clamps its weight by `weight.data` writes to memory that is about to go,
and autograd counts no such write. So the tensor keeps what it was when `.data` was first asked for.
When the unit is left, each rank takes over into its shard what has changed; and at the end of the
forward the ranks see whether all have written the same: see common_order.py. Where nobody asks for
`.data`, nothing is kept or compared.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from dist_lab.comm.agree import fingerprint
from dist_lab.errors import UserError
from dist_lab.layout.layout import Shard, shard_of
from dist_lab.mesh.mesh import Axis
from dist_lab.torch_private import not_compiled


class UnshardedParameter(nn.Parameter):
    """The leaf that forwards use, in memory that comes and goes.

    Attributes:
        label: the parameter's name.
        before: what it was when somebody first asked for `.data`; None: nobody has.
        given: what was given to those who asked.
    """

    __slots__ = ("before", "given", "label")
    label: str
    before: Tensor | None
    given: list[ReferenceType[Tensor]]

    @classmethod
    def hollow(
        cls, label: str, shape: torch.Size, like: Tensor, trained: bool
    ) -> "UnshardedParameter":
        """One that has a single number for all its elements, NaN where there is one."""
        nothing = math.nan if like.is_floating_point() else 0
        number = torch.full((), nothing, dtype=like.dtype, device=like.device)
        leaf = cls(number.expand(shape), trained)
        leaf.label, leaf.before, leaf.given = label, None, []
        return leaf

    @property
    @not_compiled
    def data(self) -> Tensor:
        if self.before is None:
            self.before = self.detach().clone()
        given = self.detached()
        self.given = [*(r for r in self.given if r() is not None), ref(given)]
        return given

    @data.setter
    @not_compiled
    def data(self, value: Tensor) -> None:
        mine = self.detached()
        if any(value is r() for r in self.given):  # as `weight.data *= 2` ends
            return
        alike = value.shape == mine.shape and value.dtype == mine.dtype
        if not alike or any(r() is not None for r in self.given):
            raise UserError(
                f"the forward gives {self.label}.data other memory, and what it was is held or has "
                "another shape; write in place, as by .data.mul_(mask) or .data.copy_(value)"
            )
        if self.before is None:
            self.before = mine.clone()
        mine.copy_(value)

    def detached(self) -> Tensor:
        """`.data`, unseen."""
        return nn.Parameter.data.__get__(self)  # type: ignore[attr-defined]

    def lie_in(self, memory: Tensor) -> None:
        """Take this memory, to which nobody has written yet."""
        self.before = None
        nn.Parameter.data.__set__(self, memory)  # type: ignore[attr-defined]

    def plain(self) -> nn.Parameter:
        """An ordinary parameter in the same memory, which is what is copied and pickled."""
        parameter = nn.Parameter(self.detach(), self.requires_grad)
        parameter.__dict__ = self.__dict__
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = copied = copy.deepcopy(self.plain())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def written(self) -> Tensor | None:
        """Which elements somebody has written to by `.data` since the last call; None: none."""
        before, self.before = self.before, None
        if before is None:
            return None
        same = torch.isclose(self.detach(), before, rtol=0, atol=0, equal_nan=True)
        return None if same.all() else ~same


def take_over(
    pairs: Iterable[tuple[UnshardedParameter, Tensor]], axis: Axis, wait: Callable[[], None]
) -> dict[str, int]:
    """Write to the shards what somebody has written to the unsharded tensors.

    Args:
        pairs: each with the memory of its shard, whose end may be padding.
        wait: until nobody reads the shards.

    Returns:
        Name of what was written to -> a digest of the unsharded tensor.
    """
    digests: dict[str, int] = {}
    for unsharded, shard in pairs:
        written = unsharded.written()
        if written is not None:
            wait()
            digests[unsharded.label] = fingerprint(unsharded)
            values = shard_value(unsharded.detach(), axis).flatten().to(shard)
            changed = shard_value(written, axis).flatten().to(shard.device)
            shard[: len(values)][changed] = values[changed]
    return digests


def shard_value(value: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of a value; of a 0-dim one, which only the first rank keeps, as a vector."""
    if value.dim():
        return shard_of(value, Shard(0), axis.size, axis.index)
    return value.flatten()[axis.index :]
