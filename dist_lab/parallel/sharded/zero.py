"""ZeRO 1 and 2: ddp, of which each rank takes a shard of the optimizer's work.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]     dW{U_dp} -> dW[E_dp]   bucket by bucket, in backward
                                              W[E_dp] -> W           after the step

All ranks of ddp keep the same moments, and take the same step with them. Here parameters lie side
by side in buckets, and of each bucket a rank steps on 1/N: it needs the summed gradient of this
shard and no more, and gives the new values to the others. E are the elements of a bucket.

                                     sent in a step of k micro-batches,   bytes per rank, float32
    for P parameters, Adam:          elements times (N-1)/N               and N ranks
    stage 1                          P + P                                4P + 4P + 8P/N
    stage 2: gradients are sharded,  kP + P                               4P + 4P/N + 8P/N, and two
    each micro-batch's at once                                            buckets

for parameters, gradients and moments. P counts each bucket's padding; a number for each parameter
is summed besides. Gradients that travel by messages need as much memory again where they arrive.
Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), sections 5.1 and 5.2.

The model keeps its whole parameters, for good; `job.parameters()` has the shards, each a range of
elements, as a vector. So the optimizer must treat each element by itself, as SGD and Adam do; one
that looks at rows or norms of a matrix is for ddp. Where the gradient is not yet, or not any more,
something stands in its place: see step/grad_elsewhere.py.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import FlatBuffer
from dist_lab.parallel.sharded.param_bucket import ParamBucket, shard_in_buckets
from dist_lab.step.protocol import ROOT, Applied, Phase, Setup, Sync


def stage1(setup: Setup, *, bucket_mb: float = 25.0) -> Applied:
    """Shard the optimizer. Gradients are summed after the last micro-batch.

    Args:
        bucket_mb: a bucket is closed before it would hold more MiB than this; a larger parameter
            has one of its own.
    """
    layouts, buckets = shard_in_buckets(setup, bucket_mb)
    sync = ZeroSync(setup.axis, [Stage1Bucket(params) for params in buckets])
    return Applied(layouts, sync, stepped={n: t for b in buckets for n, t in b.sharded_params.items()})


def stage2(setup: Setup, *, bucket_mb: float = 25.0) -> Applied:
    """Shard the optimizer and the gradients, which are summed after each micro-batch."""
    layouts, buckets = shard_in_buckets(setup, bucket_mb)
    longest = {b.dtype: b.numel for b in sorted(buckets, key=lambda bucket: bucket.numel)}
    staging = {d: ops.shared_buffer(numel, d, setup.axis) for d, numel in longest.items()}
    stage2_buckets = [Stage2Bucket(params, staging[params.dtype]) for params in buckets]
    sync = ZeroSync(setup.axis, stage2_buckets, list(staging.values()))
    return Applied(layouts, sync, stepped={n: t for b in buckets for n, t in b.sharded_params.items()})


ZeroBucket: TypeAlias = "Stage1Bucket | Stage2Bucket"


class ZeroSync(Sync):
    """Issues each bucket as soon as it and all before it are full: one order on every rank.

    The ranks agree in `finish()` which parameters were used; one that no rank used keeps no grad.
    """

    def __init__(
        self, axis: Axis, buckets: Sequence[ZeroBucket], staging: Sequence[Tensor] = ()
    ) -> None:
        self.axis, self.buckets, self.staging = axis, buckets, staging
        # Whether gradients are summed after each micro-batch, or after the last.
        self.each_microbatch = not any(isinstance(bucket, Stage1Bucket) for bucket in buckets)
        self.bucket_index = {name: i for i, b in enumerate(buckets) for name in b.params.sharded_params}
        self.flags = ops.shared_buffer(len(self.bucket_index), torch.float32, axis)
        self.last = True  # no micro-batch follows the one that is under way
        self.issued = 0  # buckets
        self.saw_grads_ready = False  # which gradients this micro-batch has here, or that it has none
        self.in_flight: list[ZeroBucket] = []

    def microbatch(self, *, last: bool) -> None:
        if self.each_microbatch and not self.last:  # the one that is over was followed by others
            self._reduce_rest()
            self._start_over()
        self.last = last

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            for bucket in self.buckets:
                bucket.params.sync_user_changes(phase)
            if phase is Phase.FORWARD and any(bucket.params.is_outdated for bucket in self.buckets):
                self.after_step()  # a user has written to the shards, on every rank

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            # Now, because others wait for it in their backward. Not after one that brought no
            # gradient: `autograd.grad` by the inputs, say, of which the loss then has a term.
            if self.each_microbatch and self.saw_grads_ready:
                self._reduce_rest()
            for bucket in self.buckets:
                bucket.params.show_stand_ins()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.saw_grads_ready = True
        for name in names:
            place = self.bucket_index[name]
            if place < self.issued:
                self.buckets[place].params.unsharded_params[name].grad = None
                raise UserError(
                    f"backward has reached {name} again after its gradient was sent: add up the "
                    "losses and call backward once, or give each backward a job.microbatch of its "
                    "own; after a step that is not taken, call job.finish() before zero_grad()"
                )
            bucket = self.buckets[place]
            if isinstance(bucket, Stage1Bucket):  # of stage 2 it stays until it is sent
                bucket.copy_in(name)
            if last or self.each_microbatch:
                bucket.params.arrivals.ready.add(name)
        while (rest := self.buckets[self.issued :]) and rest[0].params.arrivals.complete:
            self._issue()

    def _issue(self) -> None:
        if self.each_microbatch:
            self._wait_in_flight()  # one staging is enough, and one bucket arrives at a time
        bucket = self.buckets[self.issued]
        bucket.issue()
        self.in_flight.append(bucket)
        self.issued += 1

    def _wait_in_flight(self) -> None:
        for bucket in self.in_flight:
            bucket.wait()
        self.in_flight = []

    def _reduce_rest(self) -> None:
        """Backward is over: what has not come on this rank will not."""
        while self.issued < len(self.buckets):
            self._issue()
        self._wait_in_flight()

    def _start_over(self) -> None:
        self.issued, self.saw_grads_ready = 0, False
        for bucket in self.buckets:
            bucket.params.arrivals.ready = set()

    def finish(self) -> None:
        for bucket in self.buckets:
            bucket.params.sync_cleared_grads()
        self._reduce_rest()
        self._start_over()
        used = self._used_somewhere()
        for bucket in self.buckets:
            bucket.assign_grads(used & bucket.params.sharded_params.keys())

    def _used_somewhere(self) -> set[str]:
        """The parameters that some rank has used."""
        if not self.bucket_index:
            return set()
        flags = [n in bucket.used for bucket in self.buckets for n in bucket.params.sharded_params]
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
        yield from (
            ("gradients", held) for bucket in self.buckets for held in bucket.extra_memory()
        )


@final
class Stage1Bucket:
    """Gradients lie side by side, micro-batches add to them, and a shard's sum comes in place."""

    def __init__(self, params: ParamBucket) -> None:
        self.params = params
        gradients = ops.shared_buffer(params.numel, params.dtype, params.axis)
        self.gradients = params.buffer_of(gradients)
        self.sums = params.shard_buffer_of(params.shard_of(gradients))
        self.used: set[str] = set()  # on this rank

    def copy_in(self, name: str) -> None:
        """A parameter's gradient holds this micro-batch. From now on its memory is ours."""
        param = self.params.param_of[name]
        if param.whole.grad is not self.gradients.views[name]:
            param.mark_grad_at_unsharded()
            self.gradients.copy_in(name, param.whole)

    def issue(self) -> None:
        """dW{U_dp} -> dW[E_dp]"""
        for param in self.params.params:
            param.refuse_set_shard_grad()
        self.params.drop_stand_ins()
        shown = self.params.names_with_grad()
        self.used = shown | {n for n, p in self.params.unsharded_params.items() if p.grad is not None}
        self.gradients.copy_in_all(self.params.unsharded_params)
        for name in self.used:
            self.params.param_of[name].mark_grad_in_flight()
        self.gradients.issue(partial(ops.reduce_scatter_into, self.sums.memory), self.params.axis)

    def wait(self) -> None:
        self.gradients.wait()

    def assign_grads(self, names: set[str]) -> None:
        """The sums are in: see ParamBucket.assign_grads. The next backward writes this memory."""
        self.used = names
        self.params.assign_grads(self.sums, names)
        self.params.wait_for_readers()
        ops.wait_for_readers(self.gradients.memory, self.params.axis)

    def forget(self) -> None:
        self.params.show_stand_ins()  # as under ddp, the gradients of earlier micro-batches stay

    def extra_memory(self) -> Iterator[Tensor]:
        yield self.gradients.memory


