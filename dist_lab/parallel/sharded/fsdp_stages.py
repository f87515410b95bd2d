"""FSDP inside a pipeline: the schedule says when a stage is unsharded, and when it is reduced.

    1UNSHARD0 1F0 1RESHARD0 ... 1UNSHARD0 1B0 1RESHARD0      the default: for each action
    1UNSHARD0 1F0 1F1 ... 1B0 ... 1B7 1RESHARD7              keep_gathered: once for all

In fsdp.py hooks drive the strategy, and ranks agree on an order of units as they go. Here actions
do, and the order is known: the ranks of one stage follow the same row of the schedule. The unit is
a whole stage, so its parameters are one message, and its memory while unsharded is a stage.

Elements sent per step of m micro-batches, for the P parameters of a rank's stages, times (N-1)/N:

    2mP + P    the default. A schedule that splits backward gathers three times: for F, I and W
    2P         keep_gathered
    ... + (m-1)P    defer_reduce=False: reduce after each micro-batch, not after the last only

Each reduction also sends N flags per parameter, and HSDP sums shards over the replicas: as in
fsdp.py. A gather is issued when its action comes and waited for at once; none is in advance.

With defer_reduce a stage's unsharded gradient is kept until its last micro-batch; then it is sent,
while other stages still compute.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.sharded.param_group import ParamGroup
from dist_lab.parallel.sharded.reductions import Reductions
from dist_lab.parallel.sharded.replicas import sum_over_replicas
from dist_lab.parallel.sharded.unsharded import first_conflict, refuse_conflict
from dist_lab.step.protocol import ROOT, Phase, Sync


class ShardedStages(Sync):
    """Unshards and reduces the groups of a stage when the schedule says so.

    Args:
        groups_of: unit -> the groups to unshard while it runs. The root's are parameters that
            several stages of this rank share: they stay unsharded during the run.
    """

    def __init__(
        self, groups: Sequence[ParamGroup], groups_of: Mapping[str, Sequence[ParamGroup]],
        axis: Axis, replicate: Axis, *, defer_reduce: bool,
    ) -> None:  # fmt: skip
        self.groups, self.groups_of, self.replicate = groups, groups_of, replicate
        self.axis, self.defer_reduce = axis, defer_reduce
        self.steps = 0
        self.reductions = Reductions(groups, axis)

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.FORWARD:
            for group in self.groups:
                group.sync_requires_grad()
                group.sync_cleared()
                group.check_in_memory()
        for group in self.groups_of[unit]:
            group.users.add(unit)
            group.issue_unshard()
        for group in self.groups_of[unit]:
            group.wait_unshard()

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.ABORT:
            return  # forget() follows
        for group in self.groups_of[unit]:
            group.users.discard(unit)
            if not group.users:
                group.reshard()

    def backward_done(self, unit: str, *, last: bool) -> None:
        if last or not self.defer_reduce:
            for group in self.groups_of[unit]:
                if group.unit == unit and group.trained:
                    self.reductions.issue(group)  # dW[D, F]{U_X} -> dW[D_X, F]
        elif unit == ROOT:  # the step has another run to come; until then users may clear gradients
            for group in self.groups:
                group.mark_unreduced()

    def finish(self) -> None:
        self._compare_writes()
        self.reductions.wait()
        sum_over_replicas(self.groups, self.replicate)
        for group in self.groups:
            group.sharded_grads.total = None  # the memory lives on in `.grad`
            group.wait_for_readers()  # the optimizer is about to write

    def _compare_writes(self) -> None:
        """Refuse forwards that write different values on each rank: in steps 1, 2, 4, 8 ..."""
        self.steps += 1
        written = {n: digest for group in self.groups for n, digest in group.pop_written()}
        if self.steps & (self.steps - 1) == 0:
            messages = ops.all_gather_bytes(json.dumps(written).encode(), self.axis)
            refuse_conflict(first_conflict([json.loads(message) for message in messages]))

    def forget(self) -> None:
        for group in self.groups:
            group.forget()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            yield from group.extra_memory()
        yield from (("buffers", buffer) for buffer in self.reductions.staging.values())
