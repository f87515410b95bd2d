"""DeepSpeed-MII: "dynamic SplitFuse", steps of exactly one number of tokens while there is work.

The time of a step depends on its number of tokens, hardly on whose they are, and a step of few
tokens wastes the machine. So there is one right number, and every step has it. Long prompts are
cut, and short ones put together, until they fill what decoding leaves (Holmes et al. 2024,
"DeepSpeed-FastGen", arXiv:2401.08671, section 3).

    budget 8    a b c | d0 d1 d2 d3 d4          one token of a, b, c, the first five of d
                a b c | d5 d6 | e0 e1 e2        the rest of d, the first three of e
                a b c d | e3 e4 e5 e6

So the time between two tokens of a is always the same, whoever comes. Blocks are taken on demand. A
sequence that finds none waits for the next step. If nobody can go on, all are reset, and computed
again from their tokens (DeepSpeed-MII, mii/batching/ragged_batching.py, `schedule_requests`).
"""

from dataclasses import dataclass

from dist_lab.inference.queues import Queues
from dist_lab.inference.step import Part


@dataclass
class SplitFuse:
    """Args: tokens of a step (max_ragged_batch_size); sequences (max_ragged_sequence_count)."""

    budget: int = 64
    sequences: int = 32

    def schedule(self, queues: Queues) -> list[Part]:
        parts = self._fill(queues)
        if not parts:
            for sequence in reversed(queues.running[:]):
                queues.preempt(sequence)
            parts = self._fill(queues)
        return parts

    def ended(self, queues: Queues) -> None:
        queues.release_ended()

    def _fill(self, queues: Queues) -> list[Part]:
        """Fill the budget: with those that decode, then with prompts, then with new ones."""
        parts: list[Part] = []
        left, pool = self.budget, queues.pool
        for sequence in [s for s in queues.running if s.missing == 1]:
            if left and queues.grow(sequence, len(sequence.tokens)):
                parts.append((sequence, 1))
                left -= 1
        for sequence in [s for s in queues.running if s.missing > 1]:
            if not left:
                return parts
            count = min(left, sequence.missing)
            rest = pool.blocks_for(len(sequence.tokens)) - len(sequence.table.blocks)
            # A prompt goes on only if all of it fits. While one cannot, nobody overtakes it.
            if rest > pool.free or not queues.grow(sequence, sequence.seen + count):
                return parts
            parts.append((sequence, count))
            left -= count
        return parts + queues.admit_in_turn(left, self.sequences, whole=True)
