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

[Note: broken off] A rank whose step is broken off by an exception, with gradients in flight, sends
the other buckets at once, and -N in place of that last flag. So all ranks hear of it: if each has
broken off its step, what comes is dropped, and otherwise it is refused.

Buffers are each rank's own: see [Note: buffers] in dist_lab/transforms/batchnorm.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from dist_lab.comm.ops import all_gather, all_reduce_into, shared_buffer
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.flat_buffer import Arrivals, FlatBuffer, bucket_label, group_into_buckets
from dist_lab.step.grad_elsewhere import GradElsewhere
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
                    bucket.refuse_lost()
                    bucket.drop_stand_ins()

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            for bucket in self.buckets:
                if bucket.gradients.in_flight:  # and this backward may have been another one
                    bucket.show_on_its_way()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            if name not in self.bucket_of:
                self.unassigned[name] = None
                continue
            bucket = self.bucket_of[name]
            if bucket.gradients.in_flight:
                raise UserError(
                    f"backward has reached {name} again after its gradient was sent: "
                    + bucket.advice(name)
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
            bucket.refuse_lost()
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
            bucket.refuse_given_up()

    def forget(self) -> None:
        """Nothing of a step comes that was broken off: on all ranks, or it is refused on all."""
        given_up = self.issued > 0
        while given_up and self.issued < len(self.buckets):
            self._issue(unassigned=False, given_up=True)
        for bucket in self.buckets:
            bucket.arrivals.ready = set()
            if given_up:
                bucket.lose()
        self.issued = 0
        if given_up:
            self.buckets[-1].refuse_given_up()

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
        mine = torch.tensor([*places, strides], device=self.axis.wire.device)
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
        self.used: set[str] = set()  # what was sent of this rank
        self.cleared: set[str] = set()  # of these, by the user, while they were on their way
        self.stand_ins: dict[str, GradElsewhere] = {}  # made once
        self.stand_in = False  # until the sums are here
        self.given_up = 0  # how many ranks have broken off the step
        self.lost: set[str] = set()  # gradients that were on their way when the step was broken off

    def advice(self, name: str) -> str:
        """What to do about a second gradient while the first is in flight."""
        if name in self.cleared:
            return "call job.finish() before zero_grad(), also after a step that is not taken"
        return (
            "add up the losses and call backward once, or wrap all backwards but the last in "
            "job.microbatch(last=False)"
        )

    def issue(self, *, unassigned: bool, given_up: bool) -> None:
        """dW{U_dp} -> dW, and the flags with it."""
        self.used = {n for n, p in self.parameters.items() if p.grad is not None}
        self.cleared = set()
        self.gradients.copy_in_all(self.parameters)
        flags = [name in self.used for name in self.parameters]
        told = -self.axis.size if given_up else int(unassigned)
        self.gradients.tail.copy_(torch.tensor([*flags, told]))
        self.gradients.issue(all_reduce_into, self.axis)
        self.show_on_its_way()

    def show_on_its_way(self) -> None:
        """What is done to a gradient now would be lost: see step/grad_elsewhere.py."""
        if self.stand_in:
            return
        self.stand_in = True
        for name in self.used - self.cleared:
            parameter = self.parameters[name]
            if name in self.stand_ins:
                parameter.grad = self.stand_ins[name]
                continue
            advice = f"the gradient of {name} is being summed: call job.finish() before you use it"
            self.stand_ins[name] = GradElsewhere.stand_at(parameter, None, advice)

    def drop_stand_ins(self) -> None:
        """See what a user has cleared or replaced meanwhile, and leave `.grad` empty."""
        for name in self.used - self.cleared if self.stand_in else ():
            parameter = self.parameters[name]
            if parameter.grad is None:
                self.cleared.add(name)
            elif parameter.grad is not self.stand_ins[name]:
                raise UserError(
                    f"the gradient of {name} was replaced while it was being summed: call "
                    "job.finish() before you change it"
                )
            parameter.grad = None
        self.stand_in = False

    def wait(self) -> bool:
        """Make every `.grad` global, or None. Returns if a rank used one without a bucket."""
        self.gradients.wait()
        self.arrivals.ready = set()
        self.drop_stand_ins()
        *used, told = self.gradients.tail.tolist()
        self.given_up = self._given_up(told)
        kept = [n not in self.cleared and k > 0 for n, k in zip(self.parameters, used, strict=True)]
        self.gradients.assign_grads(self.parameters, kept)
        return bool(told > 0)

    def _given_up(self, told: float) -> int:
        """How many ranks have, from the sum of what they have told: see [Note: broken off]."""
        return round(max(-told, 0.0) / self.axis.size + 0.49)

    def refuse_given_up(self) -> None:
        """Raise UserError if some ranks have given up the step, and others not."""
        if 0 < self.given_up < self.axis.size:
            raise UserError(
                f"{self.given_up} of {self.axis.size} ranks have broken off a step by an exception "
                "while gradients were being summed, and the others went on: let it be raised on "
                "every rank, or on none"
            )

    def lose(self) -> None:
        """Drop what comes of a step that was broken off. NaN stands there until it is cleared."""
        self.gradients.wait()
        self.given_up = self._given_up(float(self.gradients.tail[-1]))
        self.drop_stand_ins()
        self.lost = self.used - self.cleared
        for name in self.lost:
            self.parameters[name].grad = self.gradients.views[name].fill_(math.nan)

    def refuse_lost(self) -> None:
        """Raise UserError if a gradient that is lost has not been cleared since."""
        for name in self.lost:
            grad = self.parameters[name].grad
            if grad is self.gradients.views[name] and grad.isnan().any():
                raise UserError(
                    f"the gradient of {name} was being summed when the step was broken off, and is "
                    "lost: call optimizer.zero_grad() after the exception"
                )
        self.lost = set()
