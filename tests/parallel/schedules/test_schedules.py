"""Pipeline schedules: the table in library.py, what `check` refuses, messages, and files."""

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
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Op, Schedule
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
MS = (*range(1, 11), 12, 16, 17, 32)  # around p and 2p of most p, and both ends
CASES = [
    (name, p, m, v)
    for name, p, m in product(SCHEDULES, PS, MS)
    if name != "interleaved" or m % p == 0
    for v in ((2, 3) if name == "interleaved" else (None,))
]
SOME = [case for case in CASES if case[2] in (1, 2, 3, 4, 5, 7, 8, 9, 16)]  # where each is slow
made = cache(make)
with_messages = cache(lambda *case: add_communication(made(*case)))


def of(name):
    return [case for case in CASES if case[0] == name]


def rows(*texts, name="mine"):
    """A schedule from its grid."""
    actions = [tuple(map(Action.parse, text.split())) for text in texts]
    assert all(None not in row for row in actions)
    return Schedule(name, tuple(actions))


def drawn(text):
    return "\n".join(line.strip() for line in text.strip().splitlines())


# --- the table ------------------------------------------------------------------------------------


def test_gpipe_turns_round_once():
    assert render(made("gpipe", 3, 4)) == drawn("""
        rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0 -  B1 -  B2 -  B3 -
        rank 1  .  F0 F1 F2 F3 .  .  .  B0 -  B1 -  B2 -  B3 -  .  .
        rank 2  .  .  F0 F1 F2 F3 B0 -  B1 -  B2 -  B3 -  .  .  .  .
    """)


def test_interleaved_gives_each_rank_stages_far_apart():
    assert render(made("interleaved", 2, 4)) == drawn("""
        rank 0  0F0 0F1 2F0 2F1 0F2 .   2B0 -   0F3 2B1 -   2F2 0B0 -   2F3 0B1 -   .   2B2 -   .   2B3 -   0B2 -   0B3 -
        rank 1  .   1F0 1F1 3F0 3B0 -   3F1 3B1 -   1F2 1B0 -   1F3 1B1 -   3F2 3B2 -   3F3 3B3 -   1B2 -   1B3 -   .   .
    """)


def test_zbv_turns_round_on_the_last_rank_and_has_the_loss_on_the_first():
    assert render(made("zbv", 2, 2)) == drawn("""
        rank 0  0F0 0F1 .   3F0 3I0 3F1 3I1 0I0 0W0 3W0 0I1 0W1 3W1
        rank 1  .   1F0 2F0 1F1 2F1 2I0 1I0 1W0 2I1 1I1 1W1 2W0 2W1
    """)


def test_ranks_are_idle_for_the_share_that_the_table_says():
    for name, p, m, v in CASES:
        units = {"gpipe": m, "1f1b": m, "interleaved": m * (v or 1), "zb": 3 * m, "zbv": 6 * m}
        if m >= p or not name.startswith("zb"):
            share = (p - 1) / (units[name] + p - 1)
            # Sums of whole numbers, divided once: all but the last digits are equal.
            assert bubble(made(name, p, m, v)) == pytest.approx(share, abs=1e-12), (name, p, m, v)


def test_with_few_microbatches_the_zero_bubble_schedules_take_longer_than_the_formula():
    for name, p, m, _ in of("zb") + of("zbv"):
        if m < p:
            work = (3 if name == "zb" else 6) * m
            assert length(made(name, p, m)) > work + p - 1


def test_zb_wastes_f_plus_b_minus_w_for_each_rank_but_one():
    for _, p, m, _ in of("zb"):
        if m >= p:
            assert length(made("zb", p, m)) - 3 * m == (p - 1) * (1 + 1 - 1)


@pytest.mark.parametrize(("p", "m"), [(9, 10), (12, 40), (16, 17)])
def test_zbv_ends_without_waste_for_a_few_more_ranks_too(p, m):
    assert length(make("zbv", p, m)) == 6 * m + p - 1


def test_zbv_of_4_ranks_and_8_microbatches_is_idle_for_a_seventeenth():
    assert bubble(made("zbv", 4, 8)) <= 0.06


