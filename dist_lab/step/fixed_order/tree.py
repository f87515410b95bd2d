"""Adds up the gradients of virtual shards along one binary tree, whoever computes them.

    shards   0   1   2   3   4   5   6   7
              \\ /     \\ /     \\ /     \\ /
    pairs     01      23      45      67       of 2 ranks, rank 0 adds 0123 and rank 1 adds 4567;
                \\    /          \\    /         then one gradient of each rank travels
    halves      0123            4567
                    \\         /
                     0 .. 7                    on 1 rank all is local, on 8 ranks all travel

A rank's micro-batches are neighbours in the tree, so they are a subtree of it. Autograd would add
each gradient to the sum of those before it: ((0 + 1) + 2) + 3. So we take each gradient out of
`.grad`, and add it as a binary counter carries: two sums of equal length become one. In order a
rank holds at most log2 of its micro-batches + 1 sums; any order gives the same bits. After its last
micro-batch `.grad` is the total, and the strategy, which comes next in the chain, reduces this.

A gradient that did not come counts as zeros, as it does in a sum over ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.schedules.actions import Action, Op
from dist_lab.step.eager import Runner
from dist_lab.step.fixed_order.order import check_microbatches
from dist_lab.step.grad_elsewhere import GradElsewhere
from dist_lab.step.protocol import ROOT, Phase, Sync


class SumTree:
    """The partial sums of one gradient, over `size` micro-batches, a power of two.

    Attributes:
        sums: (level, position) -> the sum of micro-batches position 2^level .. (position+1) 2^level
    """

    def __init__(self, size: int) -> None:
        self.levels = size.bit_length() - 1
        self.sums: dict[tuple[int, int], Tensor] = {}

    def add(self, gradient: Tensor, microbatch: int) -> None:
        """Add a micro-batch's gradient, once; its memory is the tree's from now on."""
        added = any((level, microbatch >> level) in self.sums for level in range(self.levels + 1))
        assert not added, f"two gradients of micro-batch {microbatch}"
        self._carry(gradient, 0, microbatch)

    def _carry(self, total: Tensor, level: int, position: int) -> None:
        while (neighbour := self.sums.pop((level, position ^ 1), None)) is not None:
            total = neighbour.add_(total)  # a + b and b + a have the same bits
            level, position = level + 1, position >> 1
        self.sums[level, position] = total

    def total(self) -> Tensor | None:
        """Remove and return the sum; None if no gradient was added."""
        for level in range(self.levels):
            for other, position in [key for key in self.sums if key[0] == level]:
                total = self.sums.pop((other, position))  # its neighbour did not come
                self._carry(total.add_(0.0), level + 1, position >> 1)  # -0.0 + 0.0 is 0.0
        return self.sums.pop((self.levels, 0), None)


class GradientTree(Sync):
    """Gives the strategy one gradient a step: the sum over this rank's virtual shards.

    Args:
        leaves: name -> the autograd leaf of a trained parameter.
        shards, microbatches: the number of virtual shards, of all ranks and of this one.
        axis: the data axis.
        reduces_in_backward: the strategy may reduce a gradient in the last backward although it has
            not come, as fsdp does.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], shards: int, microbatches: int, axis: Axis, *,
        reduces_in_backward: bool,
    ) -> None:  # fmt: skip
        self.leaves, self.shards, self.microbatches, self.axis = leaves, shards, microbatches, axis
        self.reduces_in_backward = reduces_in_backward
        self.trees = {name: SumTree(microbatches) for name in leaves}
        self.index = 0  # of the micro-batch in the step
        self.arrived: set[str] = set()  # gradients of this micro-batch
        self.last = True  # this micro-batch is the last of the step
        self._placeholders: dict[str, GradElsewhere] = {}  # reused in each step
        self._shown = False

    @contextmanager
    def shard(self) -> Iterator[None]:
        """The block is one virtual shard, also if no gradient comes, or contains such blocks."""
        if self.arrived:  # from a backward outside of such a block
            self._next()
        index = self.index
        yield
        if self.index == index:
            self._next()

    def _next(self) -> None:
        self.index, self.arrived = self.index + 1, set()

    def microbatch(self, *, last: bool) -> None:
        self.last = last

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            self._drop_placeholders()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for name in names:
            leaf, tree = self.leaves[name], self.trees[name]
            if name in self.arrived:
                raise UserError(
                    f"backward has reached {name} twice in one micro-batch, which is one virtual "
                    "shard: add up the losses and call backward once"
                )
            self.arrived.add(name)
            gradient, leaf.grad = leaf.grad, None
            if gradient is not None and self.index < self.microbatches:  # if not, finish refuses
                tree.add(gradient.detach(), self.index)
            if last:
                leaf.grad = tree.total()

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD and not self.last:
            self._show_placeholders()

    def finish(self) -> None:
        try:
            with together(self.axis):  # each rank counts its own micro-batches
                missed = self._check()
            assign_totals(self.leaves, self.trees, missed)
        finally:
            self.forget()

    def _check(self) -> list[str]:
        """Returns names of gradients of earlier micro-batches to which the last has not added."""
        if counted := self.index + bool(self.arrived):
            check_microbatches(counted, self.microbatches, self.shards)
        self._drop_placeholders()
        missed = [name for name, tree in self.trees.items() if tree.sums]
        if missed and self.reduces_in_backward:
            raise UserError(
                f"{missed[0]} got gradients from some micro-batches of a rank, and none from the "
                "last: fsdp has reduced its unit without them (reduce_order=); use it in every "
                'micro-batch, or give strategy="ddp" or "zero1"'
            )
        return missed

    def forget(self) -> None:
        for name, tree in self.trees.items():
            tree.total()
            if self.leaves[name].grad is self._placeholders.get(name):
                self.leaves[name].grad = None
        self.index, self.arrived, self.last, self._shown = 0, set(), True, False

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        yield from partial_sums(self.trees)

    def _show_placeholders(self) -> None:
        """Between micro-batches `.grad` refuses edits, but a user may clear it."""
        self._shown = True
        for name, tree in self.trees.items():
            if not tree.sums:
                continue
            if name in self._placeholders:
                self.leaves[name].grad = self._placeholders[name]
                continue
            advice = (
                f"the gradient of {name} is being added up in a fixed order: change it after "
                "job.finish()"
            )
            self._placeholders[name] = GradElsewhere.stand_at(self.leaves[name], None, advice)

    def _drop_placeholders(self) -> None:
        for name, tree in self.trees.items() if self._shown else ():
            if not tree.sums:
                continue
            leaf = self.leaves[name]
            if leaf.grad is None:  # the user has cleared it
                tree.total()
            elif leaf.grad is not self._placeholders.get(name):
                raise UserError(
                    f"the gradient of {name} was replaced between micro-batches, while it is being "
                    "added up in a fixed order: change it after job.finish()"
                )
            leaf.grad = None
        self._shown = False


