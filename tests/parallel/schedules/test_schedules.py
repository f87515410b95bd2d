"""Pipeline schedules: the table in library.py, the errors of `check`, messages, and files."""

# ruff: noqa: E501  grids, and messages whose first line is long

import re
import time
from collections import deque
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch.distributed.pipelining.schedules as torchs

from dist_lab.errors import UserError
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Op, Schedule, compute_action
from dist_lab.parallel.schedules.check import check
from dist_lab.parallel.schedules.files import load
from dist_lab.parallel.schedules.library import SCHEDULES, forward_only, make, placement
from dist_lab.parallel.schedules.passes import (
    add_communication,
    add_unshard,
    mark_gradients_complete,
)
from dist_lab.parallel.schedules.simulate import bubble, length, peak_activations, render, timeline

PS = range(1, 9)
MS = (*range(1, 11), 12, 16, 17, 32)  # near p and 2p for most p, few and many
CASES = [
    (name, p, m, v)
    for name, p, m in product(SCHEDULES, PS, MS)
    if name != "interleaved" or m % p == 0
    for v in ((2, 3) if name == "interleaved" else (None,))
]
SOME = [  # for slow tests
    case for case in CASES if case[1] in (1, 2, 3, 4, 8) and case[2] in (1, 2, 3, 4, 5, 7, 8, 9, 16)
]
cached_make = cache(make)
with_messages = cache(lambda *case: add_communication(cached_make(*case)))


def cases_of(name):
    return [case for case in CASES if case[0] == name]


def rows(*texts, name="mine"):
    """A schedule from its grid."""
    actions = [tuple(map(Action.parse, text.split())) for text in texts]
    assert all(None not in row for row in actions)
    return Schedule(name, tuple(actions))


def dedented(text):
    return "\n".join(line.strip() for line in text.strip().splitlines())


# --- the table ------------------------------------------------------------------------------------


def test_the_grid_of_gpipe():
    assert render(cached_make("gpipe", 3, 4)) == dedented("""
        rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0 -  B1 -  B2 -  B3 -
        rank 1  .  F0 F1 F2 F3 .  .  .  B0 -  B1 -  B2 -  B3 -  .  .
        rank 2  .  .  F0 F1 F2 F3 B0 -  B1 -  B2 -  B3 -  .  .  .  .
    """)


def test_the_grid_of_interleaved():
    assert render(cached_make("interleaved", 2, 4)) == dedented("""
        rank 0  0F0 0F1 2F0 2F1 0F2 .   2B0 -   0F3 2B1 -   2F2 0B0 -   2F3 0B1 -   .   2B2 -   .   2B3 -   0B2 -   0B3 -
        rank 1  .   1F0 1F1 3F0 3B0 -   3F1 3B1 -   1F2 1B0 -   1F3 1B1 -   3F2 3B2 -   3F3 3B3 -   1B2 -   1B3 -   .   .
    """)


def test_the_grid_of_zbv():
    assert render(cached_make("zbv", 2, 2)) == dedented("""
        rank 0  0F0 0F1 .   3F0 3I0 3F1 3I1 0I0 0W0 3W0 0I1 0W1 3W1
        rank 1  .   1F0 2F0 1F1 2F1 2I0 1I0 1W0 2I1 1I1 1W1 2W0 2W1
    """)


@pytest.mark.slow
def test_the_idle_share_is_that_of_the_table():
    for name, p, m, v in CASES:
        units = {"gpipe": m, "1f1b": m, "interleaved": m * (v or 1), "zb": 3 * m, "zbv": 6 * m}
        if m >= p or not name.startswith("zb"):
            share = (p - 1) / (units[name] + p - 1)
            # Integers, divided once: only the last digits may differ.
            assert bubble(cached_make(name, p, m, v)) == pytest.approx(share, abs=1e-12), (
                name,
                p,
                m,
                v,
            )


def test_with_fewer_microbatches_than_ranks_zero_bubble_takes_longer_than_the_table():
    for name, p, m, _ in cases_of("zb") + cases_of("zbv"):
        if m < p:
            work = (3 if name == "zb" else 6) * m
            assert length(cached_make(name, p, m)) > work + p - 1


