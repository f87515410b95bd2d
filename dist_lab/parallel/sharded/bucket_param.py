"""A parameter of a bucket, as two tensors: the model's own, and the shard that optimizers step on.

Only one of them has the gradient; the `.grad` of the other is a placeholder. Users may freeze,
write to or clear either; what they do to one is applied to the other.
"""

from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.parallel.param_slots import (
    ParamSlot,
    check_in_memory,
    describe,
    is_substituted,
    sync_requires_grad,
)
from dist_lab.step.grad_elsewhere import GradElsewhere


class GradPlace(Enum):
    """Which of a parameter's two tensors has the gradient."""

    NOWHERE = auto()
    UNSHARDED = auto()  # this rank's gradient, not summed yet
    SHARDED = auto()  # the sum over the ranks


@dataclass
class BucketParam:
    """One parameter of a bucket.

    Attributes:
        slots: where the model holds it.
        unsharded: the model's own parameter, to whose `.grad` autograd adds.
        sharded: its elements in this rank's shard; the optimizer steps on these.
        memory: the part of the bucket's memory that `unsharded` uses.
        trains: whether it requires a gradient now, as `sync_requires_grad` last saw it.
        version: torch's version counter of `sharded` when all ranks last had its values.
        grad_place: the tensor that has the gradient; the other one's `.grad` is a placeholder.
    """

    name: str
    slots: list[ParamSlot]
    unsharded: nn.Parameter
    sharded: nn.Parameter
    memory: Tensor
    trains: bool = True
    version: int = 0
    grad_place: GradPlace = GradPlace.NOWHERE

    def sync_requires_grad(self) -> None:
        self.trains = sync_requires_grad(self.unsharded, self.sharded, self.trains)

    def restore_memory(self) -> None:
        """Copy values that the user assigned to `.data` into the bucket; raise UserError if they do
        not fit.
        """
        unsharded, memory = self.unsharded, self.memory
        if is_substituted(self.slots):  # by functional_call, for this forward
            return
        fits = unsharded.shape == memory.shape and describe(unsharded) == describe(memory)
        if fits and unsharded.data_ptr() != memory.data_ptr():
            memory.copy_(unsharded.detach())
            unsharded.data = memory.data
        check_in_memory(self.name, self.slots, unsharded, memory)

    def mark_grad_at_shard(self) -> None:
        """The shard has the sum: put a placeholder at the unsharded parameter."""
        self.grad_place = GradPlace.SHARDED
        GradElsewhere.stand_at(
            self.unsharded, self.sharded,
            f"the gradient of {self.name} is summed, and sharded over the ranks: call "
            "job.clip_grad_norm or job.full_gradients(), and give job.parameters() to optimizers",
        )  # fmt: skip

    def mark_grad_at_unsharded(self) -> None:
        """The unsharded parameter has a gradient to be summed: put a placeholder at the shard."""
        if self.grad_place is GradPlace.UNSHARDED and self.sharded.grad is not None:
            return
        self.refuse_set_shard_grad()
        self.grad_place = GradPlace.UNSHARDED
        GradElsewhere.stand_at(
            self.sharded, self.unsharded,
            f"the gradient of {self.name} is not summed yet: call job.finish() before you use it, "
            "or change the gradient of job.model's own parameter",
        )  # fmt: skip

    def mark_grad_in_flight(self) -> None:
        """The gradient is being summed: refuse its use until finish()."""
        GradElsewhere.stand_at(
            self.unsharded, None,
            f"the gradient of {self.name} is being summed: call job.finish() before you use it",
        )  # fmt: skip

    def refuse_set_shard_grad(self) -> None:
        """Raise UserError if the user has set the shard's gradient, which the sum would replace."""
        grad = self.sharded.grad
        if self.grad_place is GradPlace.SHARDED and grad is not None and local_part(grad).any():
            raise UserError(
                f"the gradient of {self.name} was set before it was summed; set the gradient "
                "of job.model's own parameter"
            )

    def sync_cleared_grads(self) -> None:
        """Clear the gradient at both tensors, if the user has cleared it at one."""
        unsharded_grad, sharded_grad = self.unsharded.grad, self.sharded.grad
        if self.grad_place is GradPlace.NOWHERE:
            if sharded_grad is not None:  # the user has set it
                self.mark_grad_at_shard()
        elif unsharded_grad is None or sharded_grad is None:
            self.unsharded.grad = self.sharded.grad = None
            self.grad_place = GradPlace.NOWHERE
        elif self.grad_place is GradPlace.SHARDED and not isinstance(unsharded_grad, GradElsewhere):
            self.mark_grad_at_shard()  # in place of the user's tensor
            if unsharded_grad.any():
                raise UserError(
                    f"the gradient of {self.name} was replaced when it was already summed and "
                    "sharded; change the gradients of job.parameters()"
                )
            sharded_grad.zero_()
