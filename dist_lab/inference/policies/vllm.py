"""vLLM: blocks on demand, a token budget, and preemption of the newest sequence.

A sequence takes a block when it needs one. So as many sequences run as their tokens fit, not as
their longest possible texts would fit. Sooner or later memory is full while all still grow. Then
the sequence that was admitted last gives its blocks back, and waits. All its tokens are computed
again later, unless the prefix cache still has them (Kwon et al. 2023, arXiv:2309.06180, section
4.5: "recomputation").

    step    budget of tokens (64):   one each for all that decode, then parts of prompts
            no free block?           preempt the newest, until there is one or it is oneself
            budget left?             admit those that wait, if nobody was preempted

Prompts are cut to what the budget leaves ("chunked prefill", Agrawal et al. 2023,
arXiv:2308.16369), so a long prompt does not hold up those that decode. This is the order of vLLM's
V1 scheduler (vllm/v1/core/sched/scheduler.py), which knows no prefill and decode phases either.
"""

from dataclasses import dataclass

from dist_lab.inference.queues import Queues
from dist_lab.inference.step import Part


@dataclass
class VLLM:
    """Args: tokens of a step at most (max_num_batched_tokens); sequences (max_num_seqs)."""

    budget: int = 64
    sequences: int = 32

    def schedule(self, queues: Queues) -> list[Part]:
        parts: list[Part] = []
        left, preemptions = self.budget, queues.preemptions
        for sequence in list(queues.running):  # the oldest first
            if not left or sequence not in queues.running:
                break
            count = min(left, sequence.missing)
            while not queues.grow(sequence, sequence.seen + count):
                newest = queues.running[-1]
                queues.preempt(newest)
                if newest is sequence:
                    break
            else:
                parts.append((sequence, count))
                left -= count
        if queues.preemptions > preemptions:
            return parts
        return parts + queues.admit_in_turn(left, self.sequences)

    def ended(self, queues: Queues) -> None:
        queues.release_ended()
