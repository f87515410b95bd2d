"""A sharded parameter: a shard stays on this rank, the unsharded tensor comes and goes.

[Note: two tensors of one name]

    module._parameters["weight"]    the shard: what optimizers, norms and checkpoints see
    module.__dict__["weight"]       the unsharded tensor, which forwards use; Python finds it first

The unsharded tensor is a leaf, so backward leaves its gradient in `unsharded.grad`; a strategy sums
that over the ranks into `sharded.grad`. No name changes, and when the unsharded tensor is hidden
the module is what it was. The shard is the model's own parameter, which was given other memory.

What a user can see of a parameter is the same of both tensors, because they share it: attributes
and hooks are one dict each, and `freeze_alike` keeps one `requires_grad`.

[Note: memory that comes and goes] Each gather fills new memory, which becomes that of the unsharded
tensor, and resharding lets go of it. Nothing is freed by force: whoever still holds a view of it,
such as a unit that returns its weight, keeps it alive. Autograd alone holds none: what forward
saves for backward is saved by name, and looked up again when it is needed (step/saved.py). Between
the two the unsharded tensor consists of NaN, one number in memory, so that a mistake is not silent.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.parallel.param_slots import ParamSlot, check_in_memory, freeze_alike, set_param
from dist_lab.parallel.sharded.unsharded import UnshardedParameter
from dist_lab.torch_private import share_hooks


@dataclass
class ShardedParam:
    """One parameter under a strategy that shards it.

    Attributes:
        sharded: this rank's shard; in the module.
        unsharded: the leaf that forwards use, in the dtype of compute.
        shape: of the whole.
        length: elements of the longest shard.
        trained: when it was sharded; frozen since, it gets no gradient.
        rows: the memory of `unsharded`, (size, length), while there is any; its end may be padding.
        trains: now, as far as `freeze_alike` knows.
        hollow: what `unsharded` is while there is none: see [Note: memory that comes and goes].
    """

    name: str
    slots: list[ParamSlot]
    sharded: nn.Parameter
    unsharded: UnshardedParameter
    shape: torch.Size
    length: int
    trained: bool
    rows: Tensor | None = None
    trains: bool = field(init=False)
    hollow: Tensor = field(init=False)
    stride: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.trains, self.hollow = self.trained, self.unsharded.detached()
        self.stride = torch.empty(self.shape, device="meta").stride()

    def show(self) -> None:
        """Let the modules compute with the unsharded tensor."""
        for module, attribute in self.slots:
            module.__dict__[attribute] = self.unsharded

    def hide(self) -> None:
        """Let the modules see the shard again."""
        for module, attribute in self.slots:
            module.__dict__.pop(attribute, None)

    def allocate(self, size: int) -> Tensor:
        """Give the unsharded tensor memory, whose values are to come; returns it as rows."""
        leaf = self.unsharded
        self.rows = torch.empty(size, self.length, dtype=leaf.dtype, device=leaf.device)
        leaf.lie_in(self.rows.as_strided(self.shape, self.stride))
        return self.rows

    def free(self) -> None:
        """Let go of the memory of the unsharded tensor."""
        self.rows = None
        self.unsharded.lie_in(self.hollow)

    def freeze_alike(self) -> None:
        self.trains = freeze_alike(self.sharded, self.unsharded, self.trains)

    def check(self, memory: Tensor) -> None:
        """Raise UserError if the shard is not in `memory` any more, where others read it."""
        if self.trains and not self.trained:
            raise UserError(
                f"{self.name} was frozen when parallelize() was called; unfreeze it before, or "
                "freeze it again"
            )
        check_in_memory(self.name, self.slots, self.sharded, memory)


def shard_param(
    name: str, slots: list[ParamSlot], shard: Tensor, shape: torch.Size, length: int, like: Tensor
) -> ShardedParam:
    """Give the model's parameter the memory of its shard, and make the leaf beside it.

    Args:
        shape: of the unsharded tensor.
        length: elements of the longest shard.
        like: of the dtype, and on the device, of compute.
    """
    parameter = set_param(slots, shard)
    trained = parameter.requires_grad
    leaf = UnshardedParameter.hollow(name, shape, like, trained)
    leaf.__dict__ = parameter.__dict__
    share_hooks(parameter, leaf)
    return ShardedParam(name, slots, parameter, leaf, shape, length, trained)


def shard_length(shape: torch.Size, size: int) -> int:
    """Elements of the largest of `size` shards along dim 0; a 0-dim tensor is one shard.

    >>> shard_length(torch.Size([10, 3]), 4), shard_length(torch.Size([]), 4)
    (9, 1)
    """
    return -(-shape[0] // size) * math.prod(shape[1:]) if shape else 1