def test_ranks_hold_as_many_forwards_as_the_table_says():
    for name, p, m, v in CASES:
        chunks = v or SCHEDULES[name].chunks
        held = peak_activations(made(name, p, m, v))
        for r in range(p):
            table = {
                "gpipe": m, "1f1b": p - r, "zb": p, "zbv": 2 * p,
                "interleaved": (chunks - 1) * p + 2 * (p - r) - 1,
            }  # fmt: skip
            wanted = min(table[name], chunks * m)
            exact = name in ("gpipe", "1f1b", "interleaved")
            assert held[r] == wanted if exact else held[r] <= wanted, (name, p, m, v, r)
        if name.startswith("zb") and m >= p:
            assert max(held) == chunks * p  # the table's numbers are reached


def test_stages_lie_where_the_table_says():
    for name, p, m, v in CASES:
        chunks = v or SCHEDULES[name].chunks
        for r in range(p):
            wanted = [r, 2 * p - 1 - r] if name == "zbv" else [c * p + r for c in range(chunks)]
            assert made(name, p, m, v).stages_of(r) == wanted
    assert placement("zbv", 2) == {0: 0, 1: 1, 2: 1, 3: 0}


# --- every schedule -------------------------------------------------------------------------------


def test_every_schedule_is_right_with_messages_and_without_and_so_are_its_forwards():
    for case in SOME:
        check(with_messages(*case))  # `make` has checked the schedule itself
        forwards = forward_only(made(*case).rank_of, case[2])
        check(forwards)
        check(add_communication(forwards))
        assert {a.op for row in forwards.ranks for a in row} == {Op.F}
        assert peak_activations(forwards) == [0] * len(forwards.ranks)


def test_an_evaluation_takes_as_many_microbatches_as_ranks_through_every_stage_and_then_the_next():
    # One stage after the other for all of them would keep every output that lies between two.
    forwards = forward_only({0: 0, 1: 1, 2: 0, 3: 1}, 5)
    assert [[(a.stage, a.microbatch) for a in row] for row in forwards.ranks] == [
        [(s, m) for turn in ([0, 1], [2, 3], [4]) for s in stages for m in turn]
        for stages in ((0, 2), (1, 3))
    ]


def test_one_action_of_each_stage_completes_its_gradients_and_it_is_the_last_that_adds_to_them():
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


def test_what_is_received_is_awaited_later_and_what_is_made_is_sent_at_once():
    for case in SOME:
        plain, schedule = made(*case), with_messages(*case)
        assert [tuple(a for a in row if a.op in COMPUTE) for row in schedule.ranks] == list(
            plain.ranks
        )
        for row in schedule.ranks:
            users = {Op.RECV_F: (Op.F,), Op.RECV_B: (Op.B, Op.I)}
            makers = {Op.SEND_F: (Op.F,), Op.SEND_B: (Op.B, Op.I)}
            at = {(a.op, a.stage, a.microbatch): i for i, a in enumerate(row)}
            for i, a in enumerate(row):
                if a.op in users:
                    [use] = [at[k] for op in users[a.op] if (k := (op, *key(a))) in at]
                    assert i < use
                elif a.op in makers:
                    before = row[i - 1]
                    assert before.op in makers[a.op]
                    assert key(before) == key(a)


def key(action):
    return action.stage, action.microbatch


def channels(schedule):
    """(from, to) -> what is sent and what is received, as the receives' names."""
    sent, received = {}, {}
    for rank, row in enumerate(schedule.ranks):
        for a in row:
            if a.op in (Op.SEND_F, Op.SEND_B):
                step, op = (1, Op.RECV_F) if a.op is Op.SEND_F else (-1, Op.RECV_B)
                end = Action(a.stage + step, op, a.microbatch)
                sent.setdefault((rank, schedule.rank_of[end.stage]), []).append(end)
            elif a.op in (Op.RECV_F, Op.RECV_B):
                source = schedule.rank_of[a.stage + (1 if a.op is Op.RECV_B else -1)]
                received.setdefault((source, rank), []).append(a)
    return sent, received


def test_between_two_ranks_messages_arrive_in_the_order_in_which_they_are_sent():
    for case in SOME:
        sent, received = channels(with_messages(*case))
        assert sent == received


def test_no_schedule_needs_a_message_to_leave_before_its_receive_is_posted():
    """Not even with no room on the way: each send waits for the other end."""
    for case in SOME:
        schedule = with_messages(*case)
        posted, done, queues = set(), set(), [deque(row) for row in schedule.ranks]
        moved = True
        while moved:
            moved = False
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
                    moved = True
        assert not any(queues), case


