"""A group of sharded parameters: those of one unit and dtype, gathered and reduced as one message.

    sharded = [ rows of a | rows of b | ... ]                       this rank's shards
    total   = [ gradient of these rows of a | of b | ... | flags ]  a flag for each: who used it

Shards are as long on every rank; one that has fewer rows than others has padding at its end.

    parameters   SHARDED  -- issue_unshard -->  GATHERING  -- wait_unshard -->  UNSHARDED
                    ^------------------------- reshard -----------------------------'
    gradients    NONE  -- expect_grads -->  EXPECTED  -- the last is in -->  COMPLETE
                    ^------------------ issue_reduce, wait_reduce -------------------'

A reduction may be in flight while the next gradients are expected already.
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
from dist_lab.parallel.sharded.unsharded import shard_value, take_over
from dist_lab.transforms.offload import Make


class Params(Enum):
    """Where the unsharded parameters of a group are."""

    SHARDED = auto()  # nowhere
    GATHERING = auto()  # on their way
    UNSHARDED = auto()  # in the modules


class Grads(Enum):
    """What backward has still to bring for the next reduction of a group."""

    NONE = auto()  # nothing is owed
    EXPECTED = auto()  # gradients
    COMPLETE = auto()  # no more: they may be reduced


@final
class ParamGroup:
    """Parameters that are unsharded together, and whose gradients are reduced together.

    Args:
        slots: name -> where the model holds it.
        dtypes: of what is kept, and of what is gathered and computed with.
        axis, gather_axis: where gradients and parameters travel.
        full_value: gives the whole of a parameter; each is asked for, and let go, in turn.
        keep: makes the memory for the shards, where that is not the memory for compute.

    Attributes:
        users: units that are open and need the parameters.
        visits: of its unit in forward, which backward has still to come through.
        reduce_dtype: that gradients are summed in.
        written: parameters that forwards have written to, and a digest of what they are then.
    """

    def __init__(
        self,
        unit: str,
        slots: Mapping[str, list[ParamSlot]],
        dtypes: tuple[torch.dtype, torch.dtype],
        axis: Axis,
        gather_axis: Axis,
        full_value: Callable[[str], Tensor],
        keep: Make | None,
    ) -> None:
        self.unit, self.axis, self.gather_axis = unit, axis, gather_axis
        self.kept_dtype, self.compute_dtype = dtypes
        self.reduce_dtype = self.kept_dtype
        shapes = {name: parameter_at(own).shape for name, own in slots.items()}
        lengths = {name: shard_length(shape, axis.size) for name, shape in shapes.items()}
        memory, self.sent = self._memory(sum(lengths.values()), keep)
        self.sharded = FlatBuffer(memory, {name: (n,) for name, n in lengths.items()}, self.label)
        like = torch.empty(0, dtype=self.compute_dtype, device=axis.device)
        self.params: list[ShardedParam] = []
        for name, own in slots.items():
            value = shard_value(full_value(name), axis)
            shard = self.sharded.views[name][: value.numel()].view(value.shape).copy_(value)
            param = shard_param(name, own, shard, shapes[name], lengths[name], like)
            self.params.append(param)
            del value  # or it would be there still when the next one is asked for
        self.trained = [param for param in self.params if param.trained]
        self.sharded_grads = ShardedGrads(self.trained, memory.dtype, memory.device, self.label)
        self.state, self.grads = Params.SHARDED, Grads.NONE
        self.users: set[str] = set()
        self.written: dict[str, int] = {}
        self.visits = 0
        self.missing: set[str] = set()  # gradients that are to come before it is COMPLETE
        self.incoming: FlatBuffer | None = None  # the reduction in flight
        self.incoming_counts = True  # it was not given up since

    def _memory(self, length: int, keep: Make | None) -> tuple[Tensor, Tensor | None]:
        """The memory of the shards, and of what others read where that is not made at each gather.

        They are one where shards are computed with as they are kept.
        """
        if keep:
            return keep(length, self.kept_dtype), None
        sent = ops.shared_buffer(length, self.compute_dtype, self.gather_axis)
        if self.kept_dtype == self.compute_dtype:
            return sent, sent
        kept = torch.zeros(length, dtype=self.kept_dtype, device=self.axis.device)
        return kept, sent

    @property
    def label(self) -> str:
        return self.unit or "root"

    def check(self) -> None:
        """See that the shards are in place."""
        for param in self.params:
            param.check(self.sharded.memory)

    def freeze_alike(self) -> None:
        """A forward or backward begins: a parameter may have been frozen since the last."""
        for param in self.params:
            param.freeze_alike()

    # --- parameters: W[D_X, F] -> W[D, F] ---------------------------------------------------------

    def issue_unshard(self) -> bool:
        """Returns whether there was a need to."""
        if self.state is not Params.SHARDED:
            return False
        self.state = Params.GATHERING
        with torch.inference_mode(False):  # backward may read what a gather in the mode has left
            rows = [param.allocate(self.axis.size) for param in self.params]
        self.sharded.issue(
            lambda _, axis: ops.all_gather_coalesced(rows, self._to_send(), axis), self.gather_axis
        )
        return True

    def _to_send(self) -> Tensor:
        if self.sent is None:
            return self.sharded.memory.to(self.gather_axis.device, self.compute_dtype)
        if self.sent is not self.sharded.memory:
            self.wait_for_readers()
            self.sent.copy_(self.sharded.memory)
        return self.sent

    def wait_unshard(self) -> None:
        """Wait for a gather, if there is one."""
        if self.state is Params.GATHERING:
            self.sharded.wait()
            self.state = Params.UNSHARDED
            for param in self.params:
                param.show()

    def reshard(self) -> None:
        """Let go of the memory of the unsharded parameters."""
        self.wait_unshard()  # what is still being written must not be somebody else's memory
        if self.state is Params.UNSHARDED:
            self.keep_written()
            self.state = Params.SHARDED
            for param in self.params:
                param.hide()
                param.free()

    def keep_written(self) -> None:
        """Take over into the shards what a forward has written by `.data`."""
        pairs = ((param.unsharded, self.sharded.views[param.name]) for param in self.params)
        self.written |= take_over(pairs, self.axis, self.wait_for_readers)

    def take_written(self) -> Iterable[tuple[str, int]]:
        """What was written since the last call, each with its digest."""
        self.keep_written()
        written, self.written = self.written, {}
        return written.items()

    def wait_for_readers(self) -> None:
        """Wait until no rank reads what is about to be written."""
        if self.sent is not None:
            ops.wait_for_readers(self.sent, self.gather_axis)

    # --- gradients: dW[D, F]{U_X} -> dW[D_X, F] ---------------------------------------------------

    def expect_grads(self) -> None:
        """A forward was here, so a backward will be. What is frozen now gets no gradient."""
        self.missing = {p.name for p in self.trained if p.unsharded.requires_grad}
        self.grads = Grads.EXPECTED if self.missing else Grads.COMPLETE

    def grad_arrived(self, name: str) -> None:
        self.missing.discard(name)
        if not self.missing:
            self.grads = Grads.COMPLETE

    def visit_is_over(self) -> None:
        """Backward has left its unit. After the last visit what did not come will not."""
        self.visits = max(self.visits - 1, 0)
        if not self.visits:
            self.no_more_grads()

    def no_more_grads(self) -> None:
        if self.grads is Grads.EXPECTED:
            self.grads = Grads.COMPLETE

    def issue_reduce(self, staging: Tensor) -> None:
        """Give away this micro-batch's gradients."""
        grads = [param.unsharded.grad for param in self.trained]
        used = torch.tensor([grad is not None for grad in grads], device=staging.device)
        xs = [*grads, used.repeat(self.axis.size)]
        lengths = [*(param.length for param in self.trained), len(used)]
        memory = torch.empty(
            self.sharded_grads.length, dtype=self.kept_dtype, device=staging.device
        )
        self.incoming, self.incoming_counts = self.sharded_grads.buffer(memory), True
        self.incoming.issue(
            lambda out, axis: ops.reduce_scatter_coalesced(out, xs, lengths, staging, axis),
            self.axis,
        )
        self.grads = Grads.NONE
        for param in self.trained:
            param.unsharded.grad = None

    def wait_reduce(self) -> None:
        """Wait for a reduction, and add it to those of the micro-batches before."""
        assert self.incoming is not None, self.label
        self.incoming.wait()
        incoming, self.incoming = self.incoming, None
        if self.incoming_counts:
            self.sharded_grads.add(incoming)

    def forget(self) -> None:
        """The step was broken off. A reduction in flight is waited for before the next."""
        for param in self.trained:
            param.unsharded.grad = None
        self.grads, self.visits, self.incoming_counts = Grads.NONE, 0, False
        self.users.clear()
        self.reshard()
        self.written = {}

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for param in self.params:
            if param.rows is not None:
                yield "gathered", param.rows
            if param.unsharded.grad is not None:
                yield "gradients", param.unsharded.grad
        if self.sent is not None and self.sent is not self.sharded.memory:
            yield "buffers", self.sent
        for buffer in (self.sharded_grads.total, self.incoming if self.incoming_counts else None):
            if buffer is not None:
                yield "gradients", buffer.memory
