"""ZeRO 1 and 2: ddp, of which each rank takes its own part of the optimizer's work.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]     dW{U_dp} -> dW[E_dp]   bucket by bucket, in backward
                                              W[E_dp] -> W           after the step

All ranks of ddp keep the same moments, and take the same step with them. Here parameters lie side
by side in buckets, and of each bucket a rank has 1/N to step on: it needs the sum of the gradients
there and no more, and gives the new values to the others. E are the elements of a bucket; a
parameter that lies across the cut is stepped on by two ranks. What is summed twice around a ring in
ddp is summed once here, and gathered once, so stage 1 sends no byte more.

                                     sent in a step of k micro-batches,   bytes per rank, float32
    for P parameters, Adam:          elements times (N-1)/N               and N ranks
    stage 1                          P + P                                4P + 4P + 8P/N
    stage 2: gradients are split,    kP + P                               4P + 4P/N + 8P/N, and two
    each micro-batch's at once                                            buckets

that is, for parameters, gradients and moments. P counts the padding of each bucket to N equal
pieces. Besides, a number for each parameter is summed once in a step: which were used. Gradients
that travel by messages need as much memory again where they arrive: stage 2 one bucket's, stage 1
that of all buckets on their way; in memory that ranks share they need none.

Gradients of stage 1 lie in buckets, as ddp's: the first of a step is copied in, later micro-batches
add to it in place, and the sum of a piece comes to lie where this rank's own part of it was. The
rest of the bucket is of no use after `finish`, but stays for the next step: there would be nothing
to gain from giving back what the next backward takes again. Stage 2 lets go of a gradient as soon
as its bucket has been copied out to be sent, and keeps the sums. So it saves only where a model has
many buckets: of two, it needs more than stage 1, and a smaller `bucket_mb` is the remedy. Ranks
wait for each other in its backward, and all go through the same number of micro-batches.

`module.weight` is the whole, for good, and `named_parameters()` has the part that is stepped on,
with its `.grad`.

An optimizer sees ranges of elements, as vectors. So it must be one that treats each element by
itself, as SGD and Adam do; one that looks at rows or norms of a matrix is for fsdp, or ddp.

Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models"
(arXiv:1910.02054), sections 5.1 and 5.2.

[Note: who was used] A gradient that came on no rank stays None. Which came is agreed on in
`finish`; until then a local gradient that is there says that nobody has cleared it: `zero_grad` can
reach no other.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import FlatShard, Layout
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.replicated.buckets import cut, label
from dist_lab.parallel.sharded.sharded_param import Place, Split, parameter_at, places, put, split
from dist_lab.step.protocol import Applied, Phase, Setup, Sync


def stage1(setup: Setup, *, bucket_mb: float = 25.0) -> Applied:
    """Split the optimizer. Gradients are summed after the last micro-batch.

    Args:
        bucket_mb: a bucket is closed before it would hold more MiB than this; a larger parameter
            has one of its own.
    """
    return _apply(setup, bucket_mb, WholeGradients, each=False)


def stage2(setup: Setup, *, bucket_mb: float = 25.0) -> Applied:
    """Split the optimizer and the gradients, which are summed after each micro-batch."""
    return _apply(setup, bucket_mb, SummedGradients, each=True)


def _apply(setup: Setup, bucket_mb: float, kind: "type[Bucket]", *, each: bool) -> Applied:
    if not bucket_mb > 0:
        raise UserError(f"buckets of {bucket_mb} MiB; give a size above 0")
    model, axis, gather_axis = setup.model, setup.axis, setup.channel()
    found, layouts, limit = places(model), setup.owing_sums(axis), int(bucket_mb * 2**20)
    # Backward comes to the last layer first, and as a rule that was also made last.
    trained = [(n, p.dtype, p.nbytes) for n, p in model.named_parameters() if p.requires_grad]
    together = cut(reversed(trained), limit, limit)
    for names in together:
        lengths = [model.get_parameter(name).numel() for name in names]
        shard, offset = max(1, -(-sum(lengths) // axis.size)), 0
        for name, length in zip(names, lengths, strict=True):
            layouts[name] = layouts[name].split(axis.name, FlatShard(offset, shard))
            offset += length
    for name, p in model.named_parameters():
        if not p.requires_grad:
            _replace(found[name], setup.full_value(name).to(axis.wire.device))
    buckets = [
        kind(
            label(i, names), {name: found[name] for name in names},
            [_flat(layouts[name]) for name in names], axis, gather_axis, setup.full_value,
        )
        for i, names in enumerate(together)
    ]  # fmt: skip
    leaves = {name: part.whole for bucket in buckets for name, part in bucket.parts.items()}
    return Applied(layouts, ZeroSync(buckets, axis, each=each), leaves=leaves)


def _replace(own: Sequence[Place], value: Tensor) -> None:
    """Give a frozen parameter, which stays whole, its value, if it was on the meta device."""
    if parameter_at(own).is_meta:
        put(own, value)


def _flat(layout: Layout) -> FlatShard:
    _, flat = layout.splits[-1]
    assert isinstance(flat, FlatShard), flat
    return flat


def _places(flat: FlatShard, numel: int, index: int) -> tuple[slice, slice]:
    """A parameter's elements in its bucket, and those of them in a rank's shard of that."""
    start, stop = (
        min(max(end - index * flat.length, 0), flat.length)
        for end in (flat.offset, flat.offset + numel)
    )
    return slice(flat.offset, flat.offset + numel), slice(start, stop)


class ZeroSync(Sync):
    """Sends each bucket as soon as it and all before it are full: one order on every rank.

    Args:
        each: sum the gradients of each micro-batch, and not just once after the last.
    """

    def __init__(self, buckets: "Sequence[Bucket]", axis: Axis, *, each: bool) -> None:
        self.buckets, self.axis, self.each = buckets, axis, each
        self.place_of = {name: i for i, bucket in enumerate(buckets) for name in bucket.names}
        self.used = ops.shared_buffer(len(self.place_of), torch.float32, axis)
        self.staging: dict[torch.dtype, Tensor] = {}
        if each:
            for dtype in {bucket.flat.dtype: None for bucket in buckets}:
                longest = max(len(b.flat) for b in buckets if b.flat.dtype == dtype)
                self.staging[dtype] = ops.shared_buffer(longest, dtype, axis)
        self.last = True  # no micro-batch follows the one that is under way
        self.sent = 0  # buckets that are, or have been, on their way
        self.flying: list[Bucket] = []

    def microbatch(self, *, last: bool) -> None:
        if self.each and not self.last:  # the one that is over was followed by others
            self._send_rest()
            self._begin()
        self.last = last

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == "" and phase is not Phase.BACKWARD:
            for bucket in self.buckets:
                bucket.check()
                bucket.drop_cleared()

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == "" and self.each and phase is Phase.BACKWARD:
            self._send_rest()  # now, because others wait for it in their backward

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            place = self.place_of[name]
            if place < self.sent:
                raise UserError(
                    f"backward has reached {name} again after its gradient was sent: add up the "
                    "losses and call backward once, or give each backward a job.microbatch of its "
                    "own; after a step that is not taken, call job.finish() before zero_grad()"
                )
            self.buckets[place].take(name)
            if last or self.each:
                self.buckets[place].missing.discard(name)
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self._send()

    def _send(self) -> None:
        if self.each:
            self._land()  # so that one staging is enough, and what arrives is one bucket at a time
        bucket = self.buckets[self.sent]
        self.flying.append(bucket)
        self.sent += 1
        with self.axis.wire.during(unit=bucket.label):
            bucket.start_sum(self.staging.get(bucket.flat.dtype, bucket.flat))

    def _land(self) -> None:
        for bucket in self.flying:
            bucket.finish_sum()
        self.flying = []

    def _send_rest(self) -> None:
        """Backward is over: what has not come on this rank will not."""
        while self.sent < len(self.buckets):
            self._send()
        self._land()

    def _begin(self) -> None:
        self.sent = 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.names)

    def finish(self) -> None:
        self._send_rest()
        self._begin()
        used = [name in bucket.used for bucket in self.buckets for name in bucket.names]
        if used:
            self.used.copy_(torch.tensor(used))
            ops.all_reduce_into(self.used, self.axis).wait()
        somewhere = dict(zip(self.place_of, (self.used > 0).tolist(), strict=True))
        for bucket in self.buckets:
            bucket.hand_out({name for name in bucket.names if somewhere[name]})
            bucket.wait_for_readers()

    def after_step(self) -> None:
        on_their_way = [bucket.start_gather() for bucket in self.buckets]
        for pending in on_their_way:
            pending.wait()

    def forget(self) -> None:
        self._land()
        self._begin()
        self.last = True
        for bucket in self.buckets:
            for part in bucket.parts.values():
                part.whole.grad = None

    def held(self) -> Iterator[tuple[str, Tensor]]:
        yield "buffers", self.used
        for staging in self.staging.values():
            yield "buffers", staging
        for bucket in self.buckets:
            for gradients in bucket.held():
                yield "gradients", gradients


class Bucket(ABC):
    """Parameters side by side in one piece of memory, cut into one piece for each rank.

        flat = [ a | b | c    ... | padding ]     what forwards read
        own  =       [        ]                   what this rank steps on, and gives to the others

    Each gradient has the place of its parameter, in such memory for all or in such a piece.

    Args:
        members: name -> where it stands.
        flats: the range of each member in the bucket.
        axis, gather_axis: where gradients and parameters travel.

    Attributes:
        sums: of gradients over the ranks, beside `own`.
    """

    sums: Tensor

    def __init__(
        self,
        title: str,
        members: Mapping[str, list[Place]],
        flats: Sequence[FlatShard],
        axis: Axis,
        gather_axis: Axis,
        full_value: Callable[[str], Tensor],
    ) -> None:
        self.label, self.names, self.axis, self.gather_axis = (
            title,
            list(members),
            axis,
            gather_axis,
        )
        shapes = [parameter_at(own).shape for own in members.values()]
        dtype = parameter_at(members[self.names[0]]).dtype
        self.flat = ops.shared_buffer(axis.size * flats[0].length, dtype, gather_axis)
        self.own = self.row(self.flat)
        self.parts: dict[str, Split] = {}
        self.at: dict[str, tuple[slice, slice]] = {}  # in `flat`, and what of it is in `own`
        for (name, own), flat, shape in zip(members.items(), flats, shapes, strict=True):
            self.at[name] = at, mine = _places(flat, shape.numel(), axis.index)
            memory = self.flat[at].copy_(full_value(name).flatten())
            seen = memory.data.view(shape)  # .data: not a view for autograd
            part = split(name, own, self.own[mine], seen, memory)
            part.show()  # for good
            # A copy of the model is the plain model: its parameters are the wholes.
            part.local.__dict__["__deepcopy__"] = partial(copy.deepcopy, part.whole)
            self.parts[name] = part
        self.missing = set(self.names)  # gradients that are to come before it is sent
        self.used: set[str] = set()  # on this rank, at the last sum
        self.pending: ops.Pending | None = None

    def row(self, memory: Tensor) -> Tensor:
        """This rank's piece of such memory."""
        return memory.view(self.axis.size, -1)[self.axis.index]

    def check(self) -> None:
        for part in self.parts.values():
            part.check(self.flat)

    def start_gather(self) -> ops.Pending:
        with self.gather_axis.wire.during(unit=self.label):
            return ops.all_gather_into(self.flat, self.own, self.gather_axis)  # W[E_dp] -> W

    def present(self) -> set[str]:
        """Those whose local gradient is there: no zero_grad has taken it away since."""
        return {name for name, part in self.parts.items() if part.local.grad is not None}

    def hand_out(self, names: set[str]) -> None:
        """Make `.grad` of each local part of these its range of the sums, and of others None."""
        for name, part in self.parts.items():
            part.local.grad = self.sums.data[self.at[name][1]] if name in names else None
        self.used = names

    def wait_for_readers(self) -> None:
        """Wait until no rank reads what the optimizer, or the next backward, is about to write."""
        ops.wait_for_readers(self.flat, self.gather_axis)

    # --- what the stages do with gradients --------------------------------------------------------

    @abstractmethod
    def drop_cleared(self) -> None:
        """A forward begins: of what zero_grad has cleared, the rest must go as well."""

    @abstractmethod
    def take(self, name: str) -> None:
        """`whole.grad` holds this micro-batch."""

    @abstractmethod
    def start_sum(self, staging: Tensor) -> None:
        """dW{U_dp} -> dW[E_dp]"""

    @abstractmethod
    def finish_sum(self) -> None: ...

    @abstractmethod
    def held(self) -> Iterator[Tensor]: ...


