"""A sharded parameter: a shard stays on this rank, the unsharded tensor comes and goes.

[Note: two tensors of one name]

    module._parameters["weight"]    the shard: what optimizers, norms and checkpoints see
    module.__dict__["weight"]       the unsharded tensor, which forwards use; Python finds it first

The unsharded tensor is a leaf, so backward leaves its gradient in `unsharded.grad`; a strategy sums
that over the ranks into `sharded.grad`. No name changes, and when the unsharded tensor is hidden
the module is what it was.

The unsharded tensor keeps its identity for good, because autograd remembers it from forward to
backward. Only the memory behind it goes and comes back: its storage is made empty, and grows again.
A gather fills it through `rows`, of which autograd does not know, so that nothing seems to have
been modified since it was saved.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import Shard, shard_of
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import ParamSlot, set_param


@dataclass
class ShardedParam:
    """One parameter under a strategy that shards it.

    Attributes:
        sharded: this rank's shard; in the module from now on.
        unsharded: the leaf that forwards use, in the dtype of compute.
        rows: the memory of `unsharded` as (size, elements of a shard); the last may be padding.
        trained: when it was sharded; frozen since, it gets no gradient.
        trains: now, as far as `freeze_alike` knows.
    """

    name: str
    slots: list[ParamSlot]
    sharded: nn.Parameter
    unsharded: nn.Parameter
    rows: Tensor
    trained: bool
    trains: bool

    def show(self) -> None:
        """Let the modules compute with the unsharded tensor."""
        for module, attribute in self.slots:
            module.__dict__[attribute] = self.unsharded

    def hide(self) -> None:
        """Let the modules see the shard again."""
        for module, attribute in self.slots:
            module.__dict__.pop(attribute, None)

    def allocate(self) -> None:
        """Give the unsharded tensor its memory back, whose values are to come."""
        self.rows.untyped_storage().resize_(self.rows.numel() * self.rows.element_size())

    def free(self) -> None:
        """Give the memory of the unsharded tensor away."""
        self.rows.untyped_storage().resize_(0)

    def copy_as_unsharded(self) -> None:
        """Let a deep copy of the model hold the unsharded tensor as its parameter.

        Written on the one object, and not in a class of its own: optimizers take their fast paths
        for tensors of exactly the type nn.Parameter.
        """
        self.sharded.__dict__["__deepcopy__"] = partial(copy.deepcopy, self.unsharded)

    def freeze_alike(self) -> None:
        """Freeze both tensors, or neither, as a user has done with one of them."""
        if self.sharded.requires_grad == self.unsharded.requires_grad:
            self.trains = self.sharded.requires_grad
        else:  # one is as it was before
            self.trains = not self.trains
            self.sharded.requires_grad_(self.trains)
            self.unsharded.requires_grad_(self.trains)

    def check(self, memory: Tensor) -> None:
        """Raise UserError if the shard is not in `memory` any more, where others read it."""
        if self.trains and not self.trained:
            raise UserError(
                f"{self.name} was frozen when parallelize() was called; unfreeze it before, or "
                "freeze it again"
            )
        held = [module._parameters[attribute] for module, attribute in self.slots]
        now = next((tensor for tensor in held if tensor is not self.sharded), self.sharded)
        inside = self.sharded.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        if now is not self.sharded or self.sharded.dtype != memory.dtype or not inside:
            raise UserError(
                f"{self.name} was moved, cast or replaced after parallelize() (it was "
                f"{describe(memory)}, it is {describe(now)}); do that before, and load values by "
                "job.load_full_state_dict()"
            )


def shard_param(
    name: str, slots: list[ParamSlot], shard: Tensor, unsharded: Tensor, rows: Tensor
) -> ShardedParam:
    """Put the shard into the model, in place of its parameter."""
    parameter = set_param(slots, shard)
    trained = parameter.requires_grad
    leaf = nn.Parameter(unsharded, trained)
    return ShardedParam(name, slots, parameter, leaf, rows, trained, trained)


def without_memory(rows: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape at the beginning of `rows`, whose memory is given away for now."""
    flat = rows.data.view(-1)[: math.prod(shape)]  # .data: not a view for autograd
    rows.untyped_storage().resize_(0)
    return flat.view(shape)


def shard_length(shape: torch.Size, size: int) -> int:
    """Elements of the largest of `size` shards along dim 0; a 0-dim tensor is one shard.

    >>> shard_length(torch.Size([10, 3]), 4), shard_length(torch.Size([]), 4)
    (9, 1)
    """
    return -(-shape[0] // size) * math.prod(shape[1:]) if shape else 1


def shard_value(value: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of a value; of a 0-dim one, which only the first rank keeps, as a vector."""
    if value.dim():
        return shard_of(value, Shard(0), axis.size, axis.index)
    return value.flatten()[axis.index :]


def describe(tensor: Tensor | None) -> str:
    """The dtype and device of a tensor, for an error."""
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