def test_messages_cost_no_time_and_are_written_in_once():
    for case in SOME:
        assert timeline(with_messages(*case)) == timeline(made(*case))
    schedule = with_messages("zb", 4, 8, None)
    assert add_communication(schedule) is schedule


def test_a_rank_receives_while_it_computes():
    # 1RECV_F1 while 1F0 is computed, and no later than 0F1, which makes it, begins.
    assert [" ".join(map(str, row)) for row in with_messages("1f1b", 2, 2, None).ranks] == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]


# --- what is refused ------------------------------------------------------------------------------


def refused(schedule):
    with pytest.raises(UserError) as error:
        check(schedule)
    return str(error.value)


def says(schedule, text):
    assert refused(schedule) == drawn_grid(text)


def drawn_grid(text):
    first, *grid = (line.strip() for line in text.strip().splitlines())
    return "\n".join([first, *("  " + line for line in grid)])


def test_a_missing_backward():
    says(
        rows("0F0 0F1 0B0 0B1", "1F0 1B0 1F1"),
        """
        schedule mine: rank 1, which has stage 1, lacks 1B1, or 1I1 and 1W1; add it to the rank's row
        rank 0: 0F0 0F1 0B0 0B1
        rank 1: 1F0 1B0 [1F1]   <-- lacks 1B1, or 1I1 and 1W1
    """,
    )


@pytest.mark.parametrize(
    ("row", "lacks", "place"),
    [
        ("0F0 0B0 0B1", "0F1", "[0B1]"),
        ("0F0 0F1 0I0 0I1 0W0", "0W1", "[0F1]"),
        ("0F0 0F1 0W0 0I1 0W1", "0I0", "[0F0]"),
    ],
)
def test_each_part_that_is_missing_is_named(row, lacks, place):
    text = refused(rows(row))
    assert f"rank 0, which has stage 0, lacks {lacks}; add it" in text
    assert place in text
    assert f"<-- lacks {lacks}" in text


def test_an_action_twice():
    says(
        rows("0F0 0F0 0B0"),
        """
        schedule mine: rank 0 has 0F0 twice; leave out one
        rank 0: 0F0 [0F0] 0B0   <-- once too often
    """,
    )
    twice = rows("0F0 0B0 0B0")
    twice = replace(twice, ranks=((*twice.ranks[0][:2], replace(twice.ranks[0][2], last=True)),))
    assert "has 0B0 twice" in refused(twice)


@pytest.mark.parametrize(
    "row", ["0F0 0I0 0B0 0W0", "0F0 0B0 0I0", "0F0 0B0 0W0", "0F0 0I0 0W0 0B0"]
)
def test_a_whole_backward_beside_a_half_of_it(row):
    assert "B is I and W at once; leave out one\n" in refused(rows(row))


def test_a_stage_on_two_ranks():
    says(
        rows("0F0 0B0", "0F1 1F0 1B0"),
        """
        schedule mine: stage 0 is on ranks 0 and 1, and one has its weights; leave all its actions to one
        rank 0: [0F0] 0B0   <-- and here
        rank 1: [0F1] 1F0 1B0   <-- here
    """,
    )


def test_a_stage_that_nobody_has_and_a_microbatch_that_is_left_out():
    says(
        rows("0F0 0B0", "2F0 2B0"),
        """
        schedule mine: 2F0 on rank 1, and there is no stage 1; number stages from 0, without gaps: 0 to 1
        rank 0: 0F0 0B0
        rank 1: [2F0] 2B0   <-- stage 2, of 2
    """,
    )
    assert "0F7 on rank 0, and there is no micro-batch 1; number micro-batches from 0" in refused(
        rows("0F0 0F7 0B0 0B7")
    )
    negative = Schedule("mine", ((Action(-1, Op.F, 0),),))
    assert "there is no stage 0" in refused(negative)
    assert "there is no micro-batch 0" in refused(Schedule("mine", ((Action(0, Op.F, -3),),)))


def test_a_rank_without_work():
    says(
        Schedule("mine", (rows("0F0 0B0").ranks[0], ())),
        """
        schedule mine: rank 1 has no actions; give it a stage, or leave its row out
        rank 0: 0F0 0B0
        rank 1:    <-- nothing to do
    """,
    )
    assert "no rank has anything to do" in refused(Schedule("mine", ()))