class WholeGradients(Bucket):
    """Stage 1: they lie side by side; later micro-batches add to them; the sums come in place."""

    def __init__(self, *bucket: Any) -> None:
        super().__init__(*bucket)
        self.gradients = ops.shared_buffer(len(self.flat), self.flat.dtype, self.axis)
        self.sums = self.row(self.gradients)
        self.views = {
            n: self.gradients[self.at[n][0]].view_as(p.whole) for n, p in self.parts.items()
        }

    def drop_cleared(self) -> None:
        for part in self.parts.values():
            # Backward writes by another name; who has written by this one has cleared it.
            if part.local.grad is None or part.local.grad._version > 0:
                part.whole.grad = None

    def take(self, name: str) -> None:
        part, view = self.parts[name], self.views[name]
        if part.whole.grad is not None and part.whole.grad is not view:
            view.copy_(part.whole.grad.detach())
            part.whole.grad = view
            part.local.grad = self.sums.data[self.at[name][1]]

    def start_sum(self, staging: Tensor) -> None:
        self.drop_cleared()
        self.used = self.present()
        for name, part in self.parts.items():
            if part.whole.grad is None:
                self.views[name].zero_()  # what an earlier step has left there
        self.pending = ops.reduce_scatter_into(self.sums, self.gradients, self.axis)

    def finish_sum(self) -> None:
        assert self.pending is not None, self.label
        self.pending.wait()
        self.pending = None
        for part in self.parts.values():
            part.whole.grad = None

    def wait_for_readers(self) -> None:
        super().wait_for_readers()
        ops.wait_for_readers(self.gradients, self.axis)

    def held(self) -> Iterator[Tensor]:
        yield self.gradients