def test_zb_idles_for_f_plus_i_minus_w_for_each_rank_but_one():
    for _, p, m, _ in cases_of("zb"):
        if m >= p:
            assert length(cached_make("zb", p, m)) - 3 * m == (p - 1) * (1 + 1 - 1)


@pytest.mark.parametrize(("p", "m"), [(9, 10), (12, 40), (16, 17)])
def test_zbv_is_optimal_for_some_larger_numbers_of_ranks_too(p, m):
    assert length(make("zbv", p, m)) == 6 * m + p - 1


def test_zbv_of_4_ranks_and_8_microbatches_idles_for_a_seventeenth():
    assert bubble(cached_make("zbv", 4, 8)) <= 0.06


@pytest.mark.slow
def test_the_microbatches_in_flight_are_those_of_the_table():
    for name, p, m, v in CASES:
        chunks = v or SCHEDULES[name].chunks
        peaks = peak_activations(cached_make(name, p, m, v))
        for r in range(p):
            in_table = {
                "gpipe": m, "1f1b": p - r, "zb": p, "zbv": 2 * p,
                "interleaved": (chunks - 1) * p + 2 * (p - r) - 1,
            }  # fmt: skip
            expected = min(in_table[name], chunks * m)
            exact = name in ("gpipe", "1f1b", "interleaved")
            assert peaks[r] == expected if exact else peaks[r] <= expected, (name, p, m, v, r)
        if name.startswith("zb") and m >= p:
            assert max(peaks) == chunks * p  # the number in the table is reached


def test_the_stages_of_a_rank_are_those_of_the_table():
    for name, p, m, v in CASES:
        chunks = v or SCHEDULES[name].chunks
        for r in range(p):
            expected = [r, 2 * p - 1 - r] if name == "zbv" else [c * p + r for c in range(chunks)]
            assert cached_make(name, p, m, v).stages_of(r) == expected
    assert placement("zbv", 2) == {0: 0, 1: 1, 2: 1, 3: 0}


# --- every schedule -------------------------------------------------------------------------------


def test_every_schedule_passes_check_with_messages_and_so_does_its_evaluation():
    for case in SOME:
        check(with_messages(*case))  # `make` has checked it without messages
        forwards = forward_only(cached_make(*case).rank_of, case[2])
        check(forwards)
        check(add_communication(forwards))
        assert {a.op for row in forwards.ranks for a in row} == {Op.F}
        assert peak_activations(forwards) == [0] * len(forwards.ranks)


def test_evaluation_takes_groups_of_one_microbatch_per_rank_through_all_stages():
    # All micro-batches through one stage after the other would keep all outputs between stages.
    forwards = forward_only({0: 0, 1: 1, 2: 0, 3: 1}, 5)
    assert [[(a.stage, a.microbatch) for a in row] for row in forwards.ranks] == [
        [(s, m) for group in ([0, 1], [2, 3], [4]) for s in stages for m in group]
        for stages in ((0, 2), (1, 3))
    ]


def test_the_last_backward_of_each_stage_is_marked_as_completing_its_gradients():
    for case in SOME:
        marked = mark_gradients_complete(with_messages(*case))
        last = [a for row in marked.ranks for a in row if a.last]
        assert sorted(a.stage for a in last) == list(range(marked.stages))
        for row in marked.ranks:
            for i, a in enumerate(row):
                after = {b.op for b in row[i + 1 :] if b.stage == a.stage}
                assert a.last == (a.op in (Op.B, Op.W) and not after & {Op.B, Op.W})
        assert [[str(a) for a in row] for row in marked.ranks] == [
            [str(a) for a in row] for row in with_messages(*case).ranks
        ]


