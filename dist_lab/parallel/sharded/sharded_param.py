"""A sharded parameter: its shard stays on this rank, its unsharded tensor has memory while in use.

[Note: two tensors of one name]

    module._parameters["weight"]    the shard: optimizers, norms and checkpoints see it
    module.__dict__["weight"]       the unsharded tensor: forwards use it; Python looks here first

The unsharded tensor is a leaf of the autograd graph, so backward adds to `unsharded.grad`. The
strategy reduces that over the ranks into `sharded.grad`. No name changes, and once the unsharded
tensor is hidden the module is as before. The shard is the model's own parameter, with new memory.

A user sees no difference between the two tensors: they share the dict of attributes and the dict of
hooks, and `sync_requires_grad` gives them the same `requires_grad`.

[Note: memory that comes and goes] Each all-gather fills new memory, which the unsharded tensor then
uses; resharding drops this memory. It is not freed by force: a view that is still held, such as a
weight that a unit returns, keeps it alive. Autograd holds no view: forward saves the parameter's
name for backward, which looks the tensor up by this name (step/saved.py). While it has no memory,
the unsharded tensor is NaN (one number, expanded), so that its use by mistake shows in the results.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.parallel.param_slots import ParamSlot, check_in_memory, set_param, sync_requires_grad
from dist_lab.parallel.sharded.unsharded import UnshardedParameter
from dist_lab.torch_private import share_hooks


@dataclass
class ShardedParam:
    """One parameter under a strategy that shards it.

    Attributes:
        sharded: this rank's shard, which is the module's parameter.
        unsharded: the leaf that forwards use, in the dtype of compute.
        shape: of the unsharded tensor.
        length: elements of the longest shard.
        trained: whether it required a gradient when it was sharded.
        rows: the memory of `unsharded`: (size, length), padded at the end. None while resharded.
        trains: whether it requires a gradient now, as `sync_requires_grad` last saw it.
        placeholder: the NaN in place of `rows`: see [Note: memory that comes and goes].
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
    placeholder: Tensor = field(init=False)
    stride: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.trains, self.placeholder = self.trained, self.unsharded.detached()
        self.stride = torch.empty(self.shape, device="meta").stride()

    def show(self) -> None:
        """Put the unsharded tensor in front of the shard, so that forwards use it."""
        for module, attribute in self.slots:
            module.__dict__[attribute] = self.unsharded

    def hide(self) -> None:
        """Leave only the shard in the modules."""
        for module, attribute in self.slots:
            module.__dict__.pop(attribute, None)

    def new_rows(self, size: int) -> Tensor:
        """New memory for the unsharded tensor, without values."""
        leaf = self.unsharded
        return torch.empty(size, self.length, dtype=leaf.dtype, device=leaf.device)

    def use_rows(self, rows: Tensor) -> Tensor:
        """Let the unsharded tensor use this memory, (size, length)."""
        self.rows = rows
        self.unsharded.set_memory(rows.as_strided(self.shape, self.stride))
        return rows

    def free(self) -> None:
        """Drop the memory of the unsharded tensor."""
        self.rows = None
        self.unsharded.set_memory(self.placeholder)

    def sync_requires_grad(self) -> None:
        self.trains = sync_requires_grad(self.sharded, self.unsharded, self.trains)

    def check_in_memory(self, memory: Tensor) -> None:
        """Raise UserError if the shard is no longer in `memory`, which other ranks gather."""
        if self.trains and not self.trained:
            raise UserError(
                f"{self.name} was frozen when parallelize() was called; unfreeze it before, or "
                "freeze it again"
            )
        check_in_memory(self.name, self.slots, self.sharded, memory)


def shard_param(
    name: str, slots: list[ParamSlot], shard: Tensor, shape: torch.Size, length: int, like: Tensor
) -> ShardedParam:
    """Give the model's parameter the memory of its shard, and make the unsharded leaf.

    Args:
        shape: of the unsharded tensor.
        length: elements of the longest shard.
        like: has the dtype and the device of compute.
    """
    parameter = set_param(slots, shard)
    trained = parameter.requires_grad
    leaf = UnshardedParameter.placeholder(name, shape, like, trained)
    leaf.__dict__ = parameter.__dict__
    share_hooks(parameter, leaf)
    return ShardedParam(name, slots, parameter, leaf, shape, length, trained)


def shard_length(shape: torch.Size, size: int) -> int:
    """The number of elements of the largest of `size` shards along dim 0; a 0-dim tensor has one.

    >>> shard_length(torch.Size([10, 3]), 4), shard_length(torch.Size([]), 4)
    (9, 1)
    """
    return -(-shape[0] // size) * math.prod(shape[1:]) if shape else 1