class SummedGradients(Bucket):
    """Stage 2: they are copied to where they are sent from, and go; their sums add up."""

    def __init__(self, *bucket: Any) -> None:
        super().__init__(*bucket)
        self.sums = self.flat.new_empty(0)
        self.incoming: Tensor | None = None

    def drop_cleared(self) -> None:
        """There is no rest."""

    def take(self, name: str) -> None:
        """It stays where it is until its bucket is complete."""

    def start_sum(self, staging: Tensor) -> None:
        self.used &= self.present()
        ops.wait_for_readers(staging, self.axis)
        bucket = staging[: len(self.flat)]
        for name, part in self.parts.items():
            view = bucket[self.at[name][0]]
            if part.whole.grad is None:
                view.zero_()
            else:
                view.copy_(part.whole.grad.detach().flatten())
                part.whole.grad = None
                self.used.add(name)
        self.incoming = torch.empty_like(self.own)
        self.pending = ops.reduce_scatter_into(self.incoming, bucket, self.axis, memory=staging)

    def finish_sum(self) -> None:
        assert self.pending is not None, self.label
        assert self.incoming is not None, self.label
        self.pending.wait()
        self.pending = None  # or it would keep what has come
        if present := self.present():
            for name in self.parts.keys() - present:
                self.sums[self.at[name][1]].zero_()  # cleared since
            self.sums += self.incoming
        else:
            self.sums = self.incoming
        self.incoming = None
        used = self.used
        self.hand_out(set(self.names))  # of all, which says that none was cleared
        self.used = used

    def held(self) -> Iterator[Tensor]:
        yield self.sums
        if self.incoming is not None:
            yield self.incoming