def test_receives_come_before_their_use_and_sends_right_after_their_compute():
    for case in SOME:
        plain, schedule = cached_make(*case), with_messages(*case)
        assert [tuple(a for a in row if a.op in COMPUTE) for row in schedule.ranks] == list(
            plain.ranks
        )
        for row in schedule.ranks:
            users = {Op.RECV_F: (Op.F,), Op.RECV_B: (Op.B, Op.I)}
            producers = {Op.SEND_F: (Op.F,), Op.SEND_B: (Op.B, Op.I)}
            at = {(a.op, a.stage, a.microbatch): i for i, a in enumerate(row)}
            for i, a in enumerate(row):
                if a.op in users:
                    [use] = [at[k] for op in users[a.op] if (k := (op, *key(a))) in at]
                    assert i < use
                elif a.op in producers:
                    previous = row[i - 1]
                    assert previous.op in producers[a.op]
                    assert key(previous) == key(a)


def key(action):
    return action.stage, action.microbatch


def channels(schedule):
    """(from, to) -> the messages in the order of sends, and of receives; named by the receives."""
    sent, received = {}, {}
    for rank, row in enumerate(schedule.ranks):
        for a in row:
            if a.op in (Op.SEND_F, Op.SEND_B):
                step, op = (1, Op.RECV_F) if a.op is Op.SEND_F else (-1, Op.RECV_B)
                receive = Action(a.stage + step, op, a.microbatch)
                sent.setdefault((rank, schedule.rank_of[receive.stage]), []).append(receive)
            elif a.op in (Op.RECV_F, Op.RECV_B):
                source = schedule.rank_of[a.stage + (1 if a.op is Op.RECV_B else -1)]
                received.setdefault((source, rank), []).append(a)
    return sent, received


def test_messages_between_two_ranks_are_received_in_the_order_in_which_they_are_sent():
    for case in SOME:
        sent, received = channels(with_messages(*case))
        assert sent == received


def test_no_schedule_deadlocks_if_every_send_waits_for_its_receive():
    for case in SOME:
        schedule = with_messages(*case)
        posted, done, queues = set(), set(), [deque(row) for row in schedule.ranks]
        progress = True
        while progress:
            progress = False
            for queue in queues:
                while queue:
                    a = queue[0]
                    step = 1 if a.op in (Op.SEND_F, Op.B, Op.I) else -1
                    if a.op in (Op.SEND_F, Op.SEND_B):
                        op = Op.RECV_F if a.op is Op.SEND_F else Op.RECV_B
                        step = 1 if a.op is Op.SEND_F else -1
                        if (op, a.stage + step, a.microbatch) not in posted:
                            break
                    elif a.op in (Op.F, Op.B, Op.I):
                        op = Op.F if a.op is Op.F else Op.I
                        other = a.stage + step
                        if 0 <= other < schedule.stages and (op, other, a.microbatch) not in done:
                            break
                        done.add((op, *key(a)))
                    else:
                        posted.add((a.op, *key(a)))
                    queue.popleft()
                    progress = True
        assert not any(queues), case


def test_messages_take_no_time_and_are_inserted_once():
    for case in SOME:
        assert timeline(with_messages(*case)) == timeline(cached_make(*case))
    schedule = with_messages("zb", 4, 8, None)
    assert add_communication(schedule) is schedule


def test_a_receive_is_posted_while_the_sender_computes():
    # 1RECV_F1 is posted before 1F0, which runs while rank 0 computes 0F1.
    assert [" ".join(map(str, row)) for row in with_messages("1f1b", 2, 2, None).ranks] == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]


# --- errors ---------------------------------------------------------------------------------------


def error_of(schedule):
    with pytest.raises(UserError) as error:
        check(schedule)
    return str(error.value)


def assert_error(schedule, text):
    assert error_of(schedule) == message_and_grid(text)


def message_and_grid(text):
    first, *grid = (line.strip() for line in text.strip().splitlines())
    return "\n".join([first, *("  " + line for line in grid)])


def test_a_missing_backward():
    assert_error(
        rows("0F0 0F1 0B0 0B1", "1F0 1B0 1F1"),
        """
        schedule mine: rank 1 has stage 1, but no 1B1, or 1I1 and 1W1; add it to the rank's row
        rank 0: 0F0 0F1 0B0 0B1
        rank 1: 1F0 1B0 [1F1]   <-- no 1B1, or 1I1 and 1W1
    """,
    )


