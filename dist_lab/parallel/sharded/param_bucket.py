"""A bucket of parameters: every rank holds them unsharded, and its optimizer steps on one shard.

    unsharded = [ a | b | c    ... | padding ]     the model's own parameters: W
    sharded   =       [        ]                   this rank's shard, in the same memory: W[E_dp]

The shard is a view of the memory that forwards read, so forwards see the optimizer's writes. An
all-gather fetches the other ranks' shards. Gradients use buffers of the same two layouts.

To a user the model is as before, and its parameters are unsharded: they may be frozen, hooked and
penalized, and written to if all ranks write the same. Only the optimizer gets the shards instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import FlatShard, Layout, shard_shape
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import (
    SET_LATE,
    Arrivals,
    FlatBuffer,
    bucket_label,
    group_into_buckets,
)
from dist_lab.parallel.param_slots import (
    ParamSlot,
    param_slots,
    parameter_at,
    set_param,
)
from dist_lab.parallel.sharded.bucket_param import BucketParam, GradPlace
from dist_lab.step.grad_elsewhere import GradElsewhere
from dist_lab.step.protocol import Phase
from dist_lab.step.setup import Setup


def shard_in_buckets(
    setup: Setup, bucket_mb: float
) -> "tuple[dict[str, Layout], dict[tuple[str, ...], list[ParamBucket]]]":
    """Lay trained parameters side by side in buckets, and keep this rank's shard of each bucket.

    All ranks of the mesh make the same buckets. Under tp some hold a shorter shard of a parameter
    than others; so its place in a bucket is as long as its longest shard. In a pipeline the
    buckets are grouped by the stages of this rank that use them.
    """
    if not bucket_mb > 0:
        raise UserError(f"buckets of {bucket_mb} MiB; give a size above 0")
    axis, limit = setup.axis, int(bucket_mb * 2**20)
    gather_axis, slots, layouts = setup.channel(), param_slots(*setup.roots), setup.owing_sums(axis)
    shapes = {name: shard_shape(layout, setup.mesh.axes) for name, layout in layouts.items()}
    slot_lengths = {n: setup.slot_length(math.prod(shapes[n]), x.dtype) for n, x in layouts.items()}
    # Backward reaches the last layer first, and models usually create the last layer last.
    trained = [
        (name, (layout.dtype, setup.stages_of(name)), slot_lengths[name] * layout.dtype.itemsize)
        for name, layout in reversed(layouts.items())
        if name in setup.trained
    ]
    buckets = group_into_buckets(trained, limit, limit)
    flats: dict[str, FlatShard] = {}
    for names in buckets:
        length, offset = max(1, -(-sum(slot_lengths[n] for n in names) // axis.size)), 0
        for name in names:
            flats[name] = FlatShard(offset, length)
            layouts[name] = layouts[name].split(axis.name, flats[name])
            offset += slot_lengths[name]
    groups: dict[tuple[str, ...], list[ParamBucket]] = {}
    for i, names in enumerate(names for names in buckets if names[0] in slots):
        label, value = bucket_label(i, names), setup.full_value
        bucket = ParamBucket(label, names, slots, flats, axis, gather_axis, value)
        groups.setdefault(setup.units_of(names[0]), []).append(bucket)
    return layouts, groups


@final
class ParamBucket:
    """Parameters of one dtype, side by side.

    Args:
        slots, flats: name -> where the model holds the parameter, and its range in the bucket.
        axis, gather_axis: the axes of the reduce-scatter and of the all-gather.
        full_value: name -> the unsharded value.

    Attributes:
        shards: name -> the tensor that the optimizer steps on.
        leaves: name -> the model's own parameter, to whose `.grad` backward adds.
    """

    def __init__(
        self,
        label: str,
        names: Sequence[str],
        slots: Mapping[str, list[ParamSlot]],
        flats: Mapping[str, FlatShard],
        axis: Axis,
        gather_axis: Axis,
        full_value: Callable[[str], Tensor],
    ) -> None:
        self.label, self.axis, self.gather_axis = label, axis, gather_axis
        originals = {name: parameter_at(slots[name]) for name in names}
        self.shapes = {name: p.shape for name, p in originals.items()}
        length = flats[names[0]].length
        ranges = {n: flats[n].range(p.numel(), axis.index) for n, p in originals.items()}
        self.shard_shapes = {name: (stop - start,) for name, (start, stop) in ranges.items()}
        self.offsets = {name: flats[name].offset for name in names}
        begin = axis.index * length  # of this rank's shard
        self.shard_offsets = {
            n: min(max(offset - begin, 0), length) for n, offset in self.offsets.items()
        }
        self.numel = axis.size * length  # with padding
        self.dtype = originals[names[0]].dtype
        memory = ops.shared_buffer(self.numel, self.dtype, gather_axis)
        self.unsharded = self.buffer_of(memory)
        self.sharded = self.shard_buffer_of(self.shard_of(memory))
        self.params: list[BucketParam] = []
        for name in names:
            memory = self.unsharded.views[name].copy_(full_value(name))
            unsharded = set_param(slots[name], memory)
            sharded = nn.Parameter(self.sharded.views[name].data)  # with its own version counter
            sharded.__dict__.update(unsharded.__dict__)  # the user's attributes
            self.params.append(BucketParam(name, slots[name], unsharded, sharded, memory.data))
        self.param_of = {param.name: param for param in self.params}
        self.shards: dict[str, nn.Parameter] = {p.name: p.sharded for p in self.params}
        self.leaves: dict[str, nn.Parameter] = {p.name: p.unsharded for p in self.params}
        self.arrivals = Arrivals(self.leaves)

    def buffer_of(self, memory: Tensor) -> FlatBuffer:
        """A flat buffer in this memory: for each parameter a tensor of its unsharded shape."""
        return FlatBuffer(memory, self.shapes, self.label, self.offsets)

    def shard_buffer_of(self, sharded: Tensor) -> FlatBuffer:
        """A flat buffer in this memory: for each parameter its elements in this rank's shard."""
        return FlatBuffer(sharded, self.shard_shapes, self.label, self.shard_offsets)

    def shard_of(self, memory: Tensor) -> Tensor:
        """This rank's shard of memory that is as long as the bucket."""
        return memory.view(self.axis.size, -1)[self.axis.index]

    def sync_user_changes(self, phase: Phase) -> None:
        """Apply the user's changes of one tensor to the other, at the beginning of `phase`."""
        self.look_for_frozen()
        if phase is Phase.FORWARD:
            self.restore_memory()
        self.sync_cleared_grads()
        if phase is Phase.BACKWARD:  # autograd is about to add to `.grad`
            self.drop_placeholders()

    def look_for_frozen(self) -> None:
        """Note which parameters the user has frozen or unfrozen."""
        for param in self.params:
            param.sync_requires_grad()
        self.arrivals.look_for_frozen()

    def restore_memory(self) -> None:
        """See BucketParam.restore_memory."""
        for param in self.params:
            param.restore_memory()

    def issue_gather(self) -> None:
        """W[E_dp] -> W"""
        self.unsharded.issue(
            lambda memory, axis: ops.all_gather_into(memory, self.sharded.memory, axis),
            self.gather_axis,
        )

    def wait_gather(self) -> None:
        """Wait for the all-gather, and until no rank reads the parameters. Then they may change."""
        self.unsharded.wait()
        self.wait_for_readers()
        for param in self.params:
            param.version = param.sharded._version

    @property
    def is_outdated(self) -> bool:
        """Whether this rank's shards were written to since they were last gathered."""
        return any(param.sharded._version != param.version for param in self.params)

    def wait_for_readers(self) -> None:
        """Wait until no rank reads this rank's parameters, so that they may be written."""
        ops.wait_for_readers(self.unsharded.memory, self.gather_axis)

    def sync_cleared_grads(self) -> None:
        """See BucketParam.sync_cleared_grads."""
        for param in self.params:
            param.sync_cleared_grads()

    def drop_placeholders(self) -> None:
        """Remove the placeholders from the unsharded parameters' `.grad`."""
        for leaf in self.leaves.values():
            if isinstance(leaf.grad, GradElsewhere):
                leaf.grad = None

    def drop_shard_placeholders(self) -> None:
        """Remove the placeholders from the shards' `.grad`: the gradient is about to be summed."""
        for param in self.params:
            if isinstance(param.sharded.grad, GradElsewhere):
                param.sharded.grad = None
                param.grad_place = GradPlace.NOWHERE

    def refuse_set_late(self, sent: set[str]) -> None:
        """Raise UserError if the user has set a gradient after the bucket was sent without it."""
        for name, leaf in self.leaves.items():
            if name not in sent and leaf.grad is not None and type(leaf.grad) is not GradElsewhere:
                raise UserError(SET_LATE.format(name))

    def show_placeholders(self) -> None:
        """Put placeholders back where the shard has the gradient and backward added nothing."""
        for param in self.params:
            if param.grad_place is GradPlace.SHARDED and param.unsharded.grad is None:
                param.mark_grad_at_shard()

    def names_with_grad(self) -> set[str]:
        """The parameters whose shard has a gradient: zero_grad() has not cleared it."""
        return {name for name, sharded in self.shards.items() if sharded.grad is not None}

    def assign_grads(self, sums: FlatBuffer, names: set[str]) -> None:
        """Set `.grad` of each named shard to its view of the sums, and every other one to None."""
        for param in self.params:
            param.unsharded.grad = param.sharded.grad = None
            param.grad_place = GradPlace.NOWHERE
            if param.name in names:
                param.sharded.grad = sums.views[param.name].data
                param.mark_grad_at_shard()

    def clear_in_flight(self) -> None:
        """Clear the gradients that were being summed when an exception ended the step."""
        for param in self.params:
            grad = param.unsharded.grad
            if isinstance(grad, GradElsewhere) and grad.owner is None:
                param.unsharded.grad = param.sharded.grad = None
                param.grad_place = GradPlace.NOWHERE

    def drop_leaf_grads(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None
