"""Segments and collectives from the events of two ranks, and the files that they are written to."""

import json

import pytest
from trace_format import check_trace

from dist_lab.errors import UserError
from dist_lab.observe.timeline import perfetto
from dist_lab.observe.timeline.spans import timeline_of
from dist_lab.observe.timeline.timeline import KINDS, Timeline

ABOUT = {"tool": "dist_lab", "format": 1, "strategies": "ddp@hand", "mesh": {"dp": 2}}
ABOUT |= {"world_size": 2, "library": ""}


def call(when, step, number, op="all_reduce", group=((0, 1), 0)):
    about = "float32[4], sum", 16, 16, "backward", "bucket 0", "backend", "ddp.py:7"
    return when, step, number, op, "dp", 2, *about, group


def record(rank, *, labels, calls=(), waits=(), ended):
    return {
        "rank": rank, "place": f"dp={rank}", "host": "here", "labels": labels,
        "calls": list(calls), "waits": list(waits), "ended": ended,
    }  # fmt: skip


def two_ranks():
    """Rank 1 computes until 6, then starts the collective that rank 0 has started at 3.

    Times are seconds. Rank 0 waits for it from 4, and both have the result at 7.
    """
    fast = record(
        0,
        labels=[(1, 3, "data", ""), (2, 3, "forward", "a"), (3, 3, "backward", "a"),
                (8, 4, "data", "")],
        calls=[call(3, 3, 40)], waits=[(0, 4, 7)], ended=9,
    )  # fmt: skip
    slow = record(
        1,
        labels=[(1, 3, "data", ""), (2, 3, "forward", "a"), (6, 3, "backward", "a"),
                (8, 4, "data", "")],
        calls=[call(6, 3, 17)], waits=[(0, 6, 7)], ended=9,
    )  # fmt: skip
    return timeline_of([fast, slow], ABOUT)


def in_seconds(rank):
    return [(s.kind, s.start / 1e9, s.end / 1e9) for s in rank.segments]


def test_a_rank_is_idle_until_the_last_one_starts_and_waits_for_the_data_after_that():
    fast, slow = two_ranks().ranks
    assert in_seconds(fast) == [
        ("data", 0, 1), ("forward", 1, 2), ("backward", 2, 3), ("idle", 3, 5), ("waiting", 5, 6),
        ("backward", 6, 7), ("data", 7, 8),
    ]  # fmt: skip
    assert in_seconds(slow)[2:5] == [("waiting", 5, 6), ("backward", 6, 7), ("data", 7, 8)]
    assert fast.calls[0].late == 1, "it waited for rank 1"
    assert slow.calls[0].late is None


def test_a_call_is_hidden_while_its_rank_computes_and_exposed_while_it_is_blocked():
    fast, slow = (rank.calls[0] for rank in two_ranks().ranks)
    assert (fast.hidden, fast.exposed) == (1e9, 3e9)
    assert (slow.hidden, slow.exposed) == (0, 1e9)
    assert two_ranks().exposed() == {"dp": 2.0}  # the mean over ranks
    assert two_ranks().hidden() == {"dp": 0.5}


def test_steps_and_segments_tile_the_recording():
    timeline = two_ranks()
    assert timeline.steps == range(3, 5)
    for rank in timeline.ranks:
        assert [(s.step, s.start, s.end) for s in rank.steps] == [(3, 0, 7e9), (4, 7e9, 8e9)]
        assert sum(rank.share().values()) == 8
        assert sum(rank.share(4).values()) == rank.share(4)["data"] == 1
    assert "steps 3 to 4: " in str(timeline)
    assert "by axis: dp 25%" in str(timeline)


def test_calls_match_by_their_group_and_their_place_in_it():
    labels = [(1, 3, "forward", "")]
    to, back = ((0, 1), 0), ((1, 0), 0)
    first = record(0, labels=labels, ended=9, calls=[
        call(1, 2, 40), call(2, 3, 41, "send", to), call(3, 3, 42, "recv", back)],
        waits=[(0, 1.5, 1.6), (2, 4, 8)])  # fmt: skip
    second = record(1, labels=labels, ended=9, calls=[
        call(5, 3, 7, "recv", to), call(7, 3, 8, "send", back)])  # fmt: skip
    rank = timeline_of([first, second], ABOUT).ranks[0]
    assert [c.late for c in rank.calls] == [None, 1, 1]
    assert [c.step for c in rank.calls] == [2, 3, 3], "the first is of a step before the recording"
    idle = [s for s in rank.segments if s.kind == "idle"]
    assert [(s.start, s.end, s.call) for s in idle] == [(3e9, 6e9, 2)]


def test_all_of_a_validation_is_one_phase():
    labels = [(1, 3, "loop", ""), (2, 3, "validation", ""), (3, 3, "forward", "a"),
              (4, 3, "validation", ""), (5, 3, "log", ""), (6, 3, "finish", "")]  # fmt: skip
    (rank,) = timeline_of([record(0, labels=labels, ended=7)], ABOUT).ranks
    assert [s.kind for s in rank.segments] == ["other", *["validation"] * 3, "other", "reduce"]
    assert {s.phase for s in rank.segments if s.kind == "validation"} == {"validation"}
    assert all(kind in KINDS for kind in rank.share())


def test_a_file_can_be_read_again_and_has_the_format_of_viewers(tmp_path):
    timeline, path = two_ranks(), tmp_path / "timeline.json"
    perfetto.write(timeline, path)
    assert Timeline.read(path) == timeline
    events = json.loads(path.read_text())["traceEvents"]
    assert check_trace({"traceEvents": events}) == {"M": 6, "X": 19, "b": 2, "e": 2}
    slices = [(e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events
              if e["ph"] == "X" and e["pid"] == 0]  # fmt: skip
    assert ("step 3", 0, 7) in slices
    assert ("backward", 2, 5) in slices, "the wait lies in it"
    assert ("idle for rank 1: all_reduce dp", 3, 2) in slices


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([{"ph": "X", "name": "a", "cat": "", "ts": 0.0, "pid": 0, "tid": 0}], "dur"),
        ([{"ph": "?"}], "unknown"),
        ([{"ph": "X", "name": "", "cat": "", "ts": t, "dur": 2.0, "pid": 0, "tid": 0}
          for t in (0.0, 1.0)], "overlap"),
        ([{"ph": "b", "name": "", "cat": "", "ts": 0.0, "id": "1", "pid": 0, "tid": 0}], "no end"),
    ],
)  # fmt: skip
def test_the_parser_of_the_format_refuses_what_a_viewer_cannot_show(events, message):
    with pytest.raises(ValueError, match=message):
        check_trace({"traceEvents": events})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not a timeline of dist_lab"),
        ('{"traceEvents": []}', "not a timeline of dist_lab"),
        ('{"otherData": {"tool": "chrome"}}', "not a timeline of dist_lab"),
        ('{"otherData": {"tool": "dist_lab", "format": 99}}', "of format 99, this version reads 1"),
        ('{"otherData": {"tool": "dist_lab", "format": 1, "texts": []}}', "or is damaged"),
    ],
)
def test_a_file_that_is_no_timeline_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "timeline.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        Timeline.read(path)
    assert "\n" not in str(refusal.value)