@final
class Stage2Bucket:
    """Gradients are copied to where they are sent from, and go; the sums of a shard add up.

    Ranks wait for each other in backward, and all go through the same number of micro-batches.
    """

    def __init__(self, params: ParamBucket, staging: Tensor) -> None:
        self.params, self.staging = params, staging
        self.packed = params.buffer_of(staging[: params.numel])
        self.sums: FlatBuffer | None = None
        self.incoming: Tensor | None = None
        self.used: set[str] = set()  # on this rank, or somewhere in a step before

    def issue(self) -> None:
        """dW{U_dp} -> dW[E_dp]"""
        ops.wait_for_readers(self.staging, self.params.axis)
        self.params.drop_stand_ins()
        used = {name for name, whole in self.params.unsharded_params.items() if whole.grad is not None}
        shown = self.params.names_with_grad()
        self.used = used | (shown if self.sums is None else self.used & shown)
        self.packed.copy_in_all(self.params.unsharded_params)
        self.params.drop_unsharded_grads()
        self.incoming = torch.empty_like(self.params.sharded.memory)
        collective = partial(ops.reduce_scatter_into, self.incoming, memory=self.staging)
        self.packed.issue(collective, self.params.axis)

    def wait(self) -> None:
        """Add what has come to the sums of the micro-batches before."""
        self.packed.wait()
        incoming, self.incoming = self.incoming, None
        assert incoming is not None
        if self.params.names_with_grad():
            if self.sums is None:  # what is there, a user has set
                self.sums = self.params.shard_buffer_of(torch.zeros_like(incoming))
            for name, view in self.sums.views.items():
                grad = self.params.sharded_params[name].grad
                if grad is None:  # cleared since
                    view.zero_()
                elif grad.data_ptr() != view.data_ptr():  # replaced since
                    view.copy_(grad)
            self.sums.memory.add_(incoming)
        else:
            self.sums = self.params.shard_buffer_of(incoming)
        # Of all, also of what was not used: from now on None says that it was cleared.
        self.params.assign_grads(self.sums, set(self.params.sharded_params))

    def assign_grads(self, names: set[str]) -> None:
        """The sums of all micro-batches are in: see ParamBucket.assign_grads."""
        assert self.sums is not None, self.params.label
        self.used = names
        self.params.assign_grads(self.sums, names)
        self.params.wait_for_readers()

    def forget(self) -> None:
        self.params.drop_unsharded_grads()
        self.params.show_stand_ins()

    def extra_memory(self) -> Iterator[Tensor]:
        if self.sums is not None:
            yield self.sums.memory
        if self.incoming is not None:
            yield self.incoming
