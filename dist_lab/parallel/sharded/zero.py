"""ZeRO 1 and 2: ddp, with the optimizer's work and state sharded over the ranks.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]     dW{U_dp} -> dW[E_dp]   bucket by bucket, in backward
                                              W[E_dp] -> W           after the step

In ddp all ranks keep the same optimizer state and take the same step. Here parameters lie side by
side in buckets of E elements, and each rank steps on 1/N of every bucket, its shard. A rank needs
the summed gradient of its shard only, and sends the new values to the other ranks.

    with Adam, for P parameters      elements sent in a step of k         bytes per rank in float32:
    on N ranks                       micro-batches, times (N-1)/N         params + grads + Adam's
    stage 1                          P + P                                4P + 4P + 8P/N
    stage 2: gradients are sharded   kP + P                               4P + 4P/N + 8P/N, and two
    after each micro-batch                                                buckets
    stage 2, deferred (pipelines)    P + P                                4P + 4P + 8P/N

P includes the padding of the buckets. Each step also sums one flag per parameter. Without shared
memory between ranks, a reduce-scatter receives gradients in a second buffer of the same size.
Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), sections 5.1 and 5.2.

The model's own parameters are always unsharded. `job.parameters()` returns the shards as vectors.
So the optimizer must treat each element by itself, as SGD and Adam do, or be one of matrices, which
brings them to owners: see optim/. One of a parameter's two tensors has the gradient, and the
`.grad` of the other one is a placeholder: see step/grad_elsewhere.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import FlatBuffer
from dist_lab.parallel.sharded.param_bucket import ParamBucket, shard_in_buckets
from dist_lab.step.protocol import ROOT, Applied, Chain, Phase, Sync
from dist_lab.step.setup import Setup


def stage1(setup: Setup, *, bucket_mb: float = 25.0) -> Applied:
    """Shard the optimizer. Gradients are summed after the last micro-batch.

    Args:
        bucket_mb: the most MiB that a bucket holds; a larger parameter has a bucket of its own.
    """
    layouts, groups = shard_in_buckets(setup, bucket_mb)
    return _applied(
        layouts,
        [
            ZeroSync(setup.axis, units, [Stage1Bucket(params) for params in buckets])
            for units, buckets in groups.items()
        ],
    )


def stage2(setup: Setup, *, bucket_mb: float = 25.0, defer_reduce: bool | None = None) -> Applied:
    """Shard the optimizer and the gradients. Gradients are summed after each micro-batch.

    Args:
        defer_reduce: keep full gradients, and sum them after the last micro-batch. On by default in
            a pipeline, where micro-batches overlap.
    """
    defer = setup.stages is not None if defer_reduce is None else defer_reduce
    layouts, groups = shard_in_buckets(setup, bucket_mb)
    syncs = []
    for units, buckets in groups.items():
        longest = {b.dtype: b.numel for b in sorted(buckets, key=lambda bucket: bucket.numel)}
        staging = {d: ops.shared_buffer(numel, d, setup.axis) for d, numel in longest.items()}
        of_units = [Stage2Bucket(params, staging[params.dtype]) for params in buckets]
        sync = ZeroSync(setup.axis, units, of_units, [*staging.values()], each_microbatch=not defer)
        syncs.append(sync)
    return replace(_applied(layouts, syncs), reduce_each_microbatch=not defer)


def _applied(layouts: dict[str, Layout], syncs: "list[ZeroSync]") -> Applied:
    buckets = [bucket.params for sync in syncs for bucket in sync.buckets]
    stepped = {name: shard for params in buckets for name, shard in params.shards.items()}
    return Applied(layouts, Chain(*syncs), stepped=stepped)


ZeroBucket: TypeAlias = "Stage1Bucket | Stage2Bucket"


class ZeroSync(Sync):
    """Reduces a bucket when it and all earlier ones are complete: one order on every rank.

    The ranks agree in `finish()` on which parameters were used. A parameter that no rank used keeps
    `grad is None`. `units`: in a pipeline, the stages whose backward computes these gradients.
    """

    def __init__(
        self, axis: Axis, units: Sequence[str], buckets: Sequence[ZeroBucket],
        staging: Sequence[Tensor] = (), *, each_microbatch: bool = False,
    ) -> None:  # fmt: skip
        self.axis, self.units, self.buckets, self.staging = axis, units, buckets, staging
        # Whether gradients are summed after each micro-batch, or only after the last.
        self.each_microbatch = each_microbatch
        self.bucket_index = {name: i for i, b in enumerate(buckets) for name in b.params.shards}
        self.flags = ops.shared_buffer(len(self.bucket_index), torch.float32, axis)
        self.last = True  # this micro-batch is the last of the step
        self.issued = 0  # the number of buckets that were issued
        self.saw_grads_ready = False  # grads_ready() was called in this micro-batch
        self.in_flight: list[ZeroBucket] = []

    def microbatch(self, *, last: bool) -> None:
        # The micro-batch that ends was not the last. In a pipeline backward_done comes instead.
        if self.each_microbatch and not self.last and not self.units:
            self._reduce_rest()
            self._start_over()
        self.last = last

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            for bucket in self.buckets:
                bucket.params.sync_user_changes(phase)
            if phase is Phase.FORWARD and any(bucket.params.is_outdated for bucket in self.buckets):
                self.after_step()  # the user has written to the shards, on every rank

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            # Reduce now, because other ranks wait in their backward. Do not reduce after a backward
            # without gradients, such as `autograd.grad` of the inputs for a term of the loss.
            if self.each_microbatch and self.saw_grads_ready and not self.units:
                self._reduce_rest()
            for bucket in self.buckets:
                bucket.params.show_placeholders()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        names = [name for name in names if name in self.bucket_index]
        self.saw_grads_ready = True
        for name in names:
            index = self.bucket_index[name]
            if index < self.issued:
                self.buckets[index].params.leaves[name].grad = None
                raise UserError(
                    f"backward has reached {name} again after its gradient was sent: add up the "
                    "losses and call backward once, or give each backward a job.microbatch of its "
                    "own; if you skip an optimizer step, call job.finish() before zero_grad()"
                )
            bucket = self.buckets[index]
            if isinstance(bucket, Stage1Bucket):  # stage 2 copies it when the bucket is issued
                bucket.copy_in(name)
            elif not self.each_microbatch:
                bucket.params.param_of[name].mark_grad_at_unsharded()
            if last or self.each_microbatch:
                bucket.params.arrivals.ready.add(name)
        if len(self.units) > 1:  # several stages: wait for backward_done, in one order on all ranks
            return
        while (pending := self.buckets[self.issued :]) and pending[0].params.arrivals.complete:
            self._issue()

    def backward_done(self, unit: str, *, last: bool) -> None:
        all_done = unit == (self.units[0] if len(self.units) == 1 else ROOT)
        if all_done and (last or (self.each_microbatch and unit != ROOT)):
            while self.issued < len(self.buckets):
                self._issue()
            if not last:
                self._wait_in_flight()
                self._start_over()
                for bucket in self.buckets:
                    bucket.params.drop_placeholders()  # the next backward adds to these gradients

    def _issue(self) -> None:
        if self.staging:
            self._wait_in_flight()  # so one send buffer and one bucket's result exist at a time
        bucket = self.buckets[self.issued]
        bucket.issue()
        self.in_flight.append(bucket)
        self.issued += 1

    def _wait_in_flight(self) -> None:
        for bucket in self.in_flight:
            bucket.wait()
        self.in_flight = []

    def _reduce_rest(self) -> None:
        """Reduce the remaining buckets after backward. Gradients that did not come count as 0."""
        while self.issued < len(self.buckets):
            self._issue()
        self._wait_in_flight()

    def _start_over(self) -> None:
        self.issued, self.saw_grads_ready = 0, False
        for bucket in self.buckets:
            bucket.params.arrivals.ready = set()

    def finish(self) -> None:
        for bucket in self.buckets[: self.issued]:
            bucket.params.refuse_set_late(bucket.used)
        for bucket in self.buckets:
            bucket.params.sync_cleared_grads()
        self._reduce_rest()
        self._start_over()
        used = self._used_by_some_rank()
        for bucket in self.buckets:
            bucket.assign_grads(used & bucket.params.shards.keys())

    def _used_by_some_rank(self) -> set[str]:
        """The parameters that some rank has used."""
        if not self.bucket_index:
            return set()
        flags = [n in bucket.used for bucket in self.buckets for n in bucket.params.shards]
        self.flags.copy_(torch.tensor(flags))
        ops.all_reduce_into(self.flags, self.axis).wait()
        return {n for n, count in zip(self.bucket_index, self.flags.tolist(), strict=True) if count}

    def settle(self) -> None:
        for bucket in self.buckets:
            bucket.params.look_for_frozen()
            bucket.params.sync_cleared_grads()
            bucket.params.restore_memory()

    def after_step(self) -> None:
        for bucket in self.buckets:
            bucket.params.issue_gather()
        for bucket in self.buckets:
            bucket.params.wait_gather()

    def forget(self) -> None:
        self._wait_in_flight()
        self._start_over()
        self.last = True
        for bucket in self.buckets:
            bucket.forget()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("buffers", buffer) for buffer in (self.flags, *self.staging))
        yield from (("gradients", t) for bucket in self.buckets for t in bucket.extra_memory())


@final
class Stage1Bucket:
    """A bucket of unsharded gradients. Micro-batches add to it; it is reduced in place, once."""

    def __init__(self, params: ParamBucket) -> None:
        self.params = params
        gradients = ops.shared_buffer(params.numel, params.dtype, params.axis)
        self.gradients = params.buffer_of(gradients)
        self.sums = params.shard_buffer_of(params.shard_of(gradients))
        self.used: set[str] = set()  # names of parameters that this rank used

    def copy_in(self, name: str) -> None:
        """Move the gradient of this micro-batch into the bucket's memory, unless it is there."""
        param = self.params.param_of[name]
        if param.unsharded.grad is not self.gradients.views[name]:
            param.mark_grad_at_unsharded()
            self.gradients.copy_in(name, param.unsharded)

    def issue(self) -> None:
        """dW{U_dp} -> dW[E_dp]"""
        for param in self.params.params:
            param.refuse_set_shard_grad()
        self.params.drop_placeholders()
        kept = self.params.names_with_grad()
        self.used = kept | {n for n, p in self.params.leaves.items() if p.grad is not None}
        self.gradients.copy_in_all(self.params.leaves)
        for name in self.used:
            self.params.param_of[name].mark_grad_in_flight()
        self.gradients.issue(partial(ops.reduce_scatter_into, self.sums.memory), self.params.axis)

    def wait(self) -> None:
        self.gradients.wait()

    def assign_grads(self, names: set[str]) -> None:
        """Assign the sums, and wait until the next backward may write to `gradients`."""
        self.used = names
        self.params.assign_grads(self.sums, names)
        self.params.wait_for_readers()
        ops.wait_for_readers(self.gradients.memory, self.params.axis)

    def forget(self) -> None:
        self.params.clear_in_flight()
        self.params.show_placeholders()  # as in ddp, the gradients of earlier micro-batches stay

    def extra_memory(self) -> Iterator[Tensor]:
        yield self.gradients.memory


