"""A bucket of parameters, whole for every forward, of which each rank steps on a shard.

    unsharded = [ a | b | c    ... | padding ]     what forwards read: W
    sharded   =       [        ]                   this rank's shard, in the same memory: W[E_dp]

The optimizer writes to the shard, and with that to the memory which forwards read; a gather brings
the other ranks' shards. Gradients lie alike: each in the place of its parameter, in such memory for
all, or in such a shard.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import FlatShard, Layout
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import Arrivals, FlatBuffer, bucket_label, group_into_buckets
from dist_lab.parallel.param_slots import ParamSlot, param_slots, parameter_at, set_param
from dist_lab.parallel.sharded.sharded_param import ShardedParam, shard_param
from dist_lab.step.protocol import Phase, Setup


def shard_in_buckets(
    setup: Setup, bucket_mb: float
) -> "tuple[dict[str, Layout], list[ParamBucket]]":
    """Lay trained parameters side by side in buckets, and keep this rank's shard of each bucket."""
    if not bucket_mb > 0:
        raise UserError(f"buckets of {bucket_mb} MiB; give a size above 0")
    model, axis, limit = setup.model, setup.axis, int(bucket_mb * 2**20)
    gather_axis, slots, layouts = setup.channel(), param_slots(model), setup.owing_sums(axis)
    # Backward comes to the last layer first, and as a rule that was also made last.
    trained = [(n, p.dtype, p.nbytes) for n, p in model.named_parameters() if p.requires_grad]
    buckets = group_into_buckets(reversed(trained), limit, limit)
    flats: dict[str, FlatShard] = {}
    for names in buckets:
        numels = {name: model.get_parameter(name).numel() for name in names}
        length, offset = max(1, -(-sum(numels.values()) // axis.size)), 0
        for name, numel in numels.items():
            flats[name] = FlatShard(offset, length)
            layouts[name] = layouts[name].split(axis.name, flats[name])
            offset += numel
    for name, p in model.named_parameters():
        if not p.requires_grad and p.is_meta:  # what is frozen stays whole
            set_param(slots[name], setup.full_value(name).to(axis.wire.device))
    return layouts, [
        ParamBucket(
            bucket_label(i, names), names, slots, flats, axis, gather_axis, setup.full_value
        )
        for i, names in enumerate(buckets)
    ]


@final
class ParamBucket:
    """Parameters of one dtype, side by side.

    Args:
        slots, flats: name -> where the model holds it, and its range in the bucket.
        axis, gather_axis: where gradients and parameters travel.
        full_value: name -> its value.

    Attributes:
        shards, leaves: name -> what the optimizer steps on, and what backward fills the `.grad` of.
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
        before = {name: parameter_at(slots[name]) for name in names}
        self.shapes = {name: p.shape for name, p in before.items()}
        ranges = {n: flats[n].range(p.numel(), axis.index) for n, p in before.items()}
        self.shard_shapes = {name: (stop - start,) for name, (start, stop) in ranges.items()}
        self.numel = axis.size * flats[names[0]].length  # with padding
        self.dtype = before[names[0]].dtype
        memory = ops.shared_buffer(self.numel, self.dtype, gather_axis)
        self.unsharded = self.side_by_side(memory)
        self.sharded = self.in_shard(self.shard_of(memory))
        self.members: list[ShardedParam] = []
        for name in names:
            rows = self.unsharded.views[name].copy_(full_value(name))
            seen = rows.data  # not a view for autograd
            member = shard_param(name, slots[name], self.sharded.views[name], seen, rows)
            member.show()  # for good
            member.copy_as_unsharded()
            self.members.append(member)
        self.shards: dict[str, Tensor] = {m.name: m.sharded for m in self.members}
        self.leaves: dict[str, Tensor] = {m.name: m.unsharded for m in self.members}
        self.arrivals = Arrivals(self.shards)

    def side_by_side(self, memory: Tensor) -> FlatBuffer:
        """A tensor for each parameter, as large as that is."""
        return FlatBuffer(memory, self.shapes, self.label)

    def in_shard(self, shard: Tensor) -> FlatBuffer:
        """A tensor for the part of each parameter that is in this rank's shard."""
        return FlatBuffer(shard, self.shard_shapes, self.label)

    def shard_of(self, memory: Tensor) -> Tensor:
        """This rank's shard of such memory for all."""
        return memory.view(self.axis.size, -1)[self.axis.index]

    def check(self, phase: Phase) -> None:
        """A forward or backward begins: see that the shards are in place, and what is frozen."""
        for member in self.members:
            member.freeze_alike()
            if phase is Phase.FORWARD:
                member.check(self.unsharded.memory)
        self.arrivals.look_for_frozen()

    def issue_gather(self) -> None:
        """W[E_dp] -> W"""
        self.unsharded.issue(
            lambda memory, axis: ops.all_gather_into(memory, self.sharded.memory, axis),
            self.gather_axis,
        )

    def wait_for_readers(self) -> None:
        """Wait until no rank reads what the optimizer is about to write."""
        ops.wait_for_readers(self.unsharded.memory, self.gather_axis)

    def with_grad(self) -> set[str]:
        """The parameters whose shard has a gradient: no zero_grad() has taken it away."""
        return {name for name, shard in self.shards.items() if shard.grad is not None}

    def assign_grads(self, sums: FlatBuffer, names: set[str]) -> None:
        """Make `.grad` of each of these shards its part of the sums, and of others None."""
        for name, shard in self.shards.items():
            shard.grad = sums.views[name].data if name in names else None

    def drop_leaf_grads(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None
