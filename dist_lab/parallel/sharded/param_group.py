"""A group of sharded parameters of one unit and dtype, gathered and reduced as one message.

    sharded  = [ rows of a | rows of b | ... ]                   this rank's shards
    incoming = [ gradient of a's rows | of b's | ... | flags ]   result of the reduce-scatter

A shard has the same length on every rank: where a rank has fewer rows, padding follows them.
Incoming gradients are added to those of earlier micro-batches: see sharded_grads.py.

    parameters   SHARDED  -- issue_unshard -->  GATHERING  -- wait_unshard -->  UNSHARDED
                    ^------------------------- reshard -----------------------------'
    gradients    NONE  -- expect_grads -->  EXPECTED  -- the last one came -->  COMPLETE
                    ^------------------- issue_reduce, wait_reduce -------------------'

The next micro-batch's gradients may be expected while a reduction is still in flight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, auto
from typing import final

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import FlatBuffer
from dist_lab.parallel.param_slots import ParamSlot, parameter_at
from dist_lab.parallel.sharded.sharded_grads import ShardedGrads
from dist_lab.parallel.sharded.sharded_param import ShardedParam, shard_length, shard_param
from dist_lab.parallel.sharded.unsharded import copy_writes_to_shards, shard_value
from dist_lab.step.grad_elsewhere import GradElsewhere, real_grad
from dist_lab.step.setup import AllGather
from dist_lab.transforms.offload import Make


class Params(Enum):
    """Whether the parameters of a group are unsharded."""

    SHARDED = auto()
    GATHERING = auto()  # an all-gather is in flight
    UNSHARDED = auto()  # the modules hold the unsharded tensors


class Grads(Enum):
    """Whether a group's gradients can be reduced."""

    NONE = auto()  # no gradients are expected
    EXPECTED = auto()  # backward has not computed all of them yet
    COMPLETE = auto()  # they can be reduced


