"""FSDP, which is ZeRO-3: a rank keeps a part of every parameter, and borrows the rest for a moment.

    In[B_X, D] . W[D_X, F] -> Out[B_X, F]     W[D_X, F] -> W[D, F]       before a unit is used
                                              dW[D, F]{U_X} -> dW[D_X, F]  after its backward

A unit, such as a block of a transformer, is gathered just before its forward and let go after it,
and once more around its backward; its gradient is summed and split in one go. While one unit
computes, the next one is on its way. Every rank stores, and steps on, 1/N of the model.

Cost per step of k micro-batches, for P parameters, in elements sent, times (N-1)/N:

    3kP           gathered for each forward and each backward, gradients reduced after each
    2kP           reshard_after_forward=False: gathered once for both
    (k+1)P + P    keep_gathered: from the first backward on, units stay whole until the last
    2kP + P       defer_reduce: whole gradients are kept, and reduced after the last backward

and for each parameter and reduction N flags that say who used it. Memory per rank: of parameters,
gradients and optimizer state 1/N; besides these two units and the root's own parameters while
they are whole, and two units' gradients before they are reduced. Pieces are equal, so one whose
rows do not divide by N is padded to the next multiple.

Hybrid (HSDP): `replicate` is a second axis Y, along which all of this is repeated. Gradients are
reduced along X in each micro-batch, and the pieces summed along Y once, in `finish`: 2 (M-1)/M P/N
elements more, of M replicas. dW[D, F]{U_X, U_Y} -> dW[D_X, F]{U_Y} -> dW[D_X, F].

Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models"
(arXiv:1910.02054); Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277).

[Note: one order] All ranks must start their collectives in one order. Units are gathered in the
order in which the model uses them, which is the ranks' to have in common. Gradients come when they
come; so they are reduced in the order in which backward should reach their units, each micro-batch
once, on a channel of their own, whether some rank has used all of a unit's parameters or not.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import FlatShard, Shard
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.sharded.sharded_param import Group, Place, owners, places, used_by
from dist_lab.step.protocol import Applied, Phase, Setup, Sync
from dist_lab.torch_private import StatisticsNorm
from dist_lab.transforms.offload import maker, offloaded

ROOT = ""  # the unit that is the model itself


def apply(
    setup: Setup,
    *,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    keep_gathered: bool = False,
    defer_reduce: bool = False,
    prefetch: bool = True,
    offload: str = "",
) -> Applied:
    """Keep 1/N of every parameter.

    Args:
        setup: parameters are split along fsdp, and the splits repeated along dp, whose size is 1
            under plain FSDP. Units are gathered, and computed with, in its param_dtype.
        reduce_dtype: sum gradients in this; default: that of the parts.
        reshard_after_forward, keep_gathered, defer_reduce: see the table above.
        prefetch: gather the next unit while one computes.
        offload: where the parts and the optimizer's state are kept: a folder, in whose files they
            lie; or "cpu", for an accelerator, whose optimizer then runs on the CPU.
    """
    model, axis, replicate = setup.model, setup.axes["fsdp"], setup.axes["dp"]
    for dtype in (setup.param_dtype, reduce_dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"parameters and gradients cannot be {dtype}; give a floating dtype")
    keep = maker(offload, axis.wire.device)
    found = places(model)
    gather_axis = setup.channel()
    owing = setup.owing_sums(*(a for a in (axis, replicate) if a.size > 1))
    layouts = {
        name: owing[name].split(axis.name, Shard(0) if p.dim() else FlatShard(0, 1))
        for name, p in model.named_parameters()
    }
    groups = [
        Group(unit, {n: found[n] for n in names}, dtype, axis, gather_axis, setup.full_value, keep)
        for (unit, dtype), names in _together(model, found, setup).items()
    ]
    sync = FullySharded(
        groups, used_by(groups, setup.units), axis, replicate, reduce_dtype=reduce_dtype,
        prefetch=prefetch, reshard_after_forward=reshard_after_forward,
        keep_gathered=keep_gathered, defer_reduce=defer_reduce,
    )  # fmt: skip
    return Applied(
        layouts, sync,
        leaves={part.name: part.whole for group in groups for part in group.parts},
        sharded_between_units=True,
        make_optimizer=partial(offloaded, keep) if keep and offload != "cpu" else None,
    )  # fmt: skip


def _together(
    model: nn.Module, found: Mapping[str, list[Place]], setup: Setup
) -> dict[tuple[str, tuple[torch.dtype, torch.dtype]], list[str]]:
    """(unit, (dtype kept, dtype of compute)) -> the parameters that are gathered as one."""
    owner = owners(found, setup.units)
    groups: dict[tuple[str, tuple[torch.dtype, torch.dtype]], list[str]] = {}
    for name, p in model.named_parameters():
        # Normalization with running statistics computes in their dtype: see
        # transforms/precision.py.
        keeps = any(isinstance(module, StatisticsNorm) for module, _ in found[name])
        narrow = p.dtype if keeps or not p.is_floating_point() else setup.param_dtype or p.dtype
        groups.setdefault((owner[name], (p.dtype, narrow)), []).append(name)
    return groups


class FullySharded(Sync):
    """When units are gathered and let go, and when their gradients are reduced."""

    def __init__(
        self,
        groups: Sequence[Group],
        used_by: Mapping[str, Sequence[Group]],
        axis: Axis,
        replicate: Axis,
        *,
        reduce_dtype: torch.dtype | None,
        reshard_after_forward: bool,
        keep_gathered: bool,
        defer_reduce: bool,
        prefetch: bool,
    ) -> None:
        self.groups, self.used_by, self.axis, self.replicate = groups, used_by, axis, replicate
        self.reshard_after_forward, self.keep_gathered = reshard_after_forward, keep_gathered
        self.defer_reduce, self.prefetch = defer_reduce, prefetch
        self.group_of = {part.name: group for group in groups for part in group.parts}
        self.staging: dict[torch.dtype, Tensor] = {}
        for group in groups:
            group.sum_in = reduce_dtype or group.flat.dtype
        self.last = True  # nothing follows the micro-batch that is under way
        self.staying = False  # units stay whole until the last micro-batch's backward
        # Forward, and backward: of units the last time, and this time.
        self.order: dict[bool, list[str]] = {False: [], True: []}
        self.trail: dict[bool, list[str]] = {False: [], True: []}
        self.ahead: str | None = None  # the unit that is on its way before it was asked for
        self.queue: list[Group] = []  # what owes a reduction, in the order in which it will be paid
        self.flying: Group | None = None  # whose gradient is on its way

    # --- parameters -------------------------------------------------------------------------------

    def microbatch(self, *, last: bool) -> None:
        self.last = last

    def unshard(self, unit: str, phase: Phase) -> None:
        backward = phase is Phase.BACKWARD
        if unit == ROOT:
            self._begin(backward)
        self.trail[backward].append(unit)
        if self.ahead not in (None, unit):
            self._let_go_ahead()
        self.ahead = None
        for group in self.used_by[unit]:
            group.users.add(unit)
            group.start_gather()
            group.finish_gather()
        if not backward and torch.is_grad_enabled():
            self._will_owe(unit)
        if self.prefetch:
            self._look_ahead(backward)

    def _begin(self, backward: bool) -> None:
        if not backward:
            for group in self.groups:
                group.check()
                if not self.staying:  # else whole since a forward without backward, if it is
                    group.free()
        elif not self.queue:  # a second backward through one forward
            for unit in self.order[False]:
                self._will_owe(unit)

    def reshard(self, unit: str, phase: Phase) -> None:
        backward = phase is Phase.BACKWARD
        for group in self.used_by[unit]:
            group.users.discard(unit)
            if not group.users and not self._stays(backward):
                group.free()
        if backward:
            for group in self.groups:
                if group.unit == unit:
                    group.visits -= 1  # with the last, what this rank has not used will not come
                    group.complete |= group.visits <= 0
            self._pay()
        if unit == ROOT:
            self._let_go_ahead()
            if backward:
                self._pay_all()
            if phase is not Phase.ABORT:
                self.order[backward], self.trail[backward] = self.trail[backward], []
                for group in self.groups:
                    group.wait_for_readers()  # whoever has left the model may write to it

    def _stays(self, backward: bool) -> bool:
        """Whether a unit that was used is kept whole."""
        if backward:
            self.staying = self.keep_gathered and not self.last
            return self.staying
        return torch.is_grad_enabled() and (self.staying or not self.reshard_after_forward)

    def _look_ahead(self, backward: bool) -> None:
        """Start to gather the unit that comes next, if this time is like the last."""
        order, trail = self.order[backward], self.trail[backward]
        known = order[: len(trail)] == trail and len(trail) < len(order)
        following = order[len(trail)] if known else None
        groups = self.used_by[following] if following is not None else ()
        started = [group.start_gather() for group in groups]
        if any(started):
            self.ahead = following

    def _let_go_ahead(self) -> None:
        """What was gathered ahead and not used after all."""
        if self.ahead is not None:
            for group in self.used_by[self.ahead]:
                if not group.users:
                    group.free()
            self.ahead = None

    # --- gradients --------------------------------------------------------------------------------

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            group = self.group_of[name]
            if group not in self.queue:  # of a unit that this forward had not shown
                self.queue.append(group)
            group.missing.discard(name)
            group.complete = group.complete or not group.missing
        self._pay()

    def _will_owe(self, unit: str) -> None:
        """Its gradients are to come; what is used first in forward is reached last."""
        for group in self.used_by[unit]:
            if group.trained:
                group.visits += group.unit == unit
                group.missing, group.complete = {part.name for part in group.trained}, False
                if group not in self.queue:
                    self.queue.insert(0, group)

    def _pay(self) -> None:
        """Reduce, in order, what has all its gradients."""
        if self.last or not self.defer_reduce:
            while self.queue and self.queue[0].complete:
                self._land()  # and so its whole gradients and one other's at most are there
                self.flying = self.queue.pop(0)
                self.flying.start_reduce(self._staging(self.flying.sum_in))

    def _staging(self, dtype: torch.dtype) -> Tensor:
        """Where gradients lie on their way: as large as the largest group's, made at first use."""
        if dtype not in self.staging:
            length = max(g.reduced for g in self.groups if g.sum_in == dtype)
            self.staging[dtype] = ops.shared_buffer(self.axis.size * length, dtype, self.axis)
        return self.staging[dtype]

    def _pay_all(self) -> None:
        """Backward is over: what has not come will not."""
        for group in self.queue:
            group.complete = True
        for group in self.groups:
            group.visits = 0
        self._pay()
        self._land()

    def _land(self) -> None:
        if self.flying is not None:
            self.flying.finish_reduce()
            self.flying = None

    def finish(self) -> None:
        self._pay_all()
        self._sum_over_replicas()
        self.staying = False
        for group in self.groups:
            group.total = None  # it lives on in `.grad`
            group.free()
            group.wait_for_readers()  # the optimizer is about to write

    def _sum_over_replicas(self) -> None:
        """dW[D_X, F]{U_Y} -> dW[D_X, F], of what some replica has used."""
        groups = [group for group in self.groups if group.trained]
        for group in groups:
            group.drop_cleared()
        if self.replicate.size == 1 or not groups:
            return
        have = torch.tensor([g.total is not None for g in groups], dtype=torch.uint8)
        have = ops.all_reduce(have.to(self.axis.wire.device), self.replicate, "max")
        groups = [group for group, yes in zip(groups, have.tolist(), strict=True) if yes]
        on_their_way = [group.start_sum(self.replicate) for group in groups]
        for group, pending in zip(groups, on_their_way, strict=True):
            pending.wait()
            group.hand_out()

    def after_step(self) -> None:
        self.staying = False
        for group in self.groups:
            group.free()

    def forget(self) -> None:
        self.queue.clear()
        self.trail = {False: [], True: []}
        self.ahead, self.staying = None, False
        for group in self.groups:
            group.users.clear()
            group.forget()
            group.free()

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            yield from group.held()
        for staging in self.staging.values():
            yield "buffers", staging