@final
class Stage2Bucket:
    """A bucket of sharded gradients, reduced after each micro-batch and added to the shard's sums.

    Unless this is deferred, ranks wait for each other in backward of each micro-batch, so all must
    have the same number of them.
    """

    def __init__(self, params: ParamBucket, staging: Tensor) -> None:
        self.params, self.staging = params, staging
        self.packed = params.buffer_of(staging[: params.numel])
        self.sums: FlatBuffer | None = None
        self.incoming: Tensor | None = None
        self.used: set[str] = set()  # used by this rank; in earlier steps, by any rank

    def issue(self) -> None:
        """dW{U_dp} -> dW[E_dp]"""
        ops.wait_for_readers(self.staging, self.params.axis)
        self.params.drop_placeholders()
        self.params.drop_shard_placeholders()
        used = {name for name, leaf in self.params.leaves.items() if leaf.grad is not None}
        kept = self.params.names_with_grad()
        self.used = used | (kept if self.sums is None else self.used & kept)
        self.packed.copy_in_all(self.params.leaves)
        self.params.drop_leaf_grads()
        self.incoming = torch.empty_like(self.params.sharded.memory)
        collective = partial(ops.reduce_scatter_into, self.incoming, memory=self.staging)
        self.packed.issue(collective, self.params.axis)

    def wait(self) -> None:
        """Add this micro-batch's sums to those of earlier ones."""
        self.packed.wait()
        incoming, self.incoming = self.incoming, None
        assert incoming is not None
        if self.params.names_with_grad():
            if self.sums is None:  # the user has set these gradients
                self.sums = self.params.shard_buffer_of(torch.zeros_like(incoming))
            for name, view in self.sums.views.items():
                grad = self.params.shards[name].grad
                if grad is None:  # the user cleared it
                    view.zero_()
                elif grad.data_ptr() != view.data_ptr():  # the user replaced it
                    view.copy_(grad)
            self.sums.memory.add_(incoming)
        else:
            self.sums = self.params.shard_buffer_of(incoming)
        # Also for unused parameters: from now on `grad is None` means that the user cleared it.
        self.params.assign_grads(self.sums, set(self.params.shards))

    def assign_grads(self, names: set[str]) -> None:
        """Assign the sums of all micro-batches: see ParamBucket.assign_grads."""
        assert self.sums is not None, self.params.label
        self.used = names
        self.params.assign_grads(self.sums, names)
        self.params.wait_for_readers()

    def forget(self) -> None:
        self.params.drop_leaf_grads()
        self.params.show_placeholders()

    def extra_memory(self) -> Iterator[Tensor]:
        if self.sums is not None:
            yield self.sums.memory
        if self.incoming is not None:
            yield self.incoming
