"""The built-in trace is the same on every machine, and the virtual clock knows no noise."""

import pytest
from serving import dry_engine

from dist_lab.inference.clock import Cost, Virtual
from dist_lab.inference.policies.orca import Orca
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.policies.vllm import VLLM
from dist_lab.inference.trace import SYSTEM, Arrival, built_in
from dist_lab.programs.serve_compare.replay import replay
from dist_lab.programs.serve_compare.results import percentile, result

COST = Cost(0.01, 0.001)


def test_lengths_and_times_depend_on_the_seed_alone():
    def lengths(vocab, seed=3):
        return [(a.name, a.at, a.length, a.new_tokens) for a in built_in(30, 5.0, vocab, seed)]

    assert lengths(256) == lengths(61)
    assert lengths(61) != lengths(61, seed=4)
    assert all(0 <= token < 61 for a in built_in(30, 5.0, 61) for token in a.tokens)


def test_a_turn_comes_after_the_one_before_and_has_all_of_its_text():
    trace = built_in(60, 5.0, 256)
    by_name = {a.name: a for a in trace}
    turns = [a for a in trace if a.after]
    assert turns
    for turn in turns:
        assert turn.length == by_name[turn.after].longest + len(turn.tokens)
    first = [a for a in trace if a.name.endswith("turn 1")]
    assert len({a.tokens[:SYSTEM] for a in first}) == 1
    assert len({a.tokens for a in first}) == len(first)


def test_with_a_gap_of_zero_all_come_at_once():
    assert {a.at for a in built_in(40, 0, 256) if not a.after} == {0.0}


def test_times_are_those_of_the_steps_on_the_virtual_clock():
    """a: 4 tokens at time 0. b: 6 tokens at time 0.020, which is within the second step."""
    trace = [Arrival("a", 0, (1,) * 4, 3, "", 4), Arrival("b", 2, (2,) * 6, 2, "", 6)]
    seen = replay(dry_engine(Orca(4)), trace, 0.010, Virtual(COST))
    ends = [0.014, 0.025, 0.025 + 0.017, 0.025 + 0.017 + 0.011]
    assert [step.time for step in seen.steps] == pytest.approx(ends)
    assert seen.requests["a"].times == pytest.approx(ends[:3])
    assert seen.requests["b"].came == pytest.approx(0.020)
    assert seen.requests["b"].times == pytest.approx(ends[2:])


def test_nothing_happens_while_nobody_has_come():
    trace = [Arrival("a", 0, (1,), 1, "", 1), Arrival("b", 50, (2,), 1, "", 1)]
    seen = replay(dry_engine(Orca(4)), trace, 0.010, Virtual(COST))
    assert [step.time for step in seen.steps] == pytest.approx([0.011, 0.511])


def test_a_later_turn_comes_after_the_end_of_the_one_before_with_what_was_generated():
    trace = [Arrival("one", 0, (1, 2), 2, "", 2), Arrival("two", 3, (5,), 1, "one", 5)]
    seen = replay(dry_engine(Orca(4)), trace, 0.010, Virtual(COST))
    one, two = seen.requests["one"], seen.requests["two"]
    assert two.came == pytest.approx(one.times[-1] + 0.030)
    assert two.tokens[:5] == [*one.tokens, 5]


def test_a_result_has_the_numbers_of_its_replay():
    trace = [Arrival("a", 0, (1,) * 4, 3, "", 4), Arrival("b", 2, (2,) * 6, 2, "", 6)]
    seen = replay(dry_engine(Orca(4), size=4), trace, 0.010, Virtual(COST))
    r = result("orca", "virtual", seen, 4, seen)
    assert (r.steps, r.computed, r.generated, r.largest_step, r.same) == (4, 13, 5, 7, 2)
    assert r.rate == pytest.approx(5 / 0.053)
    assert r.first == pytest.approx(0.018)  # between 14 and 22 ms
    assert r.gap_p99 == pytest.approx(0.017)
    assert percentile([5.0], 0.99) == 5.0


def test_on_the_built_in_trace_each_policy_shows_what_its_server_is_known_for():
    """As `launch/serve_compare.py --cost 10,0.25` does."""
    trace, cost, results = built_in(48, 6.0, 61), Cost(0.01, 0.00025), {}
    for name, row in POLICIES.items():
        engine = dry_engine(row.build(16, 64), 80, 16, row.prefix_cache)
        results[name] = result(name, "", replay(engine, trace, cost(1), Virtual(cost)), 16, None)
    static, vllm, splitfuse = results["static"], results["vllm"], results["splitfuse"]
    assert all(r.generated == static.generated for r in results.values())
    assert all(r.rate > 2 * static.rate for r in results.values() if r is not static)
    assert results["orca"].preemptions == results["tgi"].preemptions == 0
    assert min(results[name].empty_each for name in ("orca", "tgi")) > 16
    assert max(results[name].empty_each for name in ("vllm", "splitfuse", "lmdeploy")) < 16
    assert vllm.preemptions > 0
    assert vllm.cached > 0
    assert vllm.largest_step == splitfuse.largest_step == 64
    assert results["lmdeploy"].cached > 0
    assert results["tgi"].token < results["orca"].token


def test_a_replay_on_the_virtual_clock_can_be_repeated():
    def once():
        return replay(dry_engine(VLLM(), 80, 16), built_in(20, 6.0, 61), 0.01, Virtual(COST))

    assert once() == once()
