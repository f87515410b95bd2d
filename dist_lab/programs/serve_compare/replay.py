"""Runs an engine over a trace, and notes when each token came and what each step was."""

from collections import abc
from dataclasses import dataclass, field

from dist_lab.inference.clock import Clock
from dist_lab.inference.engine import Counts, Engine, Event
from dist_lab.inference.sampling import not_finite
from dist_lab.inference.sequence import Request
from dist_lab.inference.trace import Arrival


@dataclass
class Served:
    """What happened to a request.

    Attributes:
        came: the time at which it came, in seconds.
        times: of each token.
    """

    came: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A step: the time at its end, its sequences, and the engine's numbers after it."""

    time: float
    sequences: int
    counts: Counts


@dataclass
class Replay:
    """A trace that has been served."""

    requests: dict[str, Served] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


def replay(engine: Engine, trace: abc.Sequence[Arrival], tick: float, clock: Clock) -> Replay:
    """Serve a trace. Collective.

    Args:
        tick: seconds of a tick of the trace.
    """
    seen = Replay()
    coming = [(tick * a.at, a) for a in trace if not a.after]
    following = {a.after: a for a in trace if a.after}
    while coming or engine.busy:
        coming.sort(key=lambda pair: pair[0])
        if not engine.busy:
            clock.wait(coming[0][0])
        while coming and coming[0][0] <= clock.now:
            at, arrival = coming.pop(0)
            before = seen.requests[arrival.after].tokens if arrival.after else []
            engine.add(arrival.name, Request([*before, *arrival.tokens], arrival.new_tokens))
            seen.requests[arrival.name] = Served(at, [*before, *arrival.tokens])
        events = engine.step()
        clock.step(engine.counts.tokens)
        seen.steps.append(Step(clock.now, len(engine.parts), engine.counts))
        for event in events:
            note(seen.requests[event.name], event, clock.now)
            if event.reason and event.name in following:
                turn = following[event.name]
                coming.append((clock.now + tick * turn.at, turn))
    return seen


def note(served: Served, event: Event, now: float) -> None:
    if event.token is None:  # no request here asks for no token
        raise not_finite(len(served.tokens))
    served.tokens.append(event.token)
    served.times.append(now)
