"""Each policy does what its server is known for. The engine here only schedules."""

import random

import pytest
import serving
from serving import PREEMPTS, Served, dry_engine, policy_of, traffic

from dist_lab.inference.policies.lmdeploy import LMDeploy
from dist_lab.inference.policies.orca import Orca
from dist_lab.inference.policies.splitfuse import SplitFuse
from dist_lab.inference.policies.static import Static
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.policies.tgi import TGI
from dist_lab.inference.policies.vllm import VLLM
from dist_lab.inference.sequence import Request


def steps(engine, most=1000):
    """The steps until the engine has nothing to do: name -> tokens computed, for each step."""
    seen = []
    while engine.busy:
        assert len(seen) < most, "no end"
        engine.step()
        serving.check_engine(engine)
        seen.append({sequence.name: count for sequence, count in engine.parts})
    return seen


def add(engine, **lengths):
    """Add requests for texts: name=(tokens of the prompt, new tokens)."""
    for name, (prompt, new) in lengths.items():
        first = sum(name.encode()) % 50  # so that no two prompts begin alike
        engine.add(name, Request([first] * prompt, new))


@pytest.mark.slow_unless(lambda prefix_cache: prefix_cache)
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_random_traffic_ends_with_all_texts_and_no_lost_block(policy, prefix_cache):
    preemptions = 0
    for seed in range(40):
        draw = random.Random(seed)
        asked = traffic(draw.randint(1, 12), seed)
        engine = dry_engine(policy_of(policy), draw.randint(9, 16), 4, prefix_cache)
        served = serving.serve(engine, asked, Served())
        for number, request in enumerate(asked):
            text = list(request.prompt)
            for _ in range(request.new_tokens):
                text.append((7 * text[-1] + len(text) - 1) % 61)
            assert request.sampling.temperature or (
                served.tokens[str(number)] == text[len(request.prompt) :]
            )
            assert len(served.tokens[str(number)]) == request.new_tokens
        preemptions += engine.counts.preemptions
        kept = {block for s in getattr(engine.policy, "kept", []) for block in s.table.blocks}
        assert engine.counts.used == len(kept)
    assert (preemptions > 0) == (policy in PREEMPTS)


def test_static_runs_a_batch_until_its_last_text_is_done():
    engine = dry_engine(Static(2))
    add(engine, a=(3, 2), b=(2, 5), c=(4, 1))
    assert steps(engine) == [{"a": 3, "b": 2}, *[{"a": 1, "b": 1}] * 4, {"c": 4}]


def test_static_reserves_the_longest_prompt_and_the_longest_text_for_each():
    engine = dry_engine(Static(3), blocks=10, size=4)
    add(engine, a=(9, 2), b=(2, 11), c=(4, 1))
    engine.step()
    assert {s.name: len(s.table.blocks) for s in engine.queues.running} == {"a": 5, "b": 5}
    assert engine.counts.empty == 40 - 9 - 2


def test_static_takes_fewer_rows_where_the_rectangle_would_not_fit():
    """Each of a and b fits. Of both, the longest prompt and the longest text do not."""
    engine = dry_engine(Static(3), blocks=10, size=4)
    add(engine, a=(30, 1), b=(1, 30), c=(2, 3))
    assert [list(step) for step in steps(engine)][:2] == [["a"], ["b"]]


def test_static_ends_a_batch_when_its_last_text_is_cancelled():
    engine = dry_engine(Static(2))
    add(engine, a=(3, 1), b=(2, 5))
    engine.step()
    engine.cancel("b")
    assert engine.counts.used == 0
    assert not engine.busy


def test_orca_gives_a_place_to_the_next_request_in_the_step_after_an_end():
    engine = dry_engine(Orca(2))
    add(engine, a=(3, 2), b=(2, 4), c=(4, 2))
    assert steps(engine) == [{"a": 3, "b": 2}, {"a": 1, "b": 1}, {"b": 1, "c": 4}, {"b": 1, "c": 1}]


def test_orca_reserves_the_longest_text_and_lets_others_wait_for_it():
    engine = dry_engine(Orca(9), blocks=10, size=4)
    add(engine, a=(4, 20), b=(1, 9), c=(3, 6))
    engine.step()
    assert [s.name for s in engine.queues.running] == ["a", "b"]
    assert (engine.counts.free, engine.counts.empty) == (1, 9 * 4 - 5)


def test_tgi_computes_prompts_apart_from_single_tokens():
    engine = dry_engine(TGI(8, waiting_served_ratio=0.0, max_waiting_tokens=20, sequences=9), 30)
    add(engine, a=(5, 4), b=(3, 2), c=(6, 2))
    assert steps(engine) == [
        {"a": 5, "b": 3}, {"a": 1, "b": 1}, {"c": 6}, {"a": 1, "c": 1}, {"a": 1},
    ]  # fmt: skip


