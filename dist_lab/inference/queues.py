"""Sequences that wait and sequences that run, and what a policy may do with them."""

from typing import Protocol

from dist_lab.inference.blocks import Pool
from dist_lab.inference.sequence import Sequence
from dist_lab.inference.step import Part


class Policy(Protocol):
    """Decides who runs. Its decisions depend on the queues and on earlier decisions only.

    So all ranks decide the same without speaking to each other.
    """

    def schedule(self, queues: "Queues") -> list[Part]:
        """Choose the sequences of the next step, and how many tokens of each it computes.

        Admits, grows and preempts sequences in the queues. At least one sequence runs.
        """

    def ended(self, queues: "Queues") -> None:
        """Release running sequences that have ended. Called when there are some (`reason`)."""


class Queues:
    """The sequences of an engine, and their blocks.

    Attributes:
        waiting: in the order in which they came; preempted ones are ahead of those.
        running: in the order in which they were admitted. They have blocks.
        preemptions: so many times a sequence has lost its blocks before its end.
        cached: tokens of prompts that were found in the cache.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.cached = 0

    def admit(self, sequence: Sequence, new: int, room: int = 0) -> int:
        """Let a waiting sequence run, if there are enough free blocks.

        Args:
            new: compute so many tokens in this step at most.
            room: take blocks for so many tokens in all now, if that is more.

        Returns:
            The number of tokens to compute in this step. 0: it waits on, there are no blocks.
        """
        fresh = not sequence.table.blocks
        if fresh:
            sequence.seen = self.pool.start(sequence.table, sequence.tokens)
        found, count = sequence.seen, min(new, sequence.missing)
        if not self.grow(sequence, max(room, found + count)):
            if fresh:
                self._release(sequence)
            return 0
        self.cached += min(found, len(sequence.request.prompt))
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return count

    def admit_in_turn(self, budget: int, most: int, *, whole: bool = False) -> list[Part]:
        """Let those that wait run, in the order in which they wait, until one does not fit.

        Args:
            budget: compute so many tokens of them in this step at most.
            most: sequences that run at once.
            whole: there must be blocks for all tokens of a sequence, not only for this step's.

        Returns:
            The new ones, each with the number of tokens to compute in this step.
        """
        parts: list[Part] = []
        while budget and self.waiting and len(self.running) < most:
            first = self.waiting[0]
            if whole and self.pool.blocks_for(len(first.tokens)) > self.pool.free:
                break
            count = self.admit(first, budget)
            if not count:
                break
            parts.append((first, count))
            budget -= count
        return parts

    def grow(self, sequence: Sequence, room: int) -> bool:
        """Take blocks for `room` tokens in all. False, and no change: there are too few."""
        return self.pool.reserve(sequence.table, sequence.seen, room)

    def hand_on(self, old: Sequence, new: Sequence) -> None:
        """Give the blocks of a sequence to one whose tokens begin with those in the blocks."""
        assert not new.table.blocks, new.table
        assert old.tokens[: old.seen] == new.tokens[: old.seen]
        new.table, old.table = old.table, new.table
        new.seen, old.seen = min(old.seen, len(new.tokens) - 1), 0

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks from a running sequence. It keeps its tokens, and waits as the first.

        When it is admitted again, all its tokens are computed again, as if they were a prompt.
        """
        self.release(sequence)
        self.waiting.insert(0, sequence)
        self.preemptions += 1

    def release(self, sequence: Sequence) -> None:
        """Take the blocks from a running sequence that has ended."""
        self.running.remove(sequence)
        self._release(sequence)

    @property
    def empty(self) -> int:
        """Places for a token in the blocks of running sequences that have none, or a useless one.

        A block that several sequences share counts once.
        """
        size, filled = self.pool.size, dict[int, int]()  # of each block, its useful tokens
        for sequence in self.running:
            useful = 0 if sequence.reason else sequence.seen
            for index, block in enumerate(sequence.table.blocks):
                tokens = min(size, max(0, useful - index * size))
                filled[block] = max(filled.get(block, 0), tokens)
        return len(filled) * size - sum(filled.values())

    def release_ended(self) -> None:
        for sequence in [s for s in self.running if s.reason]:
            self.release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.table)
        sequence.seen = 0