@pytest.mark.parametrize(
    ("row", "missing", "marked"),
    [
        ("0F0 0B0 0B1", "0F1", "[0B1]"),
        ("0F0 0F1 0I0 0I1 0W0", "0W1", "[0F1]"),
        ("0F0 0F1 0W0 0I1 0W1", "0I0", "[0F0]"),
    ],
)
def test_a_missing_forward_or_half_of_a_backward_is_named(row, missing, marked):
    text = error_of(rows(row))
    assert f"rank 0 has stage 0, but no {missing}; add it" in text
    assert marked in text
    assert f"<-- no {missing}" in text


def test_an_action_twice():
    assert_error(
        rows("0F0 0F0 0B0"),
        """
        schedule mine: rank 0 has 0F0 twice; delete one of them
        rank 0: 0F0 [0F0] 0B0   <-- one too many
    """,
    )
    twice = rows("0F0 0B0 0B0")
    twice = replace(twice, ranks=((*twice.ranks[0][:2], replace(twice.ranks[0][2], last=True)),))
    assert "has 0B0 twice" in error_of(twice)


@pytest.mark.parametrize(
    "row", ["0F0 0I0 0B0 0W0", "0F0 0B0 0I0", "0F0 0B0 0W0", "0F0 0I0 0W0 0B0"]
)
def test_a_full_backward_beside_a_half_of_it(row):
    assert "B already includes I and W; delete one of them\n" in error_of(rows(row))


def test_a_stage_on_two_ranks():
    assert_error(
        rows("0F0 0B0", "0F1 1F0 1B0"),
        """
        schedule mine: stage 0 is on ranks 0 and 1, but only one rank can hold its weights; give all its actions to one rank
        rank 0: [0F0] 0B0   <-- and here
        rank 1: [0F1] 1F0 1B0   <-- here
    """,
    )


def test_gaps_in_the_numbers_of_stages_and_microbatches():
    assert_error(
        rows("0F0 0B0", "2F0 2B0"),
        """
        schedule mine: 2F0 on rank 1, but there is no stage 1; number stages from 0 without gaps: 0 to 1
        rank 0: 0F0 0B0
        rank 1: [2F0] 2B0   <-- stage 2 of 2
    """,
    )
    assert "0F7 on rank 0, but there is no micro-batch 1; number micro-batches from 0" in error_of(
        rows("0F0 0F7 0B0 0B7")
    )
    negative = Schedule("mine", ((Action(-1, Op.F, 0),),))
    assert "there is no stage 0" in error_of(negative)
    assert "there is no micro-batch 0" in error_of(Schedule("mine", ((Action(0, Op.F, -3),),)))


def test_a_rank_without_work():
    assert_error(
        Schedule("mine", (rows("0F0 0B0").ranks[0], ())),
        """
        schedule mine: rank 1 has no actions; give it a stage, or delete its row
        rank 0: 0F0 0B0
        rank 1:    <-- nothing to do
    """,
    )
    assert "no rank has any actions" in error_of(Schedule("mine", ()))


