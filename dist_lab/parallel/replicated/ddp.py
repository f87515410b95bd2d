"""DDP: gradients travel while backward is still computing, many of them in one message.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

Backward makes gradients from the last layer to the first. Those that come one after another share
a flat buffer, a bucket; when the last gradient of a bucket is in, its sum over the ranks is issued,
and backward goes on meanwhile. The first bucket is small, so that the network has work early.

Cost per step, for P parameters of which none is idle: 2 (N-1)/N (P + a flag for each and for each
bucket) elements sent, in about P / bucket_mb messages, however many micro-batches there were.
Memory per rank: all of everything. Gradients lie in the buckets: autograd's first of a step is
copied in, later micro-batches add to it in place, and nothing is copied back after the sum.
Li et al. 2020, "PyTorch Distributed: experiences on accelerating data parallel training"
(arXiv:2006.15704).

[Note: what the first step teaches] Which parameters a model uses, and in which order backward
reaches them, is not known before it has run. So the first step sums after backward: the ranks tell
each other which gradients arrived and when, and make buckets in that order, of just the parameters
that some rank has used. What no rank uses is never sent.

[Note: used elsewhere] Later steps may differ, and by rank. Each bucket carries a flag for each of
its parameters, 1 where this rank has used it, which the same sum adds up: a parameter that nobody
used in this step keeps `grad is None`, and one that was used only elsewhere gets the others'
gradient. One more flag tells of parameters that are in no bucket yet; if any rank raises it, all of
them learn again. So a rank may issue a bucket in backward that another issues in `finish`, after
whatever lies between: the buckets have an order in common with each other alone, and their axis
must be a channel of its own (`mesh.channel`).

While a bucket is in flight a user may reach for its gradients, and an exception may end the step:
see in_flight.py.

Buffers are each rank's own: see [Note: buffers] in dist_lab/transforms/batchnorm.py.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dist_lab.comm.ops import all_gather, all_reduce_into, shared_buffer
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import Arrivals, FlatBuffer, bucket_label, group_into_buckets
from dist_lab.parallel.replicated.in_flight import GradsInFlight
from dist_lab.step.protocol import ROOT, Applied, Phase, Setup, Sync


def apply(setup: Setup, *, bucket_mb: float = 25.0, first_bucket_mb: float = 1.0) -> Applied:
    """Owe the gradient of every trained parameter one sum over the axis, and pay it in buckets.

    Args:
        bucket_mb, first_bucket_mb: a bucket is closed before it would hold more MiB than this; a
            larger parameter has one of its own.
    """
    if not (bucket_mb > 0 and first_bucket_mb > 0):
        raise UserError(f"buckets of {first_bucket_mb} and {bucket_mb} MiB; give sizes above 0")
    model, axis = setup.model, setup.axis
    limits = int(first_bucket_mb * 2**20), int(bucket_mb * 2**20)
    return Applied(setup.owing_sums(axis), BucketedAllReduce(model, axis, limits))


class BucketedAllReduce(Sync):
    """Issues each bucket as soon as it and all before it are full: one order on every rank."""

    def __init__(self, model: nn.Module, axis: Axis, limits: tuple[int, int]) -> None:
        self.model, self.axis, self.limits = model, axis, limits
        self.owed = [name for name, p in model.named_parameters() if p.requires_grad]
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[str, Bucket] = {}  # where a parameter's gradient lies
        self.unassigned: dict[str, None] = {}  # used in this step, in order, and in no bucket
        self.issued = 0  # buckets

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            for bucket in self.buckets:
                bucket.arrivals.look_for_frozen()
                if phase is Phase.BACKWARD:  # autograd is about to add gradients there
                    bucket.in_flight.refuse_lost()
                    bucket.in_flight.drop_stand_ins()

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            for bucket in self.buckets:
                if bucket.gradients.in_flight:  # and this backward may have been another one
                    bucket.in_flight.show_stand_ins()

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
        # The last bucket stays for finish(): only then is it known that no other came.
        while self.issued < len(self.buckets) - 1 and self.buckets[self.issued].arrivals.complete:
            self._issue(unassigned=False)

    def finish(self) -> None:
        """Issue what backward left incomplete, wait for all, and learn if there is a need."""
        for bucket in self.buckets:
            bucket.in_flight.refuse_lost()
        for name in self.owed:  # also what a user has put there, and no backward
            if name not in self.bucket_of and self.model.get_parameter(name).grad is not None:
                self.unassigned.setdefault(name)
        while self.issued < len(self.buckets):  # on this rank some of its gradients did not come
            self._issue(unassigned=bool(self.unassigned))
        more = [bucket.wait() for bucket in self.buckets]
        if not self.buckets or more[-1]:
            self._learn()
            while self.issued < len(self.buckets):
                self._issue(unassigned=False)
            for bucket in self.buckets[len(more) :]:
                bucket.wait()
        self.issued = 0
        self.unassigned = {}
        for bucket in self.buckets[-1:]:  # which is the last to be sent, and told by all
            bucket.in_flight.refuse_given_up()

    def forget(self) -> None:
        """Nothing of a step comes that was broken off: on all ranks, or it is refused on all."""
        given_up = self.issued > 0
        while given_up and self.issued < len(self.buckets):
            self._issue(unassigned=False, given_up=True)
        for bucket in self.buckets:
            bucket.arrivals.ready = set()
            if given_up:
                bucket.in_flight.lose()
        self.issued = 0
        if given_up:
            self.buckets[-1].in_flight.refuse_given_up()

    def _issue(self, *, unassigned: bool, given_up: bool = False) -> None:
        self.buckets[self.issued].issue(unassigned=unassigned, given_up=given_up)
        self.issued += 1

    def _learn(self) -> None:
        """Make buckets for what some rank has used, in the order in which it came."""
        if not self.owed:
            return
        used = [n for n in self.unassigned if self.model.get_parameter(n).grad is not None]
        place = {name: i for i, name in enumerate(used)}
        places = [place.get(name, -1) for name in self.owed]
        strides = hash(tuple(self.model.get_parameter(name).stride() for name in self.owed))
        mine = torch.tensor([*places, strides], device=self.axis.device)
        rows = all_gather(mine[None], self.axis).tolist()  # (size, owed + 1)
        alike = len({row.pop() for row in rows}) == 1  # parameters lie in memory alike on all ranks
        arrived: dict[str, None] = {}
        for row in rows:  # in rank 0's order; then what it has not seen, in rank 1's; and so on
            order = sorted(range(len(row)), key=row.__getitem__)
            arrived |= {self.owed[i]: None for i in order if row[i] >= 0}
        parameters = {name: self.model.get_parameter(name) for name in arrived}
        first, limit = self.limits
        sizes = [(name, p.dtype, p.nbytes) for name, p in parameters.items()]
        for names in group_into_buckets(sizes, limit if self.buckets else first, limit):
            members = {name: parameters[name] for name in names}
            bucket = Bucket(len(self.buckets), members, self.axis, as_parameters=alike)
            for name in names:  # at once, so that a gradient and its copy are not all there twice
                bucket.gradients.copy_in(name, members[name])
            self.buckets.append(bucket)
            self.bucket_of |= dict.fromkeys(names, bucket)


class Bucket:
    """Gradients in one flat buffer, with a flag for each, and one for all others.

    memory = [ gradient a | gradient b | ... | a used | b used | ... | one used without a bucket ]

    Args:
        as_parameters: gradients have the strides of their parameters, which are those of all ranks.
    """

    def __init__(
        self, index: int, parameters: dict[str, nn.Parameter], axis: Axis, *, as_parameters: bool
    ) -> None:
        self.parameters, self.axis = parameters, axis
        shapes = {name: p.shape for name, p in parameters.items()}
        length = sum(shape.numel() for shape in shapes.values()) + len(shapes) + 1
        dtype = next(iter(parameters.values())).dtype
        memory = shared_buffer(length, dtype, axis)
        self.gradients = FlatBuffer(memory, shapes, bucket_label(index, list(shapes)))
        if as_parameters:  # or autograd would add to them element by element
            views = self.gradients.views
            for name, p in parameters.items():
                strides = torch.empty_like(p, device="meta").stride()
                views[name] = views[name].as_strided(p.shape, strides)
        self.arrivals = Arrivals(parameters)
        self.in_flight = GradsInFlight(parameters, self.gradients, axis.size)

    def issue(self, *, unassigned: bool, given_up: bool) -> None:
        """dW{U_dp} -> dW, and the flags with it."""
        used = {n for n, p in self.parameters.items() if p.grad is not None}
        self.gradients.copy_in_all(self.parameters)
        flags = [name in used for name in self.parameters]
        told = -self.axis.size if given_up else int(unassigned)
        self.gradients.tail.copy_(torch.tensor([*flags, told]))
        self.gradients.issue(all_reduce_into, self.axis)
        self.in_flight.leave(used)

    def wait(self) -> bool:
        """Make every `.grad` global, or None. Returns if a rank used one without a bucket."""
        self.gradients.wait()
        self.arrivals.ready = set()
        *used, told = self.gradients.tail.tolist()
        cleared = self.in_flight.arrive(told)
        kept = [n not in cleared and k > 0 for n, k in zip(self.parameters, used, strict=True)]
        self.gradients.assign_grads(self.parameters, kept)
        return bool(told > 0)
