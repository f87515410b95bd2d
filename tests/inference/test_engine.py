"""The engine gives each request the tokens that it gets alone, whatever else runs beside it."""

import random
from math import prod

import generating
import numpy as np
import pytest
import serving
import torch
from generating import LAYERS, Letters, weights_in
from serving import BLOCKS, PREEMPTS, SIZE, Served, policy_of, second_turns, traffic

from dist_lab.checkpoint.exchange import ours
from dist_lab.checkpoint.exchange.tensors import InMemory
from dist_lab.errors import MachineError, UserError
from dist_lab.inference.engine import Engine
from dist_lab.inference.generate import generate
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.policies.vllm import VLLM
from dist_lab.inference.sampling import Sampling
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import load_stage
from dist_lab.mesh.mesh import init_mesh
from dist_lab.mesh.topology import coordinates
from dist_lab.programs.verify.matrix import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint of an untrained model."""
    state = models.build("gpt", LAYERS, torch.float64).state_dict()
    tensors = InMemory({f"model/{name}": tensor for name, tensor in state.items()})
    return str(ours.write(tensors, tmp_path_factory.mktemp("untrained")))


@pytest.fixture(scope="module")
def stage(folder):
    return load_stage(weights_in(folder), init_mesh(dp=1))


@pytest.fixture(scope="module")
def expected(folder):
    """Requests, second turns, and the tokens and logits of a whole forward for each token."""
    asked = traffic()
    tokens, logits = generating.oracle(folder, asked)
    later = second_turns(asked, tokens)
    more_tokens, more_logits = generating.oracle(folder, later)
    return asked, later, tokens + more_tokens, logits | more_logits


ALL = [
    (policy, axes, prefix_cache)
    for policy in POLICIES
    for axes in ({"dp": 1}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"pp": 2, "tp": 2})
    for prefix_cache in (True, False)
]


@pytest.mark.slow_unless(
    lambda policy, axes, prefix_cache: (
        (axes == {"dp": 1} and prefix_cache) or (policy == "vllm" and len(axes) == 2)
    )
)
@pytest.mark.parametrize(("policy", "axes", "prefix_cache"), ALL, ids=str)
def test_tokens_and_logits_are_those_of_one_process_without_a_cache(
    on_ranks, folder, expected, policy, axes, prefix_cache
):
    asked, later, tokens, logits = expected
    arguments = axes, folder, asked, later, policy, prefix_cache
    ranks = on_ranks(prod(axes.values()), serving.on_rank, *arguments)
    for rank, served in enumerate(ranks):
        assert [served.tokens[str(n)] for n in range(len(tokens))] == tokens
        assert set(served.reasons.values()) == {"length"}
        assert served.counts == ranks[0].counts  # all ranks have decided the same
        last = coordinates(rank, axes).get("pp", 0) == axes.get("pp", 1) - 1
        assert served.logits.keys() >= (logits.keys() if last else set())
        for at in logits.keys() & served.logits.keys():
            assert np.abs(np.array(served.logits[at]) - logits[at]).max() < 1e-10
        end = served.counts[-1]
        assert (end.waiting, end.running) == (0, 0)
        assert (end.preemptions > 0) == (policy in PREEMPTS), end.preemptions
        assert (end.cached > 0) == (prefix_cache or policy == "lmdeploy")


def test_the_engine_gives_the_tokens_and_texts_of_generate(stage):
    asked = traffic(seed=1)
    served = serving.serve(Engine(stage, Letters(), VLLM(12, 5), BLOCKS, SIZE), asked, Served())
    for number, done in enumerate(generate(stage, asked, Letters())):
        name = str(number)
        seen = served.tokens[name], served.texts[name], served.reasons[name]
        assert seen == (done.tokens, done.text, done.reason)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow_unless(lambda seed: seed == 0)
def test_requests_that_come_and_go_at_random_leave_no_block_behind(stage, seed, policy):
    """Some are cancelled. Their blocks are free at once, and the others get their tokens."""
    draw = random.Random(seed)
    engine = Engine(stage, Letters(), policy_of(policy), BLOCKS, SIZE)
    asked, served, cancelled = traffic(14, seed), Served(), set()
    coming = dict(enumerate(asked))
    while coming or engine.busy:
        for number in list(coming)[: draw.randint(0, 3)]:
            engine.add(str(number), coming.pop(number))
        if draw.random() < 0.2:
            name = str(draw.randrange(len(asked)))
            engine.cancel(name)
            held = [*engine.queues.running, *engine.queues.waiting]
            assert name not in [s.name for s in held if not s.reason]
            if name not in served.reasons and int(name) not in coming:
                cancelled.add(name)
        serving.check_engine(engine)
        for event in engine.step():
            assert event.name not in cancelled
            serving.note(served, event)
        serving.check_engine(engine)
    assert cancelled
    kept = getattr(engine.policy, "kept", [])
    assert engine.pool.used == len({block for s in kept for block in s.table.blocks})
    whole = generate(stage, asked, Letters())
    for name in served.reasons:
        assert served.tokens[name] == whole[int(name)].tokens
    assert served.reasons.keys() | cancelled == {str(n) for n in range(len(asked))}


def test_the_stage_sees_each_beginning_of_a_text_once(stage):
    """A second request with the prompt of the first computes one token of it."""
    engine = Engine(stage, Letters(), VLLM(), BLOCKS, SIZE)
    prompt = list(range(16))
    for name in ("first", "second"):
        engine.add(name, Request(prompt, 2))
        engine.step()
        engine.step()
    assert [count for _, count in engine.parts] == [1]
    assert engine.counts.cached == 15


def test_a_waste_is_less_than_a_block_for_each_sequence_with_blocks_on_demand(stage):
    served = serving.serve(Engine(stage, Letters(), VLLM(12, 5), BLOCKS, SIZE), traffic(), Served())
    assert max(c.empty for c in served.counts) > 0
    assert all(c.empty <= (SIZE - 1) * c.running for c in served.counts)


def with_a_sick_token(rank, axes, folder, policy):
    """A text with token 60, whose embedding is NaN, beside one without; each has 5 new tokens.

    Returns:
        The tokens and reasons of both, the tokens of the second alone, and what `generate` says.
    """
    mesh = init_mesh(**axes)
    stage = load_stage(weights_in(folder), mesh)
    well, sick = Request([1, 2, 3, 4], 5), Request([1, 2, 3, 60], 5)
    (alone,) = generate(stage, [well], Letters())
    if mesh["pp"].index == 0 and mesh["tp"].index == mesh["tp"].size - 1:  # it has this row
        stage.model.get_parameter("model.embed_tokens.weight")[-1] = torch.nan
    engine, served = Engine(stage, Letters(), policy_of(policy), BLOCKS, SIZE), Served()
    for name, request in {"sick": sick, "well": well, "later": sick}.items():
        engine.add(name, request)
    while engine.busy:
        for event in engine.step():
            serving.note(served, event)
        serving.check_engine(engine)
    with pytest.raises(MachineError) as error:
        generate(stage, [well, sick], Letters())
    return served.tokens, served.reasons, alone.tokens, str(error.value)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("axes", [{"dp": 1}, {"pp": 2}, {"pp": 2, "tp": 2}], ids=str)
@pytest.mark.slow_unless(lambda axes, policy: axes == {"dp": 1} or policy == "vllm")
def test_a_text_whose_logits_are_not_finite_fails_alone_and_on_every_rank(
    on_ranks, folder, axes, policy
):
    for seen in on_ranks(prod(axes.values()), with_a_sick_token, axes, folder, policy):
        tokens, reasons, alone, line = seen
        assert reasons == {"sick": "failed", "later": "failed", "well": "length"}
        assert tokens == {"sick": [], "later": [], "well": alone}
        assert line.startswith("logits at position 4 are not finite")


# --- ends and refusals ----------------------------------------------------------------------------


def test_a_stop_string_ends_one_text_and_frees_its_blocks(stage):
    (whole,) = generate(stage, [Request([1, 2], 20, Sampling(1.0))], Letters())
    stop = whole.text[7:10]
    engine, served = Engine(stage, Letters(), VLLM(), BLOCKS, SIZE), Served()
    engine.add("stops", Request([1, 2], 20, Sampling(1.0), stops=[stop]))
    engine.add("runs", Request([1, 2], 20, Sampling(1.0)))
    while engine.busy:
        for event in engine.step():
            serving.note(served, event)
            if event.name == "stops" and event.reason:
                assert [s.name for s in engine.queues.running] == ["runs"]
    assert served.reasons == {"stops": "stop", "runs": "length"}
    assert served.texts == {"stops": whole.text[: whole.text.index(stop)], "runs": whole.text}


def test_a_request_that_can_never_fit_is_refused_with_all_numbers(stage):
    engine = Engine(stage, Letters(), VLLM(), 4, 4)
    with pytest.raises(UserError, match=r"10 tokens and 7 new ones are 17, .* 16 \(4 blocks of 4"):
        engine.add("long", Request([1] * 10, 7))
    engine.add("fits", Request([1] * 10, 6))
    with pytest.raises(UserError, match="'fits' is there already"):
        engine.add("fits", Request([1], 1))
    with pytest.raises(UserError, match="prompt is empty"):
        engine.add("empty", Request([], 1))
    with pytest.raises(UserError, match="token 61, and the vocabulary has 61"):
        engine.add("unknown", Request([61], 1))
    with pytest.raises(UserError, match="token so large a number, and"):
        engine.add("unknown", Request([10**4000], 1))
    assert engine.counts.waiting == 1
    engine.cancel("unknown")
    engine.cancel("fits")
    assert not engine.busy
    assert engine.step() == []