class ShardRunner(Runner):
    """The plain runner, which tells the tree where a virtual shard begins and ends."""

    def __init__(self, tree: GradientTree, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tree = tree

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with self.tree.shard(), super().microbatch(last=last):
            yield


class StageGradientTree(Sync):
    """The same in a pipeline, whose schedule does the micro-batches in an order of its own.

    A schedule with a split backward computes some gradients in I and others in W. A weight may have
    one of each: a Linear splits its own, and `F.linear(x, linear.weight)` does not. So what I has
    computed waits for W, in which the micro-batch's gradient is complete. If W's are done late, as
    many gradients wait, and the tree holds more sums than in order.

    Args:
        names_of: stage as a unit -> names of the parameters that its backward computes gradients of

    Attributes:
        of_inputs: (name, micro-batch) -> the gradient that I has computed.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], microbatches: int, names_of: Mapping[str, Sequence[str]]
    ) -> None:
        self.leaves, self.microbatches, self.names_of = leaves, microbatches, names_of
        self.trees = {name: SumTree(microbatches) for name in leaves}
        self.of_inputs: dict[tuple[str, int], Tensor] = {}
        self._has_run = False

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            if self._has_run:
                raise UserError(
                    "with a fixed order job.run takes all micro-batches of a step: call it once "
                    "before job.finish()"
                )
            self._has_run = True

    def take(self, unit: str, action: Action) -> None:
        """An action has added a micro-batch's gradients: take them out of `.grad`.

        After the last one `.grad` is the total, also if some micro-batches have not used it.
        """
        for name in self.names_of[unit]:
            leaf, key = self.leaves[name], (name, action.microbatch)
            gradient, leaf.grad = leaf.grad, None
            if (earlier := self.of_inputs.pop(key, None)) is not None:
                gradient = earlier if gradient is None else earlier.add_(gradient)
            if gradient is None:
                continue
            if action.op is Op.I:
                self.of_inputs[key] = gradient.detach()
            else:
                self.trees[name].add(gradient.detach(), action.microbatch)
        if action.last:
            assign_totals(self.leaves, self.trees, self.names_of[unit])

    def finish(self) -> None:
        self._has_run = False

    def forget(self) -> None:
        self._has_run = False
        self.of_inputs.clear()
        for tree in self.trees.values():
            tree.total()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("gradients", gradient) for gradient in self.of_inputs.values())
        yield from partial_sums(self.trees)


def assign_totals(
    leaves: Mapping[str, Tensor], trees: Mapping[str, SumTree], names: Iterable[str]
) -> None:
    """Make each `.grad` the sum of its tree, if a gradient was added to it."""
    for name in names:
        total = trees[name].total()
        if total is not None:
            leaves[name].grad = total


def partial_sums(trees: Mapping[str, SumTree]) -> Iterator[tuple[str, Tensor]]:
    """The partial sums, for `Sync.extra_memory`."""
    for tree in trees.values():
        yield from (("gradients", partial) for partial in tree.sums.values())