@final
class ParamGroup:
    """Parameters that are unsharded together, and whose gradients are reduced together.

    Args:
        slots: name -> where the model holds the parameter.
        dtypes: (dtype of the shards, dtype of the all-gather and of compute).
        axis, gather_axis: the axes of the reduce-scatter and of the all-gather.
        full_value: name -> the unsharded value; called, and its result freed, one by one.
        make_memory: allocates offloaded shards; None: they are not offloaded.
        slot_length: see Setup.

    Attributes:
        sent: send buffer of the all-gather; None: each all-gather sends a new copy.
        users: units in forward or backward that need the parameters.
        visits: number of forwards through the group's unit whose backward has not ended.
        all_gather: `ops.all_gather_coalesced`, or one in codes: see quantize/lowp/gather.py.
        reduce_dtype: the dtype in which gradients are summed.
        written: name -> digest, of the parameters that forwards have written to by `.data`.
    """

    def __init__(
        self,
        unit: str,
        slots: Mapping[str, list[ParamSlot]],
        dtypes: tuple[torch.dtype, torch.dtype],
        axis: Axis,
        gather_axis: Axis,
        full_value: Callable[[str], Tensor],
        make_memory: Make | None,
        slot_length: Callable[[int, torch.dtype, int], int],
    ) -> None:
        self.unit, self.axis, self.gather_axis = unit, axis, gather_axis
        self.shard_dtype, self.compute_dtype = dtypes
        self.reduce_dtype = self.shard_dtype
        self.all_gather: AllGather = ops.all_gather_coalesced
        shapes = {name: parameter_at(places).shape for name, places in slots.items()}
        longest = {name: shard_length(shape, axis.size) for name, shape in shapes.items()}
        lengths = {n: slot_length(k, dtypes[0], axis.size) for n, k in longest.items()}
        self.lengths = list(lengths.values())
        memory, self.sent = self._allocate(sum(self.lengths), make_memory)
        self.sharded = FlatBuffer(memory, {name: (n,) for name, n in lengths.items()}, self.label)
        like = torch.empty(0, dtype=self.compute_dtype, device=axis.device)
        self.params: list[ShardedParam] = []
        for name, places in slots.items():
            value = shard_value(full_value(name), axis)
            shard = self.sharded.views[name][: value.numel()].view(value.shape).copy_(value)
            param = shard_param(name, places, shard, shapes[name], lengths[name], like)
            self.params.append(param)
            del value  # so that it is freed before the next one is made
        self.trained = [param for param in self.params if param.trained]
        self.sharded_grads = ShardedGrads(self.trained, memory.dtype, memory.device, self.label)
        self.state, self.grads = Params.SHARDED, Grads.NONE
        self.users: set[str] = set()
        self.written: dict[str, int] = {}
        self.visits = 0
        self.unreduced: list[ShardedParam] = []  # with a placeholder at the shard
        self.missing_grads: set[str] = set()  # parameters with an EXPECTED gradient
        self.incoming: FlatBuffer | None = None  # the result of the reduction in flight
        self.keep_incoming = True  # False: drop it, because the step was aborted

    def _allocate(self, length: int, make_memory: Make | None) -> tuple[Tensor, Tensor | None]:
        """Memory of the shards, and of `sent`: the same if the shards are in the compute dtype."""
        if make_memory:
            return make_memory(length, self.shard_dtype), None
        sent = ops.shared_buffer(length, self.compute_dtype, self.gather_axis)
        if self.shard_dtype == self.compute_dtype:
            return sent, sent
        kept = torch.zeros(length, dtype=self.shard_dtype, device=self.axis.device)
        return kept, sent

    @property
    def label(self) -> str:
        return self.unit or "root"

    def check_in_memory(self) -> None:
        """Raise UserError if a shard is not in the group's memory any more."""
        for param in self.params:
            param.check_in_memory(self.sharded.memory)

    def sync_requires_grad(self) -> None:
        """Note which parameters the user has frozen or unfrozen since the last forward."""
        for param in self.params:
            param.sync_requires_grad()

    # --- parameters: W[D_X, F] -> W[D, F] ---------------------------------------------------------

    def issue_unshard(self) -> bool:
        """Issue the all-gather. Returns False if there is no need for one."""
        if self.state is not Params.SHARDED:
            return False
        with torch.inference_mode(False):  # backward may use memory gathered in inference mode
            self.sharded.issue(self._gather, self.gather_axis)
        self.state = Params.GATHERING  # not before: a failed launch has nothing to wait for
        return True

    def _gather(self, memory: Tensor, axis: Axis) -> ops.Pending:
        sent = self._to_send()
        if axis.size == 1 and self.sent is not None:  # the shards are whole: nothing is copied
            for param, shard in zip(self.params, sent.split(self.lengths), strict=True):
                param.use_rows(shard[None])
            return ops.Pending(sent)
        rows = [param.use_rows(param.new_rows(axis.size)) for param in self.params]
        return self.all_gather(rows, sent, axis)

    def _to_send(self) -> Tensor:
        """This rank's shards, in the dtype of compute."""
        if self.sent is None:
            return self.sharded.memory.to(self.gather_axis.device, self.compute_dtype)
        if self.sent is not self.sharded.memory:
            self.wait_for_readers()
            self.sent.copy_(self.sharded.memory)
        return self.sent

    def wait_unshard(self) -> None:
        """Wait for the all-gather, if one is in flight."""
        if self.state is Params.GATHERING:
            self.sharded.wait()
            self.state = Params.UNSHARDED
            for param in self.params:
                param.show()

    def reshard(self) -> None:
        """Free the memory of the unsharded parameters."""
        self.wait_unshard()  # or the gather would go on writing to freed memory
        if self.state is Params.UNSHARDED:
            self.collect_written()
            self.state = Params.SHARDED
            for param in self.params:
                param.hide()
                param.free()

    def collect_written(self) -> None:
        """Copy the values that a forward has written by `.data` into the shards."""
        pairs = ((param.unsharded, self.sharded.views[param.name]) for param in self.params)
        self.written |= copy_writes_to_shards(pairs, self.axis, self.wait_for_readers)

    def pop_written(self) -> Iterable[tuple[str, int]]:
        """(name, digest) of each parameter that was written to since the last call."""
        self.collect_written()
        written, self.written = self.written, {}
        return written.items()

    def wait_for_readers(self) -> None:
        """Wait until no rank reads this rank's shards, so that they may be written."""
        if self.sent is not None:
            ops.wait_for_readers(self.sent, self.gather_axis)

    # --- gradients: dW[D, F]{U_X} -> dW[D_X, F] ---------------------------------------------------

    def expect_grads(self) -> None:
        """Expect a gradient for each parameter that is not frozen: a forward used the group."""
        self.missing_grads = {p.name for p in self.trained if p.unsharded.requires_grad}
        self.grads = Grads.EXPECTED if self.missing_grads else Grads.COMPLETE

    def grad_arrived(self, name: str) -> None:
        self.missing_grads.discard(name)
        if not self.missing_grads:
            self.grads = Grads.COMPLETE

    def visit_ended(self) -> None:
        """Backward has left the unit. After its last visit, no more gradients come."""
        self.visits = max(self.visits - 1, 0)
        if not self.visits:
            self.expect_no_more_grads()

    def expect_no_more_grads(self) -> None:
        if self.grads is Grads.EXPECTED:
            self.grads = Grads.COMPLETE

    def mark_unreduced(self) -> None:
        """Put a placeholder at each shard whose unsharded gradient is kept for a later reduction.

        So a user may clear the gradients meanwhile: see step/grad_elsewhere.py.
        """
        for param in self.trained:
            if param.unsharded.grad is not None and param.sharded.grad is None:
                advice = f"the gradient of {param.name} is not summed yet: call job.finish() first"
                GradElsewhere.stand_at(param.sharded, param.unsharded, advice)
                self.unreduced.append(param)

    def sync_cleared(self) -> None:
        """Remove the placeholders, and clear the gradients whose placeholder the user has."""
        for param in self.unreduced:
            if isinstance(param.sharded.grad, GradElsewhere):
                param.sharded.grad = None
            else:
                param.unsharded.grad = None
        self.unreduced.clear()

    def issue_reduce(self, staging: Tensor) -> None:
        """Issue the reduce-scatter of this micro-batch's gradients, and free them."""
        self.sync_cleared()
        grads = [param.unsharded.grad for param in self.trained]
        used = torch.tensor([grad is not None for grad in grads], device=staging.device)
        xs = [*grads, used.repeat(self.axis.size)]
        lengths = [*(param.length for param in self.trained), len(used)]
        length = self.sharded_grads.length
        memory = torch.empty(length, dtype=self.shard_dtype, device=staging.device)
        self.incoming, self.keep_incoming = self.sharded_grads.buffer(memory), True
        self.incoming.issue(
            lambda out, axis: ops.reduce_scatter_coalesced(out, xs, lengths, staging, axis),
            self.axis,
        )
        self.grads = Grads.NONE
        for param in self.trained:
            param.unsharded.grad = None

    def wait_reduce(self) -> None:
        """Wait for the reduce-scatter, and add its result to those of earlier micro-batches."""
        assert self.incoming is not None, self.label
        self.incoming.wait()
        incoming, self.incoming = self.incoming, None
        if self.keep_incoming:
            self.sharded_grads.add(incoming)

    def forget(self) -> None:
        """Drop the gradients of an aborted step, and the result of a reduction in flight."""
        self.sync_cleared()
        for param in self.trained:
            param.unsharded.grad = None
        self.grads, self.visits, self.keep_incoming = Grads.NONE, 0, False
        self.users.clear()
        self.reshard()
        self.written = {}

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for param in self.params:
            if param.rows is not None:
                yield "gathered", param.rows
            if (gradient := real_grad(param.unsharded)) is not None:
                yield "gradients", gradient
        if self.sent is not None and self.sent is not self.sharded.memory:
            yield "buffers", self.sent
        for buffer in (self.sharded_grads.total, self.incoming if self.keep_incoming else None):
            if buffer is not None:
                yield "gradients", buffer.memory