def test_ranks_that_wait_for_each_other():
    assert_error(
        rows("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
        """
        schedule mine: deadlock: rank 0 waits in 0B0 for 1B0, rank 1 waits in 1F1 for 0F1; on rank 0 move 0F1 before 0B0
        rank 0: 0F0 [0B0] 0F1 0B1   <-- waits for 1B0
        rank 1: 1F0 [1F1] 1B0 1B1   <-- waits for 0F1
    """,
    )


def test_of_a_circle_of_four_ranks_all_are_named_and_of_five_the_first_three():
    def circle(p):
        """Each rank waits for its backward in the next rank, and the last for one in rank 0."""
        first = [f"0F0 {p}F0 0B0 {p}B0"]
        return [*first, *(f"{s}F0 {s + p}F0 {s + p}B0 {s}B0" for s in range(1, p))]

    assert error_of(rows(*circle(4))).splitlines()[0] == (
        "schedule mine: deadlock: rank 0 waits in 0B0 for 1B0, rank 1 waits in 1B0 for 2B0, rank 2 "
        "waits in 2B0 for 3B0, rank 3 waits in 3B0 for 4B0; on rank 0 move 4B0 before 0B0"
    )
    assert error_of(rows(*circle(5))).splitlines()[0] == (
        "schedule mine: deadlock: rank 0 waits in 0B0 for 1B0, rank 1 waits in 1B0 for 2B0, rank 2 "
        "waits in 2B0 for 3B0, and so on round 5 ranks; on rank 0 move 5B0 before 0B0"
    )


def test_a_rank_that_waits_for_itself():
    assert_error(
        rows("0F0 0W0 0I0"),
        """
        schedule mine: deadlock: rank 0 waits in 0W0 for 0I0; on rank 0 move 0I0 before 0W0
        rank 0: 0F0 [0W0] 0I0   <-- waits for 0I0
    """,
    )


def test_the_timeline_of_a_schedule_without_the_first_stage():
    with pytest.raises(UserError, match="rank 0 waits in 1F0 for 0F0, which no rank does; add it"):
        timeline(rows("1F0"))


MESSAGES = (
    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
)


def edited(*swaps):
    texts = list(MESSAGES)
    for rank, old, new in swaps:
        assert old in texts[rank]
        texts[rank] = texts[rank].replace(old, new)
    return rows(*texts)


def test_correct_messages_pass():
    check(edited())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_send_or_receive_that_is_missing(rank):
    for action in re.findall(r"\S+(?:SEND|RECV)_\S+", MESSAGES[rank]):
        text = error_of(edited((rank, action, "")))
        assert f"rank {rank} has stage {rank}, but no {action}; add it" in text


def test_a_message_that_would_overtake_another():
    assert_error(
        edited((1, "1RECV_F0 1F0 1RECV_F1", "1RECV_F1 1RECV_F0 1F0")),
        f"""
        schedule mine: messages from rank 0 to rank 1 would be mixed up: rank 1 does 1RECV_F1 first, but the message for 1RECV_F0 is sent first; on rank 1 move 1RECV_F0 before 1RECV_F1
        rank 0: {MESSAGES[0].replace("0B1", "...")}
        rank 1: [1RECV_F1] 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 ...   <-- before 1RECV_F0
    """,
    )


def test_a_message_without_another_rank():
    assert (
        "0SEND_B0 on rank 0 exchanges with stage -1, which does not exist; delete it"
        in error_of(edited((0, "0B1", "0B1 0SEND_B0")))
    )
    one_rank = rows("0F0 0SEND_F0 1RECV_F0 1F0 1B0 0B0")
    assert "exchanges with stage 1, which is on the same rank; delete it" in error_of(one_rank)


def test_a_receive_after_its_use_and_a_send_before_its_compute():
    assert "rank 1 waits in 1F0 for 1RECV_F0; on rank 1 move 1RECV_F0 before 1F0" in error_of(
        edited((1, "1RECV_F0 1F0", "1F0 1RECV_F0"))
    )
    assert "rank 0 waits in 0SEND_F0 for 0F0; on rank 0 move 0F0" in error_of(
        edited((0, "0F0 0SEND_F0", "0SEND_F0 0F0"))
    )


def forwards_first(m):
    """Rank 0 does all forwards, then all backwards; each receive comes right before its use."""
    return rows(
        " ".join([f"0F{k} 0SEND_F{k}" for k in range(m)] + [f"0RECV_B{k} 0B{k}" for k in range(m)]),
        " ".join(f"1RECV_F{k} 1F{k} 1B{k} 1SEND_B{k}" for k in range(m)),
    )


def test_more_pending_sends_than_are_allowed_are_a_deadlock():
    """Rank 1 stops with three pending sends, and so does rank 0 three forwards later."""
    check(forwards_first(5))
    assert (
        "rank 0 waits in 0RECV_B0 for 1RECV_F3, rank 1 waits in 1RECV_F3 for 0RECV_B0; receive "
        "before sending so much\n"
    ) in error_of(forwards_first(6))
    assert "; on rank 0 move 0RECV_B0 before 0F6\n" in error_of(forwards_first(7))


def test_of_a_large_grid_only_the_actions_near_the_error_are_shown():
    schedule = cached_make("gpipe", 8, 32)
    broken = replace(schedule, ranks=(*schedule.ranks[:7], schedule.ranks[7][:-1]))
    text = error_of(broken)
    assert all(len(line) < 120 for line in text.splitlines())
    assert "... 7F25 7F26 7F27 7F28 7F29 7F30 [7F31] 7B0" in text


@pytest.mark.parametrize(
    "cells",
    [
        ["0F0,9999F0"], ["0F0,0F999999"], ["9999F999999"],
        [f"{r}F{r}" for r in range(9999)],  # every stage and every micro-batch is in it
        [f"{r}F0" for r in reversed(range(9999))],  # correct: each rank waits for the next row
        [f"0F{m}" for m in (0, 0)] * 2000,
    ],
)  # fmt: skip
def test_a_file_with_odd_or_very_large_numbers_is_checked_quickly(cells, tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("\n".join(cells))
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        make(str(path), 2, 2)
    assert time.perf_counter() - began < 2  # usually 0.1 s
    assert len(str(error.value)) < 4000


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("zbb", 2, 4), "no schedule 'zbb', and no such file (No such file or directory) "
         "(schedule=); give gpipe, 1f1b, interleaved, zb or zbv (did you mean "),
        (("zb", 2, 4, 2), "schedule zb has 1 stage a rank, not 2 (chunks=); leave it out"),
        (("zbv", 2, 4, 3), "schedule zbv has 2 stages a rank, not 3 (chunks=)"),
        (("interleaved", 4, 6), "6 do not divide by 4 ranks of pp (microbatches=); give "
         "microbatches=8"),
        (("zb", 0, 4), "a pipeline cannot have 0 ranks; give 1 or more"),
        (("zb", 2, -1), "a pipeline cannot have -1 micro-batches"),
        (("interleaved", 2, 2, 0), "a pipeline cannot have 0 chunks"),
    ],
)  # fmt: skip
def test_the_errors_of_make_name_the_fix(args, text):
    with pytest.raises(UserError, match=re.escape(text)) as error:
        make(*args)
    assert "\n" not in str(error.value)


