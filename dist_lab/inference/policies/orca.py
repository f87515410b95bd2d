"""Orca: a new choice at every step, and memory for the longest text reserved at the start.

Before Orca, servers chose a batch per request: it ran until its longest text was done (static.py).
Orca chooses at each iteration of the model. A sequence leaves when its text ends, and the first one
that waits takes its place in the next step. Prompts and single tokens run in the same step: linear
layers take all tokens in one row, and only attention knows sequences ("selective batching": Yu et
al. 2022, OSDI, section 3; in this project step.py and paged.py).

    admit    in order of arrival, while there is a place in the batch, and memory for
             prompt + new_tokens, which is taken now
    run      all: whole prompts of new ones, one token of the others

Memory is reserved for the longest text (algorithm 1, n_rsrv), so nobody is ever preempted. The
price is memory for tokens that come late or never.
"""

from dataclasses import dataclass

from dist_lab.inference.queues import Queues
from dist_lab.inference.step import Part


@dataclass
class Orca:
    """Args: sequences in a step at most (max batch size)."""

    sequences: int = 32

    def schedule(self, queues: Queues) -> list[Part]:
        while queues.waiting and len(queues.running) < self.sequences:
            first = queues.waiting[0]
            if not queues.admit(first, len(first.tokens), first.request.longest):
                break
        return [(sequence, sequence.missing) for sequence in queues.running]

    def ended(self, queues: Queues) -> None:
        queues.release_ended()
