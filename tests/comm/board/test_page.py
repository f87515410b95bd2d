"""A page: what is written can be read by another process at any time, and costs microseconds."""

import mmap
import os
import sys
import time
import timeit
from types import SimpleNamespace

import pytest

from dist_lab.comm.board.board import Board, boards_of, new_file, numbers_in_words
from dist_lab.comm.board.lanes import MOST, Differ, Lane, Lanes
from dist_lab.comm.board.page import (
    FAILED,
    LAST,
    LEFT,
    NUMBER,
    PAGE,
    RING,
    RING_AT,
    WAITING,
    Identity,
    Page,
)
from dist_lab.comm.board.report import report
from dist_lab.comm.board.stack import innermost
from dist_lab.comm.board.words import Status, by_blame, parting
from dist_lab.comm.ledger import Call
from dist_lab.errors import MachineError

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")
KEY = b"of group"


@pytest.fixture
def page():
    page = Page(mmap.mmap(-1, 2 * PAGE), 1)
    page.claim(b"t" * 16, Identity(4711, 3, 4, 2, "dp=1,tp=1", "dp=2 x tp=2"))
    return page


def call(number, op="all_reduce", about="float32[4], sum", **changes):
    fields = {"phase": "backward", "unit": "blocks.3", "where": "fsdp.py:88"} | changes
    return Call(number, op, "dp", 2, about, 16, 16, algorithm="backend", **fields)


def write(page, number, **changes):
    page.write(call(number, **changes), 5.0, KEY, number, 7, 0, "dp{1,3}")


def test_a_page_returns_what_was_written(page):
    page.now(7, "backward", "blocks.3")
    write(page, 1)
    assert page.identity() == Identity(4711, 3, 4, 2, "dp=1,tp=1", "dp=2 x tp=2")
    assert page.identity(b"t" * 16) is not None
    assert page.identity(b"u" * 16) is None, "a page of another board was believed"
    assert page.doing() == (7, "backward", "blocks.3")
    entry = page.entry(1)
    assert str(entry) == "all_reduce(float32[4], sum) #1 on dp{1,3}, 16 B, at fsdp.py:88"
    assert (entry.phase, entry.unit, entry.step, entry.seq) == ("backward", "blocks.3", 7, 1)
    assert entry.finished == 0
    page.set(WAITING, 1)
    page.finish(1)
    assert page.get(WAITING) == 0
    assert 0 < time.monotonic() - page.entry(1).finished < 5


def test_a_page_that_nobody_claimed_is_nobodys():
    assert Page(mmap.mmap(-1, PAGE), 0).identity() is None


def test_the_ring_keeps_the_last_calls_and_forgets_older_ones(page):
    for number in range(1, RING + 3):
        write(page, number)
    assert [entry.number for entry in page.entries()] == list(range(3, RING + 3))
    assert page.entry(2) is None
    page.finish(2)  # a call that was waited for very late changes no other
    assert page.entry(RING + 2).finished == 0


def test_a_call_that_is_being_written_is_not_returned(page):
    write(page, 1)
    NUMBER.pack_into(page.memory, page.at + RING_AT + 1 * 384, 0)
    assert page.entry(1) is None
    assert page.get(LAST) == 1


def test_long_and_foreign_names_are_cut_and_do_not_break_the_page(page):
    write(page, 1, about="é" * 500, unit="模型" * 50, where="x" * 300)
    entry = page.entry(1)
    assert entry.about.startswith("é" * 47)
    assert entry.where == "x" * 48
    page.now(1, "p" * 100, "模" * 100)
    assert page.doing()[0] == 1


def test_writing_a_call_takes_microseconds(page):
    one = call(1)

    def record():
        page.write(one, time.monotonic(), KEY, 1, 7, 0, "dp{1,3}")
        page.set(WAITING, 1)
        page.finish(1)

    seconds = min(timeit.repeat(record, number=500, repeat=9, timer=time.thread_time)) / 500
    assert seconds < 20e-6


# --- lanes ----------------------------------------------------------------------------------------


def lanes_of(count):
    memory = mmap.mmap(-1, count * PAGE)
    lanes = [[Lanes(Page(memory, i)) for i in range(count)] for _ in range(count)]
    return [Lane(KEY, lanes[i], i, range(count)) for i in range(count)]


def test_of_two_ranks_that_differ_the_later_one_sees_it():
    first, second = lanes_of(2)
    first.post(1, "all_reduce(float32[4], sum)")
    assert first.agreement().late() == [1]
    with pytest.raises(Differ) as found:
        second.post(9, "all_reduce(float32[4], max)")
    assert found.value.numbers == {1: 9, 0: 1}
    with pytest.raises(Differ):
        first.agreement().late()


def test_a_rank_may_be_many_calls_ahead_and_is_compared_when_it_is_reached():
    first, second = lanes_of(2)
    for n in range(1, 201):
        first.post(n, f"call {n}")
    for n in range(1, 200):
        second.post(n, f"call {n}")
    with pytest.raises(Differ):
        second.post(200, "another call")


def test_a_fingerprint_that_was_overwritten_is_not_a_difference():
    first, second = lanes_of(2)
    for n in range(1, 301):
        first.post(n, f"call {n}")
    second.post(1, "call 1")
    assert second.agreement().late() == []


def test_numbers_in_words():
    assert numbers_in_words([0, 2, 4]) == "0,2,4"
    assert numbers_in_words([]) == ""