def test_ranks_that_wait_for_each_other():
    says(
        rows("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
        """
        schedule mine: deadlock: rank 0 waits in 0B0 for 1B0, rank 1 waits in 1F1 for 0F1; on rank 0 move 0F1 before 0B0
        rank 0: 0F0 [0B0] 0F1 0B1   <-- waits for 1B0
        rank 1: 1F0 [1F1] 1B0 1B1   <-- waits for 0F1
    """,
    )


def test_a_rank_that_waits_for_itself():
    says(
        rows("0F0 0W0 0I0"),
        """
        schedule mine: deadlock: rank 0 waits in 0W0 for 0I0; on rank 0 move 0I0 before 0W0
        rank 0: 0F0 [0W0] 0I0   <-- waits for 0I0
    """,
    )


def test_a_timeline_of_what_nobody_does():
    with pytest.raises(UserError, match="rank 0 waits in 1F0 for 0F0, which nobody does; add it"):
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


def test_messages_that_are_right_pass():
    check(edited())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_message_that_is_not_sent_or_not_received(rank):
    for action in re.findall(r"\S+(?:SEND|RECV)_\S+", MESSAGES[rank]):
        text = refused(edited((rank, action, "")))
        assert f"rank {rank}, which has stage {rank}, lacks {action}; add it" in text


def test_a_message_that_would_overtake_another():
    says(
        edited((1, "1RECV_F0 1F0 1RECV_F1", "1RECV_F1 1RECV_F0 1F0")),
        f"""
        schedule mine: messages from rank 0 to rank 1 would be taken for each other: rank 1 does 1RECV_F1 first, and what 1RECV_F0 is for is sent first; on rank 1 move 1RECV_F0 before 1RECV_F1
        rank 0: {MESSAGES[0].replace("0B1", "...")}
        rank 1: [1RECV_F1] 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 ...   <-- before 1RECV_F0
    """,
    )


def test_a_message_to_no_other_rank():
    assert "0SEND_B0 on rank 0 is between it and stage -1, which no rank has" in refused(
        edited((0, "0B1", "0B1 0SEND_B0"))
    )
    one = rows("0F0 0SEND_F0 1RECV_F0 1F0 1B0 0B0")
    assert "which rank 0 itself has; leave it out" in refused(one)


def test_a_receive_after_its_use_and_a_send_before_its_making():
    assert "rank 1 waits in 1F0 for 1RECV_F0; on rank 1 move 1RECV_F0 before 1F0" in refused(
        edited((1, "1RECV_F0 1F0", "1F0 1RECV_F0"))
    )
    assert "rank 0 waits in 0SEND_F0 for 0F0; on rank 0 move 0F0" in refused(
        edited((0, "0F0 0SEND_F0", "0SEND_F0 0F0"))
    )


def forwards_first(m):
    """All forwards, then all backwards, on rank 0; each receive right before its use."""
    return rows(
        " ".join([f"0F{k} 0SEND_F{k}" for k in range(m)] + [f"0RECV_B{k} 0B{k}" for k in range(m)]),
        " ".join(f"1RECV_F{k} 1F{k} 1B{k} 1SEND_B{k}" for k in range(m)),
    )


def test_more_messages_on_their_way_than_there_is_room_for():
    """Rank 1 stops with three sent of which none has left; so does rank 0, three later."""
    check(forwards_first(5))
    assert (
        "rank 0 waits in 0RECV_B0 for 1RECV_F3, rank 1 waits in 1RECV_F3 for 0RECV_B0; receive "
        "before sending so much\n"
    ) in refused(forwards_first(6))
    assert "; on rank 0 move 0RECV_B0 before 0F6\n" in refused(forwards_first(7))


def test_of_a_large_grid_what_lies_around_the_place_is_shown():
    schedule = made("gpipe", 8, 32)
    broken = replace(schedule, ranks=(*schedule.ranks[:7], schedule.ranks[7][:-1]))
    text = refused(broken)
    assert all(len(line) < 120 for line in text.splitlines())
    assert "... 7F25 7F26 7F27 7F28 7F29 7F30 [7F31] 7B0" in text


@pytest.mark.parametrize(
    "cells",
    [
        ["0F0,9999F0"], ["0F0,0F999999"], ["9999F999999"],
        [f"{r}F{r}" for r in range(9999)],  # each stage and each micro-batch is there
        [f"{r}F0" for r in reversed(range(9999))],  # right, and each rank waits for the one below
        [f"0F{m}" for m in (0, 0)] * 2000,
    ],
)  # fmt: skip
def test_however_odd_its_numbers_a_file_is_judged_at_once(cells, tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("\n".join(cells))
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        make(str(path), 2, 2)
    assert time.perf_counter() - began < 2  # it takes 0.1 s; some machines are slow
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
        (("zb", 0, 4), "0 ranks of a pipeline; give 1 or more"),
        (("zb", 2, -1), "-1 micro-batches of a pipeline"),
        (("interleaved", 2, 2, 0), "0 chunks of a pipeline"),
    ],
)  # fmt: skip
def test_make_says_what_to_give_instead(args, text):
    with pytest.raises(UserError, match=re.escape(text)) as error:
        make(*args)
    assert "\n" not in str(error.value)


