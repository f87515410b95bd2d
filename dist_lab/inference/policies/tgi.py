"""text-generation-inference: worst-case reservation, and prompts that interrupt only if it pays.

A step computes prompts, or it decodes. While prompts are computed, everybody who decodes waits. So
waiting requests are let in together, when they are many beside those that run, or when they have
waited for long (text-generation-inference 3, backends/v3/src/backend.rs, `batching_task`):

    prefill    if waiting >= waiting_served_ratio x running, or after max_waiting decode steps
    decode     else, one token of each that runs; and once between two prefills

    prefill d e     a b c pause
    decode          a b c d e
    decode          a b c d e       f waits: 1 < 0.3 x 5
    decode          a b c   e       ... until d and others have ended, or f has waited for long

Memory is reserved for prompt + new_tokens of each (`max_batch_total_tokens`: here all blocks), so
nobody is preempted, and memory is empty for a long time. A server has to be told how much is safe.
"""

from dataclasses import dataclass

from dist_lab.inference.queues import Queues
from dist_lab.inference.step import Part


@dataclass
class TGI:
    """Args: as the server's options of these names; sequences is max_batch_size.

    `max_batch_prefill_tokens` is the budget of a prefill. A longer prompt has a step of its own,
    where the server would refuse it.
    """

    max_batch_prefill_tokens: int = 256
    waiting_served_ratio: float = 0.3
    max_waiting_tokens: int = 20
    sequences: int = 32

    decodes: int = 0  # steps since the last prefill

    def schedule(self, queues: Queues) -> list[Part]:
        running = list(queues.running)
        if not running or (self.decodes and self._pays(queues)):
            new = queues.waiting[: self._fitting(queues)]
            for sequence in new:
                queues.admit(sequence, len(sequence.tokens), sequence.request.longest)
            self.decodes = 0
            return [(sequence, sequence.missing) for sequence in new]
        self.decodes += 1
        return [(sequence, 1) for sequence in running]

    def ended(self, queues: Queues) -> None:
        queues.release_ended()

    def _pays(self, queues: Queues) -> bool:
        """Whether the requests that can come in now are enough to let all others wait."""
        late = self.decodes >= self.max_waiting_tokens
        least = 1 if late else max(1, int(self.waiting_served_ratio * len(queues.running)))
        return self._fitting(queues) >= least

    def _fitting(self, queues: Queues) -> int:
        """The number of waiting requests that fit into the budget, the blocks and the batch."""
        tokens = blocks = 0
        places = max(0, self.sequences - len(queues.running))
        for count, sequence in enumerate(queues.waiting[:places]):
            tokens += len(sequence.tokens)
            blocks += queues.pool.blocks_for(sequence.request.longest)
            over = tokens > self.max_batch_prefill_tokens and count > 0
            if over or blocks > queues.pool.free:
                return count
        return min(places, len(queues.waiting))