# --- words ----------------------------------------------------------------------------------------


def entries(page, *abouts):
    for number, about in enumerate(abouts, 1):
        write(page, number, about=about)
    return page.entries()


def test_two_ranks_are_compared_side_by_side_where_they_part():
    left, right = Page(mmap.mmap(-1, PAGE), 0), Page(mmap.mmap(-1, PAGE), 0)
    ours = entries(left, *"abcdefgh")
    theirs = entries(right, *"abcdeXgh")
    lines = parting(ours, theirs, (0, 1)).splitlines()
    assert lines[0] == "where ranks 0 and 1 part, in their common groups:"
    assert [line[:18] for line in lines[2:]] == [
        "    all_reduce(c) ", "    all_reduce(d) ", "    all_reduce(e) ", "  > all_reduce(f) ",
        "    all_reduce(g) ",
    ]  # fmt: skip
    assert lines[5].endswith("| all_reduce(X) on dp{1,3} at fsdp.py:88")
    missing = parting(ours, theirs[:3], (0, 1)).splitlines()
    assert missing[-2].startswith("  > all_reduce(d) ")
    assert missing[-2].endswith("| -")


def test_calls_that_one_of_two_ranks_has_forgotten_are_left_out():
    left, right = Page(mmap.mmap(-1, PAGE), 0), Page(mmap.mmap(-1, PAGE), 0)
    ours, theirs = entries(left, *"abcdef")[4:], entries(right, *"abcdeX")
    lines = parting(ours, theirs, (2, 3)).splitlines()
    assert lines[2].startswith("    all_reduce(e) ")
    assert lines[3].startswith("  > all_reduce(f) ")


def test_the_line_of_a_stack_is_the_users_or_ours_and_not_a_librarys():
    stack = "Stack (most recent call first):\n" + "".join(
        f'  File "{file}", line {line} in f\n'
        for file, line in [
            ("/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", 1),
            ("/x/dist_lab/comm/calls.py", 2),
            ("/venv/lib/python3.11/site-packages/dist_lab/step/eager.py", 3),
            ("/home/me/train.py", 4),
        ]
    )
    assert innermost(stack) == "eager.py:3 in f"
    assert innermost(stack.replace("/dist_lab/step/", "/other/")) == "train.py:4 in f"
    assert innermost("") == ""


def status(rank, state="", *, failed=0.0, waiting=None, last=None):
    return Status(rank, "", 1, "forward", "", state, failed, waiting, last, now=9.0)


def test_the_order_of_blame(page):
    (call,) = entries(page, "x")
    statuses = [
        status(0),
        status(1, failed=8.0, waiting=call),  # lost a peer, or timed out
        status(2, failed=7.0, waiting=call),
        status(3),  # others wait for it
        status(4, "stopped"),
        status(5, "ended", failed=6.0),  # by an exception
        status(6, "ended"),
        status(7, "ended", failed=8.5, waiting=call),
    ]
    assert [s.rank for s in by_blame(statuses, [3])] == [6, 5, 4, 3, 2, 1, 7, 0]


@linux
def test_of_two_ranks_that_failed_the_first_is_said_to_be_the_cause():
    board = Board(new_file(3), b"t" * 16, [0, 1, 2], 0)
    board.claim(3, "dp=0", "dp=3")
    for rank, failed in ((1, 8.0), (2, 7.0)):
        board.pages[rank].claim(b"t" * 16, Identity(os.getpid(), rank, 3, 3, f"dp={rank}", "dp=3"))
        board.pages[rank].set(FAILED, failed)
    cause, _ = report(board, 1, 3, lost=True)
    assert cause.startswith("rank 2 ")
    assert "rank 1" not in cause


@linux
def test_a_board_is_a_file_without_a_name_and_says_when_its_rank_has_left():
    before = list(boards_of(os.getpid()))
    file = new_file(2)
    board = Board(file, b"t" * 16, [0, 5], 5)
    board.claim(8, "dp=5", "dp=8")
    page = Page(board.memory, 1)
    assert len(list(boards_of(os.getpid()))) > len(before)
    assert [status.rank for status in board.statuses()] == [5]
    assert not page.get(LEFT)
    if os.fork() == 0:  # as a worker that loads data
        del board
        os._exit(0)
    os.wait()
    assert not page.get(LEFT), "a fork is not the rank"
    del board
    assert page.get(LEFT) > 0
    del page
    assert list(boards_of(os.getpid())) == before


@linux
def test_a_hundred_ranks_find_each_other_in_a_group():
    """64 bits are not enough for the ranks of a large machine."""
    size = 100
    file = new_file(size)
    boards = [
        Board(one, b"t" * 16, range(size), rank)
        for one, rank in ((file, 0), (os.dup(file), size - 1))
    ]
    axis = SimpleNamespace(name="dp", size=size, index=0, ranks=tuple(range(size)), channel=0)
    groups = [board.group(axis) for board in boards]
    key = groups[0].key
    assert boards[0].common(size - 1) == {key}
    groups[1].lane.post(1, "a call")
    assert boards[0]._lanes[0].missing(key, 1, boards[0]._lanes) == [*range(size - 1)]
    with pytest.raises(MachineError, match=f"{MOST + 1} ranks on one machine are more than {MOST}"):
        Lanes(boards[0].page).make(b"another", range(MOST + 1))
