"""A bucket of parameters, whole for every forward, of which each rank steps on a shard.

    unsharded = [ a | b | c    ... | padding ]     the model's own parameters: W
    sharded   =       [        ]                   this rank's shard, in the same memory: W[E_dp]

The optimizer writes to the shard, and with that to the memory which forwards read; a gather brings
the other ranks' shards. Gradients lie alike: each in the place of its parameter, in such memory for
all, or in such a shard.

To a user the model is what it was before, whole parameters and all: they may be frozen, hooked,
penalized, and written to on every rank alike. Only what optimizers step on is another tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import final

from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import FlatShard, Layout
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import Arrivals, FlatBuffer, bucket_label, group_into_buckets
from dist_lab.parallel.param_slots import (
    ParamSlot,
    check_in_memory,
    describe,
    sync_requires_grad,
    is_substituted,
    param_slots,
    parameter_at,
    set_param,
)
from dist_lab.step.grad_elsewhere import GradElsewhere
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
            set_param(slots[name], setup.full_value(name).to(axis.device))
    return layouts, [
        ParamBucket(
            bucket_label(i, names), names, slots, flats, axis, gather_axis, setup.full_value
        )
        for i, names in enumerate(buckets)
    ]


class GradPlace(Enum):
    """Where the gradient of a parameter is."""

    NOWHERE = auto()
    UNSHARDED = auto()  # this rank's own, to be summed
    SHARD = auto()  # the sum


@dataclass
class BucketParam:
    """One parameter of a bucket.

    Attributes:
        slots: where the model holds it.
        whole: the model's own, to which autograd adds gradients.
        shard: its part in this rank's shard, which the optimizer steps on.
        memory: of `whole`.
        trains: whether it is trained now, as far as `sync_requires_grad` knows.
        version: how often the shard had been written to when all ranks had its values.
        lies: where the gradient is.
    """

    name: str
    slots: list[ParamSlot]
    whole: nn.Parameter
    shard: nn.Parameter
    memory: Tensor
    trains: bool = True
    version: int = 0
    grad_place: GradPlace = GradPlace.NOWHERE

    def sync_requires_grad(self) -> None:
        self.trains = sync_requires_grad(self.whole, self.shard, self.trains)

    def restore_memory(self) -> None:
        """Take over values that came by `.data`; raise UserError for what cannot be taken over."""
        whole, memory = self.whole, self.memory
        if is_substituted(self.slots):  # for this forward, by a tensor that may depend on it
            return
        alike = whole.shape == memory.shape and describe(whole) == describe(memory)
        if alike and whole.data_ptr() != memory.data_ptr():
            memory.copy_(whole.detach())
            whole.data = memory.data
        check_in_memory(self.name, self.slots, whole, memory)

    def mark_grad_at_shard(self) -> None:
        """The shard has the sum: at the whole stands where it is."""
        self.grad_place = GradPlace.SHARD
        GradElsewhere.stand_at(
            self.whole, self.shard,
            f"the gradient of {self.name} is summed, and sharded over the ranks: call "
            "job.clip_grad_norm or job.full_gradients(), and give job.parameters() to optimizers",
        )  # fmt: skip

    def mark_grad_at_unsharded(self) -> None:
        """The whole has what is not summed yet: at the shard stands where it is."""
        self.refuse_set_shard_grad()
        self.grad_place = GradPlace.UNSHARDED
        GradElsewhere.stand_at(
            self.shard, self.whole,
            f"the gradient of {self.name} is not summed yet: call job.finish() before you use it, "
            "or change the one of job.model's own parameter",
        )  # fmt: skip

    def mark_grad_in_flight(self) -> None:
        """The gradient is being summed, and until finish() nobody may touch it."""
        GradElsewhere.stand_at(
            self.whole, None,
            f"the gradient of {self.name} is being summed: call job.finish() before you use it",
        )  # fmt: skip

    def refuse_set_shard_grad(self) -> None:
        """Raise UserError for a gradient that a user has set where the sum is about to come."""
        grad = self.shard.grad
        if self.grad_place is GradPlace.SHARD and grad is not None and local_part(grad).any():
            raise UserError(
                f"the gradient of {self.name} was set before it was summed; set the one of "
                "job.model's own parameter"
            )

    def sync_cleared_grads(self) -> None:
        """A gradient that a user has cleared at one of the tensors is cleared at both."""
        whole, shard = self.whole.grad, self.shard.grad
        if self.grad_place is GradPlace.NOWHERE:
            if shard is not None:  # a user has set it
                self.mark_grad_at_shard()
        elif whole is None or shard is None:
            self.whole.grad = self.shard.grad = None
            self.grad_place = GradPlace.NOWHERE
        elif self.grad_place is GradPlace.SHARD and not isinstance(whole, GradElsewhere):
            self.mark_grad_at_shard()  # in place of what a user has put there
            if whole.any():
                raise UserError(
                    f"the gradient of {self.name} was replaced when it was summed and sharded "
                    "already; change those of job.parameters()"
                )
            shard.zero_()


@final
class ParamBucket:
    """Parameters of one dtype, side by side.

    Args:
        slots, flats: name -> where the model holds it, and its range in the bucket.
        axis, gather_axis: where gradients and parameters travel.
        full_value: name -> its value.

    Attributes:
        shards, wholes: name -> what the optimizer steps on, and what backward fills the `.grad` of.
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
        self.unsharded = self.buffer_of(memory)
        self.sharded = self.shard_buffer_of(self.shard_of(memory))
        self.params: list[BucketParam] = []
        for name in names:
            memory = self.unsharded.views[name].copy_(full_value(name))
            whole = set_param(slots[name], memory)
            shard = nn.Parameter(self.sharded.views[name].data)  # written to, and counted, apart
            shard.__dict__.update(whole.__dict__)  # what a user has written on it
            self.params.append(BucketParam(name, slots[name], whole, shard, memory.data))
        self.param_of = {param.name: param for param in self.params}
        self.sharded_params: dict[str, nn.Parameter] = {p.name: p.shard for p in self.params}
        self.unsharded_params: dict[str, nn.Parameter] = {p.name: p.whole for p in self.params}
        self.arrivals = Arrivals(self.unsharded_params)

    def buffer_of(self, memory: Tensor) -> FlatBuffer:
        """A tensor for each parameter, as large as that is."""
        return FlatBuffer(memory, self.shapes, self.label)

    def shard_buffer_of(self, shard: Tensor) -> FlatBuffer:
        """A tensor for the part of each parameter that is in this rank's shard."""
        return FlatBuffer(shard, self.shard_shapes, self.label)

    def shard_of(self, memory: Tensor) -> Tensor:
        """This rank's shard of such memory for all."""
        return memory.view(self.axis.size, -1)[self.axis.index]

    def sync_user_changes(self, phase: Phase) -> None:
        """A forward or backward begins: see what a user has done since the last."""
        self.look_for_frozen()
        if phase is Phase.FORWARD:
            self.restore_memory()
        self.sync_cleared_grads()
        if phase is Phase.BACKWARD:  # autograd is about to add gradients there
            self.drop_stand_ins()

    def look_for_frozen(self) -> None:
        """See what a user has frozen or thawed."""
        for param in self.params:
            param.sync_requires_grad()
        self.arrivals.look_for_frozen()

    def restore_memory(self) -> None:
        """See what a user has moved."""
        for param in self.params:
            param.restore_memory()

    def issue_gather(self) -> None:
        """W[E_dp] -> W"""
        self.unsharded.issue(
            lambda memory, axis: ops.all_gather_into(memory, self.sharded.memory, axis),
            self.gather_axis,
        )

    def wait_gather(self) -> None:
        """On return whoever likes may write to the parameters, as no rank reads them."""
        self.unsharded.wait()
        self.wait_for_readers()
        for param in self.params:
            param.version = param.shard._version

    @property
    def is_outdated(self) -> bool:
        """Whether this rank's shards were written to since all ranks had them."""
        return any(param.shard._version != param.version for param in self.params)

    def wait_for_readers(self) -> None:
        """Wait until no rank reads what is about to be written."""
        ops.wait_for_readers(self.unsharded.memory, self.gather_axis)

    def sync_cleared_grads(self) -> None:
        """See what a user has cleared."""
        for param in self.params:
            param.sync_cleared_grads()

    def drop_stand_ins(self) -> None:
        """Leave the whole parameters without what says that their gradients are at the shards."""
        for whole in self.unsharded_params.values():
            if isinstance(whole.grad, GradElsewhere):
                whole.grad = None

    def show_stand_ins(self) -> None:
        """Say at the whole parameters where the gradients are that backward has not added to."""
        for param in self.params:
            if param.grad_place is GradPlace.SHARD and param.whole.grad is None:
                param.mark_grad_at_shard()

    def names_with_grad(self) -> set[str]:
        """The parameters whose shard has a gradient: no zero_grad() has taken it away."""
        return {name for name, shard in self.sharded_params.items() if shard.grad is not None}

    def assign_grads(self, sums: FlatBuffer, names: set[str]) -> None:
        """Make `.grad` of each of these shards its part of the sums, and of others None."""
        for param in self.params:
            param.whole.grad = param.shard.grad = None
            param.grad_place = GradPlace.NOWHERE
            if param.name in names:
                param.shard.grad = sums.views[param.name].data
                param.mark_grad_at_shard()

    def drop_unsharded_grads(self) -> None:
        for whole in self.unsharded_params.values():
            whole.grad = None