# --- files ----------------------------------------------------------------------------------------


def save(schedule, path):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in schedule.ranks))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_what_is_saved_is_loaded_again(name, messages, tmp_path):
    path = tmp_path / "plan.csv"
    schedule = (with_messages if messages else made)(name, 4, 8, None)
    save(schedule, path)
    assert load(path) == replace(schedule, name=str(path))
    assert make(str(path), 4, 8).ranks == schedule.ranks
    assert placement(str(path), 4) == schedule.rank_of


def test_a_grid_drawn_by_hand_is_a_schedule(tmp_path):
    """1f1b, but the last rank does the second backward before the first, where 1f1b cannot."""
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeff0F0, 0F1,    ,    ,    ,    , 0B1, 0B0\r\n"
        "      ,1F0 , 1F1, 1B1,    , 1B0,,\r\n\r\n , \r\n",
        encoding="utf-8",
    )
    schedule = make(str(path), 2, 2)
    assert render(schedule) == drawn("""
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
def test_what_is_no_schedule_is_refused_in_one_line(content, text, tmp_path):
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


def test_a_file_without_end_and_a_name_that_none_can_have():
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
def test_a_file_for_something_else_says_for_what(args, text, tmp_path):
    path = tmp_path / "plan.csv"
    save(made("zbv", 2, 4), path)
    with pytest.raises(UserError, match=re.escape(text)):
        make(str(path), *args)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_pytorchs_pipelining_reads_what_we_save_as_what_we_mean(name, messages, tmp_path):
    path = Path(tmp_path, "plan.csv")
    schedule = (with_messages if messages else made)(name, 4, 8, None)
    save(schedule, path)
    reader = object.__new__(torchs._PipelineScheduleRuntime)  # its constructor wants processes
    reader.pipeline_order, reader._stages, reader._defer_pp_recv = {}, [], False
    reader.pp_group_size, reader._num_stages, reader._n_microbatches = 4, schedule.stages, 8
    reader._load_csv(str(path), format="compute_comms" if messages else "compute_only")
    read = reader.pipeline_order_with_comms if messages else reader.pipeline_order
    assert [list(map(str, read[rank])) for rank in range(4)] == [
        list(map(str, row)) for row in schedule.ranks
    ]
    assert reader.stage_index_to_group_rank == schedule.rank_of


# --- when a stage's parameters must be there ------------------------------------------------------


@pytest.mark.parametrize(
    "case", [(name, 4, 8, None) for name in SCHEDULES] + ["evaluation"], ids=str
)
def test_a_stage_is_unsharded_before_its_first_action_and_resharded_after_its_last(case):
    if case == "evaluation":
        plain = add_communication(forward_only(placement("zbv", 4), 6))
    else:
        plain = with_messages(*case)
    told = add_unshard(plain)
    check(told)
    assert timeline(told) == timeline(plain), "it takes no time"
    for before, row in zip(plain.ranks, told.ranks, strict=True):
        assert tuple(a for a in row if a.op not in (Op.UNSHARD, Op.RESHARD)) == before
        for stage in {action.stage for action in row}:
            ops = [a.op for a in row if a.stage == stage]
            assert (ops.count(Op.UNSHARD), ops.count(Op.RESHARD)) == (1, 1)
            compute = [i for i, op in enumerate(ops) if op in COMPUTE]
            assert ops.index(Op.UNSHARD) == compute[0] - 1
            assert ops.index(Op.RESHARD) == compute[-1] + 1


def test_a_file_does_not_say_when_a_stage_is_unsharded():
    assert Action.parse("2UNSHARD0") is None