def test_tgi_lets_requests_wait_until_they_are_many_or_have_waited_for_long():
    def step_of(name, ratio, most):
        policy = TGI(20, waiting_served_ratio=ratio, max_waiting_tokens=most, sequences=9)
        engine = dry_engine(policy, 50)
        add(engine, a=(1, 30), b=(1, 30), c=(1, 30), d=(1, 30))
        engine.step()
        add(engine, e=(1, 2))
        return next(i for i, step in enumerate(steps(engine)) if name in step)

    assert step_of("e", 0.25, 20) == 1  # one is a fourth of four
    assert step_of("e", 0.5, 20) == 20
    assert step_of("e", 0.5, 7) == 7


def test_vllm_cuts_prompts_to_what_the_budget_leaves():
    engine = dry_engine(VLLM(6, 9))
    add(engine, a=(2, 4), b=(9, 1))
    assert steps(engine) == [{"a": 2, "b": 4}, {"a": 1, "b": 5}, {"a": 1}, {"a": 1}]


def test_vllm_preempts_the_newest_and_computes_it_again():
    engine = dry_engine(VLLM(30, 9), blocks=4, size=4)
    add(engine, a=(7, 3), b=(7, 3))
    seen = steps(engine)
    assert seen == [{"a": 7, "b": 7}, {"a": 1, "b": 1}, {"a": 1}, {"b": 9}]
    assert engine.counts.preemptions == 1


def test_splitfuse_has_exactly_one_number_of_tokens_in_a_step_while_there_is_work():
    engine = dry_engine(SplitFuse(8, 9), 30)
    add(engine, a=(3, 4), b=(14, 2), c=(3, 3), d=(9, 1))
    seen = steps(engine)
    assert seen[:2] == [{"a": 3, "b": 5}, {"a": 1, "b": 7}]
    assert [sum(step.values()) for step in seen[:4]] == [8, 8, 8, 8]
    assert all("a" in step for step in seen[:4])  # a long prompt does not hold it up


def test_splitfuse_goes_on_with_a_prompt_only_if_all_of_it_fits():
    """In step 2 seven tokens of b would fit, and b would take the blocks that a needs."""
    engine = dry_engine(SplitFuse(8, 9), blocks=5, size=4)
    add(engine, a=(4, 3), b=(16, 1))
    assert steps(engine) == [{"a": 4, "b": 4}, {"a": 1}, {"a": 1}, {"b": 8}, {"b": 4}]


def test_splitfuse_lets_nobody_overtake_a_prompt_that_waits_for_blocks():
    engine = dry_engine(SplitFuse(8, 9), blocks=5, size=4)
    add(engine, a=(4, 3), b=(16, 1))
    engine.step()
    add(engine, c=(1, 1))
    assert steps(engine) == [{"a": 1}, {"a": 1}, {"b": 8}, {"b": 4, "c": 1}]


def test_splitfuse_resets_all_when_nobody_can_go_on():
    engine = dry_engine(SplitFuse(30, 9), blocks=4, size=4)
    add(engine, a=(8, 4), b=(8, 4))
    seen = steps(engine)
    assert seen[:2] == [{"a": 8, "b": 8}, {"a": 9}]
    assert engine.counts.preemptions == 2
    assert sum(len(step) for step in seen) > 6


def test_lmdeploy_computes_only_the_new_message_of_a_session_that_it_has():
    engine = dry_engine(LMDeploy(4))
    engine.add("turn 1", Request([1, 2, 3, 4, 5], 3))
    text, tokens = [1, 2, 3, 4, 5], []
    while engine.busy:
        tokens += [event.token for event in engine.step()]
    engine.add("turn 2", Request([*text, *tokens, 6, 7], 1))
    engine.step()
    assert [(s.name, count) for s, count in engine.parts] == [("turn 2", 3)]  # and the last token
    assert engine.counts.cached == 7


def test_lmdeploy_computes_one_token_of_a_prompt_that_it_has_to_its_end():
    engine = dry_engine(LMDeploy(4))
    engine.add("first", Request([1, 2, 3, 4, 5], 3))
    tokens = [1, 2, 3, 4, 5, *[engine.step()[0].token for _ in range(2)]]
    engine.step()
    engine.add("again", Request(tokens, 1))
    (event,) = engine.step()
    assert [count for _, count in engine.parts] == [1]
    assert event.token == engine.policy.kept[0].tokens[7]


def test_lmdeploy_evicts_the_session_of_the_longest_time_ago_as_a_whole():
    engine = dry_engine(LMDeploy(4), blocks=6, size=4)
    add(engine, a=(7, 1), b=(7, 1))
    steps(engine)
    add(engine, c=(12, 1))
    engine.step()
    assert [s.name for s in engine.policy.kept] == ["b", "c"]
    add(engine, a=(7, 2))
    assert steps(engine)[0] == {"a": 7}  # a miss: it is computed again


def test_lmdeploy_keeps_a_session_whose_next_request_has_to_wait_for_memory():
    engine = dry_engine(LMDeploy(4), blocks=6, size=4)
    add(engine, a=(7, 1))
    steps(engine)
    add(engine, b=(14, 2))
    engine.step()
    (session,) = engine.policy.kept
    engine.add("again", Request([*session.tokens, *[1] * 9], 1))
    engine.step()
    assert [s.name for s in engine.policy.kept if s.name == "a"] == ["a"]
    serving.check_engine(engine)
    assert {"again": 10} in steps(engine)
