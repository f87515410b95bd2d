"""DDP: gradients travel while backward is still computing, many of them in one message.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

Backward makes gradients from the last layer to the first. Those that come one after another share
a piece of memory, a bucket; when the last of a bucket is in, its sum over the ranks begins, and
backward goes on meanwhile. The first bucket is small, so that the network has work early.

Cost per step, for P parameters of which none is idle: 2 (N-1)/N (P + a flag for each and for each
bucket) elements sent, in about P / bucket_mb messages, however many micro-batches there were.
Memory per rank: all of everything. Gradients lie in the buckets: autograd's first of a step is
copied in, later micro-batches add to it in place, and nothing is copied back after the sum.
Li et al. 2020, "PyTorch Distributed: experiences on accelerating data parallel training"
(arXiv:2006.15704).

[Note: what the first step teaches] Which parameters a model uses, and in which order backward
reaches them, is not known before it has run. So the first step sums after backward: the ranks tell
each other what arrived and when, and cut buckets in that order, of just the parameters that some
rank has used. What no rank uses is never sent.

[Note: used elsewhere] Later steps may differ, and by rank. Each bucket carries a flag for each of
its parameters, 1 where this rank has used it, which the same sum adds up: a parameter that nobody
used in this step keeps `grad is None`, and one that was used only elsewhere gets the others'
gradient. One more flag tells of parameters that are in no bucket yet; if any rank raises it, all of
them learn again. So a rank may send a bucket in backward that another sends in `finish`, after
whatever lies between: the buckets have an order in common with each other alone, and their axis
must be a channel of its own (`mesh.channel`).

Buffers are each rank's own: see [Note: buffers] in dist_lab/transforms/batchnorm.py.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dist_lab.comm.ops import Pending, all_gather, all_reduce_into, shared_buffer
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.replicated.buckets import cut, label
from dist_lab.step.protocol import Applied, Setup, Sync


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
    """Sends each bucket as soon as it and all before it are full: one order on every rank."""

    def __init__(self, model: nn.Module, axis: Axis, limits: tuple[int, int]) -> None:
        self.model, self.axis, self.limits = model, axis, limits
        self.owed = [name for name, p in model.named_parameters() if p.requires_grad]
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[str, Bucket] = {}  # where a parameter's gradient lies
        self.unassigned: dict[str, None] = {}  # used in this step, in order, and in no bucket
        self.sent = 0  # buckets on their way

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            if name not in self.bucket_of:
                self.unassigned[name] = None
                continue
            bucket = self.bucket_of[name]
            if bucket.pending is not None:
                raise UserError(
                    f"backward has reached {name} again after its gradient was sent: "
                    + bucket.advice(name)
                )
            bucket.take(name)
            if last:
                bucket.missing.discard(name)
        # The last bucket stays for finish(): only then is it known that no other came.
        while self.sent < len(self.buckets) - 1 and not self.buckets[self.sent].missing:
            self._send(unassigned=False)

    def finish(self) -> None:
        """Sends what backward left incomplete, waits for all, and learns if there is a need."""
        while self.sent < len(self.buckets):  # on this rank some of its gradients did not come
            self._send(unassigned=bool(self.unassigned))
        more = [bucket.arrive() for bucket in self.buckets]
        if not self.buckets or more[-1]:
            self._learn()
            while self.sent < len(self.buckets):
                self._send(unassigned=False)
            for bucket in self.buckets[len(more) :]:
                bucket.arrive()
        self.sent = 0
        self.unassigned = {}

    def _send(self, *, unassigned: bool) -> None:
        self.buckets[self.sent].send(unassigned=unassigned)
        self.sent += 1

    def _learn(self) -> None:
        """Make buckets for what some rank has used, in the order in which it came."""
        if not self.owed:
            return
        used = [n for n in self.unassigned if self.model.get_parameter(n).grad is not None]
        place = {name: i for i, name in enumerate(used)}
        mine = torch.tensor(
            [place.get(name, -1) for name in self.owed], device=self.axis.wire.device
        )
        rows = all_gather(mine[None], self.axis).tolist()  # (size, owed)
        arrived: dict[str, None] = {}
        for row in rows:  # in rank 0's order; then what it has not seen, in rank 1's; and so on
            order = sorted(range(len(row)), key=row.__getitem__)
            arrived |= {self.owed[i]: None for i in order if row[i] >= 0}
        parameters = {name: self.model.get_parameter(name) for name in arrived}
        first, limit = self.limits
        sizes = [(name, p.dtype, p.nbytes) for name, p in parameters.items()]
        for names in cut(sizes, limit if self.buckets else first, limit):
            held = {name: parameters[name] for name in names}
            bucket = Bucket(len(self.buckets), held, self.axis)
            for name in names:  # at once, so that a gradient and its copy are not all there twice
                bucket.take(name)
            self.buckets.append(bucket)
            self.bucket_of |= dict.fromkeys(names, bucket)


class Bucket:
    """Gradients side by side in one piece of memory, with a flag for each, and one for all others.

    flat = [ gradient a | gradient b | ... | a used | b used | ... | one used that has no bucket ]
    """

    def __init__(self, index: int, parameters: dict[str, nn.Parameter], axis: Axis) -> None:
        self.parameters, self.axis = parameters, axis
        self.names = list(parameters)
        self.label = label(index, self.names)
        lengths = [p.numel() for p in parameters.values()]
        dtype = parameters[self.names[0]].dtype
        self.flat = shared_buffer(sum(lengths) + len(lengths) + 1, dtype, axis)
        *pieces, self.flags = self.flat.split([*lengths, len(lengths) + 1])
        self.views = {
            name: piece.view_as(parameters[name])
            for name, piece in zip(parameters, pieces, strict=True)
        }
        self.missing = set(parameters)  # gradients that this step still has to bring
        self.pending: Pending | None = None

    def take(self, name: str) -> None:
        """Make `.grad` the view into the bucket. Later micro-batches then add to it in place."""
        parameter, view = self.parameters[name], self.views[name]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad.detach())
            parameter.grad = view

    def advice(self, name: str) -> str:
        """What to do about a second gradient while the first is on its way."""
        if self.parameters[name].grad is not self.views[name]:  # it was cleared meanwhile
            return "call job.finish() before zero_grad(), also after a step that is not taken"
        return (
            "add up the losses and call backward once, or wrap all backwards but the last in "
            "job.microbatch(last=False)"
        )

    def send(self, *, unassigned: bool) -> None:
        used = [parameter.grad is not None for parameter in self.parameters.values()]
        for name, yes in zip(self.names, used, strict=True):
            if not yes:
                self.views[name].zero_()  # what an earlier step has left there
        self.flags.copy_(torch.tensor([*used, unassigned]))
        with self.axis.wire.during(unit=self.label):
            self.pending = all_reduce_into(self.flat, self.axis)  # dW{U_dp} -> dW

    def arrive(self) -> bool:
        """Wait; every `.grad` is then global, or None. Whether a rank used one without a bucket."""
        assert self.pending is not None, self.label
        self.pending.wait()
        self.pending, self.missing = None, set(self.parameters)
        *used, unassigned = (self.flags > 0).tolist()
        for (name, parameter), yes in zip(self.parameters.items(), used, strict=True):
            parameter.grad = self.views[name] if yes else None
        return bool(unassigned)
