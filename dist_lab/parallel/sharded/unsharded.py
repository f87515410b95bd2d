"""The unsharded tensor, which notices when a forward writes to it by `.data`.

A forward that masks or clamps its weight by `weight.data` writes to memory that is freed when the
unit is resharded, and autograd does not count such a write. So the tensor keeps a copy of its
values from when `.data` was first read. When the unit is resharded, each rank copies the elements
that changed into its shard. At the end of the forward the ranks compare what they have written: see
common_order.py. If no code reads `.data`, nothing is kept or compared.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The leaf that forwards use, whose memory is there only while the unit is unsharded.

    Attributes:
        label: the parameter's name.
        before: a copy of the values when `.data` was first read; None: it was not read.
        aliases: the tensors that `.data` has returned, if they still live.
    """

    __slots__ = ("aliases", "before", "label")
    label: str
    before: Tensor | None
    aliases: list[ReferenceType[Tensor]]

    @classmethod
    def placeholder(
        cls, label: str, shape: torch.Size, like: Tensor, trained: bool
    ) -> "UnshardedParameter":
        """A leaf whose elements are one number in memory: NaN, or 0 if the dtype has no NaN."""
        value = math.nan if like.is_floating_point() else 0
        number = torch.full((), value, dtype=like.dtype, device=like.device)
        leaf = cls(number.expand(shape), trained)
        leaf.label, leaf.before, leaf.aliases = label, None, []
        return leaf

    @property
    @not_compiled
    def data(self) -> Tensor:
        if self.before is None:
            self.before = self.detach().clone()
        alias = self.detached()
        self.aliases = [*(r for r in self.aliases if r() is not None), ref(alias)]
        return alias

    @data.setter
    @not_compiled
    def data(self, value: Tensor) -> None:
        current = self.detached()
        if any(value is r() for r in self.aliases):  # the assignment at the end of `.data *= 2`
            return
        same_kind = value.shape == current.shape and value.dtype == current.dtype
        if not same_kind or any(r() is not None for r in self.aliases):
            raise UserError(
                f"the forward replaces {self.label}.data while the old tensor is held, or by "
                "another shape or dtype; write in place, by .data.mul_(mask) or .data.copy_(value)"
            )
        if self.before is None:
            self.before = current.clone()
        current.copy_(value)

    def detached(self) -> Tensor:
        """The value of `.data`, without the bookkeeping of a read by the user."""
        return nn.Parameter.data.__get__(self)  # type: ignore[attr-defined]

    def set_memory(self, memory: Tensor) -> None:
        """Use this memory from now on."""
        self.before = None
        nn.Parameter.data.__set__(self, memory)  # type: ignore[attr-defined]

    def plain(self) -> nn.Parameter:
        """An ordinary parameter in the same memory, for copies and pickles."""
        parameter = nn.Parameter(self.detach(), self.requires_grad)
        parameter.__dict__ = self.__dict__
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = copied = copy.deepcopy(self.plain())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def written(self) -> Tensor | None:
        """A mask of the elements written by `.data` since the last call; None if there are none."""
        before, self.before = self.before, None
        if before is None:
            return None
        unchanged = torch.isclose(self.detach(), before, rtol=0, atol=0, equal_nan=True)
        return None if unchanged.all() else ~unchanged


def copy_writes_to_shards(
    pairs: Iterable[tuple[UnshardedParameter, Tensor]], axis: Axis, wait: Callable[[], None]
) -> dict[str, int]:
    """Copy elements that were written by `.data` from the unsharded tensors to their shards.

    Args:
        pairs: each unsharded tensor with the memory of its shard, whose end may be padding.
        wait: blocks until no rank reads the shards.

    Returns:
        name -> digest of the unsharded tensor, for each parameter that was written to.
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


def first_conflict(written: Sequence[Mapping[str, int]]) -> str | None:
    """The first parameter to which the ranks have written different values.

    Args:
        written: for each rank, the digests by name, as `copy_writes_to_shards` returns them.
    """
    names = dict.fromkeys(name for digests in written for name in digests)
    return next((n for n in names if len({digests.get(n) for digests in written}) > 1), None)


def refuse_conflict(name: str | None) -> None:
    """Raise UserError, on every rank, if the ranks have written different values."""
    if name is not None:
        raise UserError(
            f"the forward writes to {name} by .data, with different values on each rank: each has "
            "other rows; write what does not depend on rows, or write after the step"
        )


def shard_value(value: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of a value. A 0-dim value is a vector of one row, which rank 0 keeps."""
    if value.dim():
        return shard_of(value, Shard(0), axis.size, axis.index)
    return value.flatten()[axis.index :]
