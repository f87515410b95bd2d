"""The engine: requests come and go while it runs, in steps, over a paged cache.

    step    policy: who runs, with how many tokens, who waits     policies/
            one forward of all their new tokens, and a choice     step.py, paged.py
            events: the new tokens, and texts that have ended

A request joins at any step and leaves at its own end; nobody waits for the longest text of a batch
(Yu et al. 2022, "Orca", OSDI, section 3: iteration-level scheduling). Its tokens do not depend on
who else runs, nor on preemptions: see sampling.py.

Every rank has an engine, and makes the same calls in the same order. What an engine does depends on
these calls only, never on a clock. So the ranks decide alike, and send nothing to agree on it.
"""

from dataclasses import dataclass

from dist_lab.errors import UserError
from dist_lab.inference.blocks import Pool
from dist_lab.inference.paged import Memory
from dist_lab.inference.queues import Policy, Queues
from dist_lab.inference.sequence import Request, Sequence
from dist_lab.inference.stage import Stage
from dist_lab.inference.step import FAILED, Part, step
from dist_lab.inference.text import Tokenizer


@dataclass(frozen=True)
class Event:
    """What a step has done for a request.

    Attributes:
        name: of the request.
        token: the generated token; None if the request asked for none, or has failed.
        text: the text that has become certain.
        reason: why it has ended: "length" or "stop", or "failed": its logits are not finite; "" if
            it has not.
    """

    name: str
    token: int | None
    text: str
    reason: str


@dataclass(frozen=True)
class Counts:
    """The state of an engine in numbers.

    Attributes:
        waiting, running: numbers of sequences.
        free, used: numbers of blocks.
        preemptions: so many times a sequence has lost its blocks before its end, since the start.
        cached: tokens of prompts that were found in the cache, since the start.
        tokens: of the last step.
        empty: places for a token in used blocks that have none, or that of an ended sequence.
    """

    waiting: int
    running: int
    free: int
    used: int
    preemptions: int
    cached: int
    tokens: int
    empty: int


class Engine:
    """Generates text for requests that come at any time.

    Args:
        blocks: the size of the cache: so many blocks of block_size tokens, on each rank for its
            own layers and heads.
        prefix_cache: do not compute beginnings of prompts that the cache has.

    Attributes:
        parts: what the last step has computed.
    """

    def __init__(
        self, stage: Stage, tokenizer: Tokenizer, policy: Policy, blocks: int,
        block_size: int = 16, prefix_cache: bool = True,
    ) -> None:  # fmt: skip
        self.stage, self.tokenizer, self.policy = stage, tokenizer, policy
        self.pool = Pool(blocks, block_size, prefix_cache)
        self.queues = Queues(self.pool)
        self.parts: list[Part] = []
        self._memory = Memory(stage, self.pool)
        self._live: dict[str, Sequence] = {}
        self._events: list[Event] = []  # of requests for no tokens

    def add(self, name: str, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            UserError: its prompt is empty or has an unknown token, its text may become longer than
                the cache, or a request of this name is there. The engine has not changed.
        """
        if name in self._live:
            raise UserError(f"a request {name!r} is there already; give another name")
        sequence = Sequence(request, self.tokenizer, name)
        if request.longest > self.capacity:
            raise UserError(
                f"a prompt of {len(request.prompt):,} tokens and {request.new_tokens:,} new ones "
                f"are {request.longest:,}, and the cache has room for {self.capacity:,} "
                f"({self.pool.total:,} blocks of {self.pool.size}); shorten the prompt, ask for "
                "fewer tokens, or give more blocks"
            )
        if sequence.reason:
            self._events.append(Event(name, None, "", sequence.reason))
            return
        self._live[name] = sequence
        self.queues.waiting.append(sequence)

    def cancel(self, name: str) -> None:
        """Forget a request, and free its blocks now. Nothing happens if it has ended."""
        sequence = self._live.pop(name, None)
        if sequence is None:
            return
        if sequence in self.queues.waiting:
            self.queues.waiting.remove(sequence)
            return
        self.queues.release(sequence)
        self.policy.ended(self.queues)

    @property
    def capacity(self) -> int:
        """The number of tokens that a text may grow to."""
        return self.pool.total * self.pool.size

    @property
    def busy(self) -> bool:
        """Whether there is something to do in a step."""
        return bool(self._live or self._events)

    def step(self) -> list[Event]:
        """Compute some tokens of some sequences. Collective, unless the engine is not busy.

        Returns:
            The events, the same on every rank.
        """
        events, self._events, self.parts = self._events, [], []
        if not self._live:
            return events
        self.parts = self.policy.schedule(self.queues)
        for sequence, token in step(self.stage, self.parts, self._memory.prepare(self.parts)):
            if sequence.reason:  # the policy lets it run on after its end, and nobody reads that
                sequence.tokens.append(max(token, 0))
                continue
            if token == FAILED:
                sequence.fail()
                events.append(Event(sequence.name, None, "", sequence.reason))
            else:
                text = sequence.add(token)
                events.append(Event(sequence.name, token, text, sequence.reason))
            if sequence.reason:
                del self._live[sequence.name]
        for sequence, _ in self.parts:
            self.pool.remember(sequence.table, sequence.tokens, sequence.seen)
        if any(event.reason for event in events):
            self.policy.ended(self.queues)
        return events

    @property
    def counts(self) -> Counts:
        queues, pool = self.queues, self.pool
        return Counts(
            waiting=len(queues.waiting),
            running=len([s for s in queues.running if not s.reason]),
            free=pool.free,
            used=pool.used,
            preemptions=queues.preemptions,
            cached=queues.cached,
            tokens=sum(count for _, count in self.parts),
            empty=queues.empty,
        )
