"""A trace: requests and the times at which they come, the same for each policy. No torch.

The built-in trace has three kinds of users. Texts differ in length by a factor of 50, as they do in
logs of real services, and that is what policies differ in:

    chat        three turns of a conversation. All conversations have one beginning (a system
                prompt), and each turn has all of the conversation so far, and a message
    document    a long prompt, and a short answer
    story       a short prompt, and a long answer

Times are in ticks, of which one is the time of a step of one token. So a trace is the same load for
a fast machine and for a slow one. Requests come at random, independent of each other: the times
between them are exponential.
"""

import random
from dataclasses import dataclass

SYSTEM = 48  # tokens of the beginning that all conversations share
TURNS = 3
PAUSE = (5, 20)  # ticks between an answer and the next message: a program asks, or a fast typist


@dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Attributes:
        at: ticks from the start; for a later turn, from the end of the turn before.
        tokens: of the prompt; of a later turn only those of its message.
        after: the name of the turn before, whose whole text the prompt begins with; "" if none.
        length: of the whole prompt.
    """

    name: str
    at: float
    tokens: tuple[int, ...]
    new_tokens: int
    after: str
    length: int

    @property
    def longest(self) -> int:
        """The number of tokens that the text may grow to."""
        return self.length + self.new_tokens


def built_in(requests: int, gap: float, vocab: int, seed: int = 0) -> list[Arrival]:
    """Draw a trace.

    Args:
        requests: their number; the last conversation may have fewer turns.
        gap: mean ticks between two arrivals, a conversation being one.
        vocab: the number of tokens. Lengths and times do not depend on it.
    """
    draw, letters = random.Random(seed), random.Random(f"letters {seed}")

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(letters.randrange(vocab) for _ in range(draw.randint(low, high)))

    trace: list[Arrival] = []
    system, at = text(SYSTEM, SYSTEM), 0.0
    while len(trace) < requests:
        number = len(trace)
        kind = draw.choice(["chat", "document", "story"])
        if kind == "chat":
            messages = [text(8, 24) for _ in range(TURNS)]
            messages[0] = (*system, *messages[0])
            trace += conversation(draw, f"chat {number}", at, messages)
        else:
            document = kind == "document"
            prompt = text(160, 320) if document else text(8, 24)
            new = draw.randint(4, 16) if document else draw.randint(64, 192)
            trace.append(Arrival(f"{kind} {number}", at, prompt, new, "", len(prompt)))
        at += draw.expovariate(1 / gap) if gap else 0.0
    return trace[:requests]


def conversation(
    draw: random.Random, name: str, at: float, messages: list[tuple[int, ...]]
) -> list[Arrival]:
    """The turns of a conversation. Between an answer and the next message there is a pause."""
    turns: list[Arrival] = []
    length, before = 0, ""
    for number, message in enumerate(messages, start=1):
        length += len(message)
        new = draw.randint(8, 48)
        turns.append(Arrival(f"{name}, turn {number}", at, message, new, before, length))
        length, before, at = turns[-1].longest, turns[-1].name, draw.uniform(*PAUSE)
    return turns
