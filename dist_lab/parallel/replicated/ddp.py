"""DDP: gradients are summed in buckets, while backward is still computing.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

Backward computes gradients from the last layer to the first. Gradients that become ready one after
another share a flat buffer, a bucket. When the last gradient of a bucket is ready, its all_reduce
is issued, and backward goes on meanwhile. The first bucket is small, so that the network has work
early.

Cost per step, for P parameters, all of them used: 2 (N-1)/N (P + F) elements sent, F being one flag
per parameter and one per bucket, in about P / bucket_mb messages, for any number of micro-batches.
Memory per rank: all parameters, gradients and optimizer state. Gradients live in the buckets: the
first micro-batch's are copied in, later ones accumulate in place, and the sum is not copied out.
Li et al. 2020, "PyTorch Distributed: experiences on accelerating data parallel training"
(arXiv:2006.15704).

[Note: the first step] Before the first backward it is not known which parameters a model uses, nor
in which order backward reaches them. So the first step sums after backward. The ranks exchange
which gradients arrived, and in which order. The parameters that any rank has used are put into
buckets in that order. A parameter that no rank uses is never sent.

[Note: used elsewhere] Later steps may use other parameters, and ranks may differ. Each bucket has a
flag per parameter, 1 if this rank has used it, and the all_reduce adds the flags up as well. A
parameter that no rank has used in this step keeps `grad is None`; one that only other ranks have
used gets their gradient. One more flag reports a used parameter that is in no bucket yet; if any
rank sets it, all ranks make buckets for such parameters. As ranks may use different parameters, one
may issue a bucket in backward and another in `finish`, after other collectives. Only the order of
buckets is equal on all ranks, so they need a process group of their own (`mesh.channel`).

For edits of `.grad` and exceptions while a bucket is in flight, see in_flight.py.

For buffers, which are local to each rank, see [Note: buffers] in dist_lab/transforms/batchnorm.py.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dist_lab.comm.ops import all_gather, all_reduce_into, shared_buffer
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import (
    SET_LATE,
    Arrivals,
    FlatBuffer,
    bucket_label,
    group_into_buckets,
)
from dist_lab.parallel.replicated.in_flight import GradsInFlight
from dist_lab.step.protocol import ROOT, Applied, Phase, Sync
from dist_lab.step.setup import Setup


def apply(setup: Setup, *, bucket_mb: float = 25.0, first_bucket_mb: float = 1.0) -> Applied:
    """Sum the gradient of every trained parameter over the axis, in buckets.

    Args:
        bucket_mb, first_bucket_mb: the maximum size in MiB of a bucket, and of the first one; a
            larger parameter has a bucket to itself.
    """
    if not (bucket_mb > 0 and first_bucket_mb > 0):
        raise UserError(f"buckets of {first_bucket_mb} and {bucket_mb} MiB; give sizes above 0")
    axis = setup.axis
    limits = int(first_bucket_mb * 2**20), int(bucket_mb * 2**20)
    return Applied(setup.owing_sums(axis), BucketedAllReduce(setup, limits))


class BucketedAllReduce(Sync):
    """Issues a bucket once it and all earlier ones are complete: the same order on all ranks."""

    def __init__(self, setup: Setup, limits: tuple[int, int]) -> None:
        self.model, self.axis, self.limits = setup.model, setup.axis, limits
        self.stages_of, model = setup.stages_of, setup.model
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[str, Bucket] = {}  # parameter name -> the bucket of its gradient
        self.unassigned: dict[str, None] = {}  # used but not yet in a bucket, in arrival order
        self.issued = 0  # the number of buckets issued in this step

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            for bucket in self.buckets:
                bucket.arrivals.look_for_frozen()
                if phase is Phase.BACKWARD:  # autograd is about to add to the gradients
                    bucket.in_flight.refuse_lost()
                    bucket.in_flight.drop_placeholders()

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            for bucket in self.buckets:
                if bucket.gradients.in_flight:  # `unshard` may have dropped them
                    bucket.in_flight.show_placeholders()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            if name not in self.bucket_of:
                self.unassigned[name] = None
                continue
            bucket = self.bucket_of[name]
            if bucket.gradients.in_flight:
                raise UserError(
                    f"backward has reached {name} again after its gradient was sent: "
                    + bucket.in_flight.advice(name)
                )
            bucket.gradients.copy_in(name, bucket.parameters[name])
            if last:
                bucket.arrivals.ready.add(name)
        # finish() issues the last bucket: its last flag is known only after backward.
        while self.issued < len(self.buckets) - 1 and self.buckets[self.issued].arrivals.complete:
            self._issue(unassigned=False)

    def backward_done(self, unit: str, *, last: bool) -> None:
        """In a pipeline the last flag is known as soon as this rank has done its last action."""
        while last and unit == ROOT and self.issued < len(self.buckets):
            self._issue(unassigned=bool(self.unassigned))

    def finish(self) -> None:
        """Issue the buckets that are left, wait for all, and make new buckets if needed."""
        for bucket in self.buckets:
            bucket.in_flight.refuse_lost()
        for name in self.trained:  # a user may have set a gradient without a backward
            if name not in self.bucket_of and self.model.get_parameter(name).grad is not None:
                if (
                    self.buckets
                    and self.issued == len(self.buckets)
                    and name not in self.unassigned
                ):
                    raise UserError(SET_LATE.format(name))  # in a pipeline: see backward_done
                self.unassigned.setdefault(name)
        while self.issued < len(self.buckets):  # the last one, or incomplete on this rank
            self._issue(unassigned=bool(self.unassigned))
        reports = [bucket.wait() for bucket in self.buckets]
        if not self.buckets or reports[-1]:
            self._make_buckets()
            while self.issued < len(self.buckets):
                self._issue(unassigned=False)
            for bucket in self.buckets[len(reports) :]:
                bucket.wait()
        self.issued = 0
        self.unassigned = {}
        for bucket in self.buckets[-1:]:  # the last bucket's last flag counts aborted ranks
            bucket.in_flight.refuse_partial_abort()

    def forget(self) -> None:
        """Abort the step: drop its sums if all ranks abort, and raise on all if only some do."""
        aborted = self.issued > 0
        while aborted and self.issued < len(self.buckets):
            self._issue(unassigned=False, aborted=True)
        for bucket in self.buckets:
            bucket.arrivals.ready = set()
            if aborted:
                bucket.in_flight.discard_sums()
        self.issued = 0
        if aborted:
            self.buckets[-1].in_flight.refuse_partial_abort()

    def _issue(self, *, unassigned: bool, aborted: bool = False) -> None:
        self.buckets[self.issued].issue(unassigned=unassigned, aborted=aborted)
        self.issued += 1

    def _make_buckets(self) -> None:
        """Make buckets for the unassigned parameters of all ranks, in order of arrival."""
        if not self.trained:
            return
        used = [n for n in self.unassigned if self.model.get_parameter(n).grad is not None]
        arrival_of = {name: i for i, name in enumerate(used)}
        arrivals = [arrival_of.get(name, -1) for name in self.trained]
        strides = hash(tuple(self.model.get_parameter(name).stride() for name in self.trained))
        own_row = torch.tensor([*arrivals, strides], device=self.axis.device)
        rows = all_gather(own_row[None], self.axis).tolist()  # (size, trained + 1)
        same_strides = len({row.pop() for row in rows}) == 1
        ordered: dict[str, None] = {}
        for row in rows:  # rank 0's order first, then what only rank 1 has used, and so on
            order = sorted(range(len(row)), key=row.__getitem__)
            ordered |= {self.trained[i]: None for i in order if row[i] >= 0}
        parameters = {name: self.model.get_parameter(name) for name in ordered}
        first, limit = self.limits
        sizes = [(n, (p.dtype, self.stages_of(n)), p.nbytes) for n, p in parameters.items()]
        for names in group_into_buckets(sizes, limit if self.buckets else first, limit):
            members = {name: parameters[name] for name in names}
            bucket = Bucket(len(self.buckets), members, self.axis, same_strides=same_strides)
            for name in names:  # now, so that at most one bucket's gradients exist twice
                bucket.gradients.copy_in(name, members[name])
            self.buckets.append(bucket)
            self.bucket_of |= dict.fromkeys(names, bucket)


class Bucket:
    """Gradients in one flat buffer, a flag for each, and one flag: unassigned or aborted.

    memory = [ gradient a | gradient b | ... | a used | b used | ... | unassigned or aborted ]

    Args:
        same_strides: each parameter has equal strides on all ranks; its gradient gets the same.
    """

    def __init__(
        self, index: int, parameters: dict[str, nn.Parameter], axis: Axis, *, same_strides: bool
    ) -> None:
        self.parameters, self.axis = parameters, axis
        shapes = {name: p.shape for name, p in parameters.items()}
        length = sum(shape.numel() for shape in shapes.values()) + len(shapes) + 1
        dtype = next(iter(parameters.values())).dtype
        memory = shared_buffer(length, dtype, axis)
        self.gradients = FlatBuffer(memory, shapes, bucket_label(index, list(shapes)))
        if same_strides:  # autograd accumulates slowly if strides differ from the parameter's
            views = self.gradients.views
            for name, p in parameters.items():
                strides = torch.empty_like(p, device="meta").stride()
                views[name] = views[name].as_strided(p.shape, strides)
        self.arrivals = Arrivals(parameters)
        self.in_flight = GradsInFlight(parameters, self.gradients, axis.size)

    def issue(self, *, unassigned: bool, aborted: bool) -> None:
        """Issue the all_reduce of the gradients, dW{U_dp} -> dW, and of the flags."""
        used = {n for n, p in self.parameters.items() if p.grad is not None}
        self.gradients.copy_in_all(self.parameters)
        flags = [name in used for name in self.parameters]
        last_flag = -self.axis.size if aborted else int(unassigned)
        self.gradients.tail.copy_(torch.tensor([*flags, last_flag]))
        self.gradients.issue(all_reduce_into, self.axis)
        self.in_flight.on_issue(used)

    def wait(self) -> bool:
        """Make every `.grad` the sum, or None. Returns whether a rank has unassigned parameters."""
        self.gradients.wait()
        self.arrivals.ready = set()
        *use_counts, last_flag = self.gradients.tail.tolist()
        cleared = self.in_flight.on_wait(last_flag)
        pairs = zip(self.parameters, use_counts, strict=True)
        self.gradients.assign_grads(self.parameters, [n not in cleared and k > 0 for n, k in pairs])
        return bool(last_flag > 0)
