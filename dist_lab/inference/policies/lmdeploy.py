"""lmdeploy's TurboMind: a persistent batch of slots, and sessions that stay in memory.

A conversation comes back: its next request is the text so far, and one message more. So a text that
has ended keeps its blocks, as long as nobody needs them. Its next request continues where it
stopped, and computes the message only. Memory is a cache of sequences (InternLM, lmdeploy,
docs/en/inference/turbomind.md: "persistent batch", "KV cache manager"):

    hit     the session is in memory: its blocks go on to the new request
    miss    it was evicted: its token ids are computed again, as a prompt
    evict   when blocks are needed: the session that was used the longest time ago, at once as a
            whole; when there is none, the newest sequence that runs

    slots    [ a | b | - | d ]      a place of the batch: free when a text ends, taken at once
    kept     x  y  z                sessions whose text has ended, the oldest use first

The server stores token ids of evicted sessions itself. Here clients send all of their text, as in
OpenAI's API, and a session is found by its tokens. To the client, memory looks infinite.
"""

from dataclasses import dataclass, field

from dist_lab.inference.queues import Queues
from dist_lab.inference.sequence import Sequence
from dist_lab.inference.step import Part


@dataclass
class LMDeploy:
    """Args: slots of the batch (max_batch_size).

    Attributes:
        kept: sequences that have ended and still have blocks.
    """

    slots: int = 32
    kept: list[Sequence] = field(default_factory=list)

    def schedule(self, queues: Queues) -> list[Part]:
        parts: list[Part] = []
        for sequence in queues.running[:]:  # the oldest first
            if sequence not in queues.running:
                break
            while not queues.grow(sequence, len(sequence.tokens)):
                if not self._evict(queues):
                    newest = queues.running[-1]
                    queues.preempt(newest)
                    if newest is sequence:
                        break
            else:
                parts.append((sequence, sequence.missing))
        while queues.waiting and len(queues.running) < self.slots:
            sequence = queues.waiting[0]
            count = self._admit(queues, sequence)
            if not count:
                break
            parts.append((sequence, count))
        return parts

    def ended(self, queues: Queues) -> None:
        ended = [sequence for sequence in queues.running if sequence.reason]
        for sequence in ended:
            queues.running.remove(sequence)
        self.kept += ended

    def _admit(self, queues: Queues, sequence: Sequence) -> int:
        session = self._find(sequence.tokens)
        if session is not None:
            self.kept.remove(session)
            queues.hand_on(session, sequence)
        while not (count := queues.admit(sequence, len(sequence.tokens))):
            if not self._evict(queues):
                if session is not None:  # it waits on, and others may need its blocks
                    queues.hand_on(sequence, session)
                    self.kept.append(session)
                return 0
        return count

    def _find(self, tokens: list[int]) -> Sequence | None:
        """The session of which these tokens are a continuation: the longest, if there are some."""
        of = [s for s in self.kept if s.tokens[: s.seen] == tokens[: s.seen]]
        return max(of, key=lambda s: s.seen, default=None)

    def _evict(self, queues: Queues) -> bool:
        """Free the blocks of the session that was used the longest time ago, if there is one."""
        if self.kept:
            queues.pool.release(self.kept.pop(0).table)
            return True
        return False
