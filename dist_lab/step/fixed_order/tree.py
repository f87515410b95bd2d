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
`.grad`, and add it as a binary counter carries: two sums of equal length become one. A rank holds
at most log2 of its micro-batches + 1 sums. After its last micro-batch `.grad` is the total, and the
strategy, which comes next in the chain, reduces this. Sums in any order of the micro-batches.

A gradient that did not come counts as zeros, as it does in a sum over ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.fixed_order.order import check_microbatches
from dist_lab.step.grad_elsewhere import GradElsewhere
from dist_lab.step.protocol import ROOT, Phase, Sync


class SumTree:
    """The partial sums of one gradient, over `size` micro-batches, a power of two.

    Attributes:
        sums: (level, position) -> the sum of micro-batches position 2^level .. (position+1) 2^level
        count: the number of micro-batches that were added.
    """

    def __init__(self, size: int) -> None:
        self.levels = size.bit_length() - 1
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.count = 0

    def add(self, gradient: Tensor, microbatch: int) -> None:
        """Add a micro-batch's gradient; its memory is the tree's from now on."""
        self.count += 1
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
        self.count = 0
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

    def microbatch(self, *, last: bool) -> None:  # called when one begins, and when one ends
        if self.arrived:
            self.index, self.arrived = self.index + 1, set()
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
            if last or self.index >= self.microbatches:
                check_microbatches(self.index + 1, self.microbatches, self.shards)
            self.arrived.add(name)
            gradient, leaf.grad = leaf.grad, None
            if gradient is not None:
                tree.add(gradient.detach(), self.index)
            if last:
                leaf.grad = tree.total()

    def reshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD and not self.last:
            self._show_placeholders()

    def finish(self) -> None:
        if counted := self.index + bool(self.arrived):
            check_microbatches(counted, self.microbatches, self.shards)
        self._drop_placeholders()
        # Gradients of earlier micro-batches, to which the last one has not added.
        missed = [name for name, tree in self.trees.items() if tree.sums]
        if self.reduces_in_backward:
            with together(self.axis):
                if missed:
                    raise UserError(
                        f"{missed[0]} got gradients from some micro-batches of a rank, and none "
                        "from the last: fsdp has reduced its unit without them (reduce_order=); "
                        'use it in every micro-batch, or give strategy="ddp" or "zero1"'
                    )
        assign_totals(self.leaves, self.trees, missed)
        self._start_over()

    def forget(self) -> None:
        for name, tree in self.trees.items():
            tree.total()
            if self.leaves[name].grad is self._placeholders.get(name):
                self.leaves[name].grad = None
        self._start_over()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        yield from partial_sums(self.trees)

    def _start_over(self) -> None:
        self.index, self.arrived, self.last, self._shown = 0, set(), True, False

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


class StageGradientTree(Sync):
    """The same in a pipeline, whose schedule does the micro-batches in an order of its own.

    Args:
        names_of: stage as a unit -> names of the parameters that its backward computes gradients of
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], microbatches: int, names_of: Mapping[str, Sequence[str]]
    ) -> None:
        self.leaves, self.microbatches, self.names_of = leaves, microbatches, names_of
        self.trees = {name: SumTree(microbatches) for name in leaves}
        self.complete: set[str] = set()  # `.grad` is the total

    def unshard(self, unit: str, phase: Phase) -> None:
        if self.complete and unit == ROOT and phase is Phase.BACKWARD:
            raise UserError(
                "with a fixed order job.run takes all micro-batches of a step: call it once before "
                "job.finish()"
            )

    def take(self, unit: str, microbatch: int) -> None:
        """An action has added a micro-batch's gradients: take them out of `.grad`.

        A schedule with a split backward computes biases in I, and weights in W.
        """
        for name in self.names_of[unit]:
            leaf, tree = self.leaves[name], self.trees[name]
            if leaf.grad is None or name in self.complete:
                continue
            gradient, leaf.grad = leaf.grad, None
            tree.add(gradient.detach(), microbatch)
            if tree.count == self.microbatches:
                self._complete([name])

    def backward_done(self, unit: str, *, last: bool) -> None:
        if last and unit != ROOT:  # those that some micro-batch has not used
            self._complete([name for name in self.names_of[unit] if self.trees[name].sums])

    def finish(self) -> None:
        self.complete = set()

    def forget(self) -> None:
        self.complete = set()
        for tree in self.trees.values():
            tree.total()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        yield from partial_sums(self.trees)

    def _complete(self, names: Sequence[str]) -> None:
        assign_totals(self.leaves, self.trees, names)
        self.complete.update(names)


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