# --- files ----------------------------------------------------------------------------------------


def save(schedule, path):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in schedule.ranks))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_a_saved_schedule_is_loaded_unchanged(name, messages, tmp_path):
    path = tmp_path / "plan.csv"
    schedule = (with_messages if messages else cached_make)(name, 4, 8, None)
    save(schedule, path)
    assert load(path) == replace(schedule, name=str(path))
    assert make(str(path), 4, 8).ranks == schedule.ranks
    assert placement(str(path), 4) == schedule.rank_of


def test_a_grid_written_by_hand_is_a_schedule(tmp_path):
    """1f1b, except that the last rank does the second backward before the first."""
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeff0F0, 0F1,    ,    ,    ,    , 0B1, 0B0\r\n"
        "      ,1F0 , 1F1, 1B1,    , 1B0,,\r\n\r\n , \r\n",
        encoding="utf-8",
    )
    schedule = make(str(path), 2, 2)
    assert render(schedule) == dedented("""
        rank 0  F0 F1 .  .  .  B1 -  B0 -
        rank 1  .  F0 F1 B1 -  B0 -  .  .
    """)
    check(add_communication(schedule))
    assert make(str(path), 2, 2, 1) == schedule


def test_a_blank_line_between_ranks_is_a_rank_without_work(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0\n\n1F0,1B0\n")
    with pytest.raises(UserError, match="rank 1 has no actions"):
        make(str(path), 2, 1)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        (b"\x89PNG\r\n\xff\xfe", "not a text file"),
        (b"PK\0\0", "binary"),
        (b"", "is empty"),
        (b" , ,\n\n", "is empty"),
        (b"0F0,0B0\n1F0,F1\n", "'F1' is no action (PATH, row 2, column 2); write stage, F"),
        (b"\n0F0,-1F0\n", "'-1F0' is no action (PATH, row 2, column 2)"),
        (b"0F0,0F9999999\n", "'0F9999999' is no action"),
        (b'"' + b"9" * 200_000, "not a text file"),
        (b"9" * 50_000, "is no action"),
    ],
)  # fmt: skip
def test_a_file_without_a_schedule_is_refused_in_one_line(content, text, tmp_path):
    path = tmp_path / "plan.csv"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    assert text.replace("PATH", str(path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


def test_an_endless_file_and_an_impossible_file_name_are_refused():
    with pytest.raises(UserError, match="not a text file"):
        load("/dev/zero")
    with pytest.raises(UserError, match="not a text file"):
        load("a\0b")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((3, 4), "is for 2 ranks, not 3 (schedule=); give a mesh of pp=2"),
        ((2, 8), "is for 4 micro-batches, not 8 (schedule=); give microbatches=4"),
        ((2, 4, 3), "has 2 stages a rank, not 3 (chunks=); leave it out"),
    ],
)
def test_a_file_for_other_numbers_is_refused_with_its_own(args, text, tmp_path):
    path = tmp_path / "plan.csv"
    save(cached_make("zbv", 2, 4), path)
    with pytest.raises(UserError, match=re.escape(text)):
        make(str(path), *args)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_pytorchs_pipelining_reads_our_files_as_the_same_schedule(name, messages, tmp_path):
    path = Path(tmp_path, "plan.csv")
    schedule = (with_messages if messages else cached_make)(name, 4, 8, None)
    save(schedule, path)
    reader = object.__new__(
        torchs._PipelineScheduleRuntime
    )  # its constructor needs a process group
    reader.pipeline_order, reader._stages, reader._defer_pp_recv = {}, [], False
    reader.pp_group_size, reader._num_stages, reader._n_microbatches = 4, schedule.stages, 8
    reader._load_csv(str(path), format="compute_comms" if messages else "compute_only")
    read = reader.pipeline_order_with_comms if messages else reader.pipeline_order
    assert [list(map(str, read[rank])) for rank in range(4)] == [
        list(map(str, row)) for row in schedule.ranks
    ]
    assert reader.stage_index_to_group_rank == schedule.rank_of


