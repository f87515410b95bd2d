"""Requests that come while others run, served by an engine on several ranks."""

import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generating import Letters, weights_in

from dist_lab.inference import step as stepping
from dist_lab.inference.engine import Counts, Engine
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.sampling import Sampling, choose
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import load_stage
from dist_lab.mesh.mesh import init_mesh

SIZE, BLOCKS = 4, 10  # of the cache: it is too small for all requests, so that some are preempted

PREEMPTS = {"vllm", "splitfuse", "lmdeploy"}


def policy_of(name):
    return POLICIES[name].build(5, 12)


@dataclass
class Served:
    """What a rank has seen: events, logits of each choice, and the counts after each step."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    logits: dict[tuple[int, int], Any] = field(default_factory=dict)  # seed and position -> (V,)
    counts: list[Counts] = field(default_factory=list)


def traffic(number=9, seed=4) -> list[Request]:
    """Requests of which some begin alike, some ask for a random text, and one for no token."""
    draw = random.Random(seed)
    common = [draw.randrange(61) for _ in range(12)]
    requests = []
    for n in range(number):
        prompt = common[: draw.choice([0, 5, 8, 12])]
        prompt = prompt + [draw.randrange(61) for _ in range(draw.randint(0 if prompt else 1, 9))]
        sampling = Sampling(draw.choice([0.0, 1.0]), seed=n)
        requests.append(Request(prompt, draw.randint(3, 12), sampling))
    return [*requests, Request([1], 0, Sampling(seed=number))]


def second_turns(asked: list[Request], tokens: list[list[int]]) -> list[Request]:
    """Requests that go on with texts that were generated, the last first: three tokens more."""
    pairs = list(zip(asked, tokens, strict=True))[:-4:-1]
    texts = [[*request.prompt, *new] for request, new in pairs]
    return [Request([*text, 1, 2, 3], 3, Sampling(seed=90 + n)) for n, text in enumerate(texts)]


def on_rank(
    rank: int, axes: dict[str, int], folder: str, asked: list[Request], later: list[Request],
    policy: str, prefix_cache: bool,
) -> Served:  # fmt: skip
    """Load this rank's part of the model, and serve some requests, then others."""
    stage = load_stage(weights_in(folder), init_mesh(**axes))
    engine = Engine(stage, Letters(), policy_of(policy), BLOCKS, SIZE, prefix_cache)
    served = Served()

    def choose_and_note(row, sampling, position):
        served.logits[sampling.seed, position] = row.tolist()
        return choose(row, sampling, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "choose", choose_and_note)
        serve(engine, asked, served)
        serve(engine, later, served)
    return served


def serve(engine: Engine, asked: list[Request], served: Served) -> Served:
    """Run the engine until all requests are done, and check its blocks after each step.

    Two requests come at each step. Their names are numbers.
    """
    coming = [(str(n), request) for n, request in enumerate(asked, len(served.tokens))]
    while coming or engine.busy:
        for name, request in coming[:2]:
            engine.add(name, request)
        del coming[:2]
        for event in engine.step():
            note(served, event)
        check_engine(engine)
        served.counts.append(engine.counts)
    return served


def note(served, event):
    assert event.name not in served.reasons, "an event after the end"
    tokens = served.tokens.setdefault(event.name, [])
    if event.token is not None:
        tokens.append(event.token)
    served.texts[event.name] = served.texts.get(event.name, "") + event.text
    if event.reason:
        served.reasons[event.name] = event.reason


def check_engine(engine):
    kept = getattr(engine.policy, "kept", [])
    check_pool(engine.pool, [s.table for s in [*engine.queues.running, *kept]])
    assert all(not s.table.blocks and not s.seen for s in engine.queues.waiting)


def check_pool(pool, tables):
    """The invariants of a pool, given all tables that have blocks of it."""
    counts = [0] * pool.total
    for table in tables:
        assert len(set(table.blocks)) == len(table.blocks)
        for block in table.blocks:
            counts[block] += 1
    assert pool.counts == counts
    assert pool.free + sum(count > 0 for count in pool.counts) == pool.total
    assert sorted([*pool._blank, *pool._idle]) == [b for b in range(pool.total) if not counts[b]]
    assert pool._block_of == {key: block for block, key in pool._key_of.items()}
    assert set(pool._idle) <= set(pool._key_of)
    assert not set(pool._blank) & set(pool._key_of)


class NoModel:
    """A stage without layers: the next token is a function of the last one and its position."""

    layers: tuple[()] = ()
    mesh = SimpleNamespace(
        device="cpu", comm=SimpleNamespace(label=lambda *names, **unit: nullcontext())
    )

    def forward(self, tokens, positions, cache, wanted):
        tokens, positions = tokens[wanted], positions[wanted]
        return torch.eye(61)[(7 * tokens + positions) % 61]

    def agree(self, tokens, count):
        return tokens


def dry_engine(policy, blocks=BLOCKS, size=SIZE, prefix_cache=False) -> Engine:
    """An engine that only schedules."""
    return Engine(NoModel(), Letters(), policy, blocks, size, prefix_cache)
