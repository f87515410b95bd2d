"""FasterTransformer: a fixed batch, which runs until its last text is done.

The batch is a rectangle: a row for each sequence, as wide as the longest prompt and the longest
continuation. All of it is reserved at the start. A row whose text has ended writes on, and what it
writes is thrown away. Requests that come meanwhile wait for the whole batch. (NVIDIA,
FasterTransformer, docs/gpt_guide.md; Yu et al. 2022, "Orca", OSDI, section 3, on its two costs.)

    a   p p p p | 1 2 3 . . . . .     p: prompt, 1 2 3: tokens that someone reads
    b   p p     | 1 2 3 4 5 6 7 8     . : computed, and thrown away
    c   p p p   | 1 . . . . . . .     the next batch begins here ->

Nothing has to be decided while it runs, which suits a fixed shape and a graph captured once.
"""

from dataclasses import dataclass

from dist_lab.inference.queues import Queues
from dist_lab.inference.sequence import Sequence
from dist_lab.inference.step import Part


@dataclass
class Static:
    """Args: rows of the batch at most (max_batch_size)."""

    sequences: int = 8

    def schedule(self, queues: Queues) -> list[Part]:
        if not queues.running:
            batch = queues.waiting[: self.sequences]
            while len(batch) > 1 and self._blocks(queues, batch) > queues.pool.free:
                batch.pop()
            for sequence in batch:
                queues.admit(sequence, len(sequence.tokens), width(batch))
        return [(sequence, sequence.missing) for sequence in queues.running]

    def ended(self, queues: Queues) -> None:
        if all(sequence.reason for sequence in queues.running):
            queues.release_ended()

    def _blocks(self, queues: Queues, batch: list[Sequence]) -> int:
        return len(batch) * queues.pool.blocks_for(width(batch))


def width(batch: list[Sequence]) -> int:
    """The number of tokens that a row may grow to."""
    requests = [sequence.request for sequence in batch]
    return max(len(r.prompt) for r in requests) + max(r.new_tokens for r in requests)