# --- when a stage is unsharded --------------------------------------------------------------------


def unsharding_case(case, *, each_action):
    if case == "evaluation":
        plain = add_communication(forward_only(placement("zbv", 4), 6))
    else:
        plain = with_messages(*case)
    unsharding = add_unshard(plain, each_action=each_action)
    if not each_action:  # else a stage's UNSHARD comes several times
        check(unsharding)
    assert timeline(unsharding) == timeline(plain), "it takes no time"
    for before, row in zip(plain.ranks, unsharding.ranks, strict=True):
        assert tuple(a for a in row if a.op not in (Op.UNSHARD, Op.RESHARD)) == before
    return unsharding


UNSHARDING = [*((name, 4, 8, None) for name in SCHEDULES), "evaluation"]


@pytest.mark.parametrize("case", UNSHARDING, ids=str)
def test_a_stage_is_unsharded_before_its_first_action_and_resharded_after_its_last(case):
    for row in unsharding_case(case, each_action=False).ranks:
        for stage in {action.stage for action in row}:
            ops = [a.op for a in row if a.stage == stage]
            assert (ops.count(Op.UNSHARD), ops.count(Op.RESHARD)) == (1, 1)
            compute = [i for i, op in enumerate(ops) if op in COMPUTE]
            assert ops.index(Op.UNSHARD) == compute[0] - 1
            assert ops.index(Op.RESHARD) == compute[-1] + 1


@pytest.mark.parametrize("case", UNSHARDING, ids=str)
def test_a_stage_is_unsharded_for_each_action_if_it_is_not_to_stay_in_memory(case):
    for row in unsharding_case(case, each_action=True).ranks:
        for i, action in enumerate(row):
            if action.op in COMPUTE:
                around = Op.UNSHARD, Op.RESHARD
                assert (row[i - 1].op, row[i + 1].op) == around
                assert row[i - 1].stage == row[i + 1].stage == action.stage
                assert compute_action(row, i - 1) == compute_action(row, i + 1) == action


def test_a_file_cannot_contain_unshard():
    assert Action.parse("2UNSHARD0") is None
