"""FSDP, or ZeRO-3: each rank keeps a shard of every parameter, and gathers a unit to use it.

    In[B_X, D] . W[D_X, F] -> Out[B_X, F]     W[D_X, F] -> W[D, F]         before a unit is used
                                              dW[D, F]{U_X} -> dW[D_X, F]  after its backward

A unit, such as a transformer block, is unsharded just before its forward and resharded after it.
The same happens around its backward, and then its gradient is reduced. While one unit computes, the
next one's all-gather is in flight. Each rank stores, and steps on, 1/N of the model.

Elements sent per step of k micro-batches, for P parameters, times (N-1)/N. Each reduction also
sends N flags per parameter, which tell whether a rank used it.

    3kP           the default: gather for each forward and each backward, reduce after each backward
    2kP           reshard_after_forward=False: gather once for both
    (k+2)P        keep_gathered: gather for the first forward and the first backward only
    2kP + P       defer_reduce: keep unsharded gradients, and reduce them after the last backward

Memory per rank: 1/N of parameters, gradients and optimizer state. On top come the root's own
parameters and two units while they are unsharded, and two units' gradients before their reduction.
HSDP repeats all this along a second axis Y, of M replicas: see replicas.py.
Rajbhandari et al. 2020 (arXiv:1910.02054); Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277).

To read: `apply` and FullySharded here (what happens when), param_group.py (a group's memory),
sharded_param.py (a parameter as two tensors); then common_order.py and sharded_grads.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.layout.layout import FlatShard, Shard
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.param_slots import param_slots, refuse_recurrent
from dist_lab.parallel.sharded.common_order import CommonOrder
from dist_lab.parallel.sharded.fsdp_stages import ShardedStages
from dist_lab.parallel.sharded.param_group import Grads, ParamGroup
from dist_lab.parallel.sharded.reductions import Reductions
from dist_lab.parallel.sharded.replicas import sum_over_replicas
from dist_lab.parallel.sharded.unit_groups import gather_in_codes, groups_by_unit, names_by_group
from dist_lab.step.protocol import ROOT, Applied, Phase, Sync
from dist_lab.step.setup import Setup
from dist_lab.transforms.offload import maker, offloaded


def apply(
    setup: Setup,
    *,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    keep_gathered: bool = False,
    defer_reduce: bool | None = None,
    prefetch: bool = True,
    offload: str = "",
) -> Applied:
    """Shard every parameter over the ranks.

    Args:
        setup: parameters are sharded along fsdp, and the shards replicated along dp, whose size is
            1 under plain FSDP. Units are gathered, and compute, in setup.param_dtype.
        reduce_dtype: the dtype in which gradients are summed; default: that of the shards.
        reshard_after_forward, keep_gathered, defer_reduce: see the table above. In a pipeline
            defer_reduce is on by default.
        prefetch: gather the next unit while one computes.
        offload: a folder for files that hold shards and optimizer state. Or "cpu", for a model on
            an accelerator: shards stay in CPU memory, and the optimizer runs on the CPU.
    """
    axis, replicate = setup.axes["fsdp"], setup.axes["dp"]
    defers = setup.stages is not None if defer_reduce is None else defer_reduce
    for dtype in (setup.param_dtype, reduce_dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"parameters and gradients cannot be {dtype}; give a floating dtype")
    refuse_recurrent(setup.whole_model)
    make_memory = maker(offload, axis.device)
    slots, gather_axis = param_slots(*setup.roots), setup.channel()
    layouts = setup.owing_sums(*(a for a in (axis, replicate) if a.size > 1))
    layouts = {
        name: layout.split(axis.name, Shard(0) if layout.shape else FlatShard(0, 1))
        for name, layout in layouts.items()
    }
    groups = [
        ParamGroup(
            unit, {name: slots[name] for name in names}, dtypes, axis, gather_axis,
            setup.full_value, make_memory, setup.slot_length,
        )
        for (unit, dtypes, _), names in names_by_group(setup, slots).items()
    ]  # fmt: skip
    for group in groups:
        group.reduce_dtype = reduce_dtype or group.shard_dtype
    gather_in_codes(groups, setup)
    groups_of = groups_by_unit(groups, setup.units)
    if setup.stages is None:
        sync: Sync = FullySharded(
            groups, groups_of, axis, gather_axis, replicate,
            prefetch=prefetch, reshard_after_forward=reshard_after_forward,
            keep_gathered=keep_gathered, defer_reduce=defers,
        )  # fmt: skip
    elif reshard_after_forward and prefetch:
        sync = ShardedStages(groups, groups_of, axis, replicate, defer_reduce=defers)
    elif reshard_after_forward:
        raise UserError(
            "in a pipeline a stage is gathered when the schedule says so, and never in advance: "
            "leave out prefetch=False"
        )
    else:
        raise UserError(
            "in a pipeline several forwards come before the first backward, so a stage is gathered "
            "for each action, or once: give keep_gathered instead of reshard_after_forward=False"
        )
    leaves = {param.name: param.unsharded for group in groups for param in group.params}
    make_optimizer = partial(offloaded, make_memory) if make_memory and offload != "cpu" else None
    return Applied(
        layouts, sync, leaves=leaves, sharded_between_units=True,
        unshard_each_action=not keep_gathered,
        reduce_each_microbatch=not defers,
        unit_of={param.name: group.unit for group in groups for param in group.params},
        make_optimizer=make_optimizer,
    )  # fmt: skip


class FullySharded(Sync):
    """Decides when groups are unsharded and resharded, and when their gradients are reduced.

    [Note: one order] All ranks must issue collectives in one order. For gathers, common_order.py
    sees to that. Gradients become ready in different orders on different ranks. So every rank
    reduces units in reverse forward order, once per micro-batch, also units that it has not used.
    Gathers and reductions use two separate process groups.

    Args:
        groups_of: unit -> the groups to unshard while it runs.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        groups_of: Mapping[str, Sequence[ParamGroup]],
        axis: Axis,
        gather_axis: Axis,
        replicate: Axis,
        *,
        reshard_after_forward: bool,
        keep_gathered: bool,
        defer_reduce: bool,
        prefetch: bool,
    ) -> None:
        self.groups, self.groups_of, self.replicate = groups, groups_of, replicate
        self.reshard_after_forward, self.keep_gathered = reshard_after_forward, keep_gathered
        self.defer_reduce, self.prefetch = defer_reduce, prefetch
        self.group_of = {param.name: group for group in groups for param in group.params}
        self.reductions = Reductions(groups, axis)
        self.last = True  # this micro-batch is the last of the step
        self.keep_unsharded = False  # units stay unsharded until the last micro-batch's backward
        gather, skip = (partial(turn, Phase.FORWARD) for turn in (self._gather, self._skip))
        self.order = CommonOrder(list(groups_of), gather_axis, gather, skip)
        self.prefetched: str | None = None  # the next unit, whose gather was issued in advance
        self.gathered_early: list[str] = []  # units gathered before this rank's backward needs them
        self.to_reduce: list[ParamGroup] = []  # EXPECTED or COMPLETE, in the order of reductions

    # --- parameters -------------------------------------------------------------------------------

    def microbatch(self, *, last: bool) -> None:
        self.last = last

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT:
            self._enter_model(phase)
        if phase is Phase.FORWARD:
            self.order.use(unit)
            if not self.order.is_open and torch.is_grad_enabled():  # called outside the model
                self._expect_grads(unit)
        else:
            for turn, is_still_to_come in self.order.turns_before(unit):
                if is_still_to_come:
                    self._gather(phase, turn)
                    self.gathered_early.append(turn)
                    self._reduce_ready()
                else:
                    self._skip(phase, turn)
            if self.prefetched != unit:
                self._drop_prefetched()
            self._gather(phase, unit)

    def backward_will_come(self, unit: str, visit: object) -> None:
        self.order.returns_to(unit, visit)

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.ABORT:
            return  # forget() follows
        if phase is Phase.BACKWARD:
            self.keep_unsharded = self.keep_gathered and not self.last
        else:
            self.order.leave(unit)
        if unit == ROOT and phase is Phase.FORWARD:
            self.order.end({n: digest for g in self.groups for n, digest in g.pop_written()})
            for turn in self.order.returning:
                self._expect_grads(turn)
        elif unit == ROOT:
            for turn, _ in self.order.turns_before(None):
                self._skip(phase, turn)
            for early in self.gathered_early:
                self._release(phase, early)
            self.gathered_early.clear()
        self._release(phase, unit)
        if unit == ROOT:
            self._leave_model(phase)
        self.order.refuse_conflict()

    def _gather(self, phase: Phase, unit: str) -> None:
        """Unshard a unit, and prefetch the next one."""
        self.prefetched = None
        for group in self.groups_of[unit]:
            group.users.add(unit)
            group.issue_unshard()
            group.wait_unshard()
        next_unit = self._next(phase)
        if self.prefetch and next_unit is not None:
            issued = [group.issue_unshard() for group in self.groups_of[next_unit]]
            self.prefetched = next_unit if any(issued) else None

    def _next(self, phase: Phase) -> str | None:
        """The unit that has the next turn."""
        backward_turns = [unit for unit, _ in self.order.backward[:1]]
        return next(iter(self.order.upcoming if phase is Phase.FORWARD else backward_turns), None)

    def _drop_prefetched(self) -> None:
        """Reshard the prefetched unit, if it turns out not to be used."""
        for group in self.groups_of[self.prefetched] if self.prefetched is not None else ():
            if not group.users:
                group.reshard()
        self.prefetched = None

    def _release(self, phase: Phase, unit: str) -> None:
        """Reshard a unit unless another one needs it, and reduce gradients that are complete."""
        keep = self.keep_unsharded or (phase is Phase.FORWARD and not self.reshard_after_forward)
        keep = keep and (phase is Phase.BACKWARD or torch.is_grad_enabled())
        for group in self.groups_of[unit]:
            group.users.discard(unit)
            if not group.users and not keep:
                group.reshard()
        if phase is Phase.BACKWARD:
            for group in self.groups_of[unit]:
                if group.unit == unit:
                    group.visit_ended()
            self._reduce_ready()

    def _skip(self, phase: Phase, unit: str) -> None:
        """Take part in the gather of a unit that only other ranks use."""
        in_use = any(unit in group.users for group in self.groups_of[unit])
        self._gather(phase, unit)
        if not in_use:
            self._release(phase, unit)

    def _enter_model(self, phase: Phase) -> None:
        for group in self.groups:
            group.sync_requires_grad()
            group.sync_cleared()
            if phase is Phase.FORWARD:
                group.check_in_memory()
                if not self.keep_unsharded:  # a forward without backward may have left it unsharded
                    group.reshard()
        if phase is Phase.FORWARD:
            self.order.begin()
        elif not self.to_reduce:  # a second backward through the same forward
            for unit in self.order.returning:
                self._expect_grads(unit)

    def _leave_model(self, phase: Phase) -> None:
        if phase is Phase.BACKWARD:
            self._drop_prefetched()
            self._reduce_all()
            self.order.backward_ends()
            for group in self.groups if self.defer_reduce and not self.last else ():
                group.mark_unreduced()
        for group in self.groups:
            group.wait_for_readers()  # the user may now write to the shards

    # --- gradients --------------------------------------------------------------------------------

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            group = self.group_of[name]
            if group.grads is Grads.NONE:  # the forward did not expect them
                group.expect_grads()
                self.to_reduce.append(group)
            group.grad_arrived(name)
        self._reduce_ready()

    def _expect_grads(self, unit: str) -> None:
        """Put the unit's groups first in `to_reduce`, which has the reverse of forward order."""
        for group in self.groups_of[unit]:
            if group.trained:
                group.visits += group.unit == unit
                if group.grads is Grads.NONE:
                    self.to_reduce.insert(0, group)
                group.expect_grads()

    def _reduce_ready(self) -> None:
        """Reduce, in order, the groups that have all their gradients."""
        if self.last or not self.defer_reduce:
            while self.to_reduce and self.to_reduce[0].grads is Grads.COMPLETE:
                if self.order.has_backward_turn(self.to_reduce[0].unit):
                    break  # another rank's backward may still have to gather this unit
                self.reductions.issue(self.to_reduce.pop(0))

    def _reduce_all(self) -> None:
        """Reduce all remaining groups after backward. Gradients that did not come count as 0."""
        for group in self.groups:
            group.visits = 0
            group.expect_no_more_grads()
        self._reduce_ready()
        self.reductions.wait()

    def finish(self) -> None:
        self._reduce_all()
        sum_over_replicas(self.groups, self.replicate)
        self.keep_unsharded = False
        for group in self.groups:
            group.sharded_grads.total = None  # the memory lives on in `.grad`
            group.reshard()
            group.wait_for_readers()  # the optimizer is about to write

    def after_step(self) -> None:
        self.keep_unsharded = False
        for group in self.groups:
            group.reshard()

    def forget(self) -> None:
        self.to_reduce.clear()
        self.keep_unsharded = False
        self.order.abort()
        self.prefetched = None
        self.gathered_early.clear()
        for group in self.groups:
            group.forget()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            yield from group.extra_memory()
        buffers = self.order.ballot, *self.reductions.staging.values()
        yield from (("buffers", buffer) for buffer in buffers)
