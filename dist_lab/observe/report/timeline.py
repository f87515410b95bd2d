"""The timeline in a report: what every rank did and when, drawn by timeline.js, and its tables.

All times of the page are whole microseconds, and segments follow each other without a gap. So a
segment is its length, and a few numbers: the page of a run stays small.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from dist_lab.observe.report.charts import bar, legend
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Html,
    Section,
    number,
    section,
    table,
    tag,
)
from dist_lab.observe.report.page import source
from dist_lab.observe.report.units import of_bytes, of_ms, percent
from dist_lab.observe.timeline.timeline import KINDS, RankTimeline, Timeline, in_words

MOST_SPANS = 5000  # segments and collectives on a page; of more, the first steps are drawn
BUTTONS = (
    ("out", "-", "zoom out"), ("in", "+", "zoom in"), ("left", "←", "earlier"),
    ("right", "→", "later"), ("whole", "all", "show all of it"),
    ("before", "← span", "previous span of this rank"),
    ("after", "span →", "next span of this rank"),
)  # fmt: skip
KEYS = (
    "Drag to move; hold Ctrl and turn the wheel to zoom. Keys: + and - zoom, ← and → move, ↑ and ↓ "
    "choose a rank, comma and point go from span to span, 0 shows all. Below the bar of a rank are "
    "its collectives in flight."
)


def timeline_of(timeline: Timeline) -> Section:
    """The chart of all ranks, and the tables of exposed communication and of each rank's time."""
    steps = drawn_steps(timeline)
    used = {segment.kind for rank in timeline.ranks for segment in rank.segments}
    kinds = [(kind, f"k-{kind}") for kind in KINDS if kind in used]
    buttons = [
        tag("button", text, type="button", data_do=do, aria_label=label)
        for do, text, label in BUTTONS
    ]
    buttons += [
        tag("button", f"step {n}", type="button", data_step=n, aria_label=f"zoom to step {n}")
        for n in steps
    ]
    names = [tag("span", f"rank {rank.rank}", tag("small", rank.place)) for rank in timeline.ranks]
    about = "timeline; use the arrow keys, + and -"
    canvas = tag("canvas", tabindex=0, role="img", aria_label=about)
    content = json.dumps(as_data(timeline, steps), separators=(",", ":")).replace("<", "\\u003c")
    cut = f" There are more than {MOST_SPANS} spans: only {in_words(steps)} can be seen here."
    lead = (
        f"{timeline}. Waiting: all ranks of the collective have started it, and bytes travel. "
        f"Idle: another rank has not started it.{cut if len(steps) < len(timeline.steps) else ''} "
        "timeline.json has all of it, also for ui.perfetto.dev."
    )
    lanes = tag("div", tag("div", *names, class_="names", aria_hidden="true"), canvas)
    chart = tag(
        "figure", tag("div", *buttons, class_="controls", role="group", aria_label="timeline"),
        lanes, tag("p", "Choose a span.", class_="span-info", aria_live="polite"),
        tag("p", KEYS, class_="lead"), tag("script", Html(content), type="application/json"),
        class_="timeline",
    )  # fmt: skip
    return section(
        "timeline", "Timeline", legend(kinds), chart, exposed_table(timeline), time_table(timeline),
        tag("script", source("timeline.js")), lead=lead,
    )  # fmt: skip


def drawn_steps(timeline: Timeline) -> Sequence[int]:
    """The first steps that have together at most MOST_SPANS spans, and at least one."""
    counts = Counter[int]()
    for rank in timeline.ranks:
        for call in rank.calls:
            counts[call.step] += 1
        for step, own in by_step(rank):
            counts[step] += len(own)
    sums = accumulate(counts[step] for step in timeline.steps)
    most = sum(total <= MOST_SPANS for total in sums)
    return timeline.steps[: max(most, 1)]


def by_step(rank: RankTimeline) -> Iterator[tuple[int, list[Any]]]:
    """Yields each step of a rank with its segments."""
    segments, i = rank.segments, 0
    for span in rank.steps:
        first = i
        while i < len(segments) and segments[i].start < span.end:
            i += 1
        yield span.step, list(segments[first:i])


def as_data(timeline: Timeline, steps: Sequence[int]) -> dict[str, Any]:
    """What timeline.js draws. Texts are in one list, and a row has their numbers."""
    texts: dict[str, int] = {}

    def text(words: str) -> int:
        return texts.setdefault(words, len(texts))

    ranks = []
    for rank in timeline.ranks:
        segments = [s for step, own in by_step(rank) if step in steps for s in own]
        calls = [call for call in rank.calls if call.step in steps]
        ranks.append({
            "rank": rank.rank, "place": rank.place, "start": _us(segments[0].start),
            "steps": [[s.step, _us(s.start), _us(s.end)] for s in rank.steps if s.step in steps],
            "segments": [
                [
                    _us(s.end) - _us(s.start), KINDS.index(s.kind),
                    text(_words(s.phase, s.unit)),
                    -1 if s.call is None or s.call >= len(calls) else s.call,
                ]
                for s in segments
            ],
            "calls": [
                [
                    _us(c.start), _us(c.end) - _us(c.start), _us(c.exposed), _us(c.hidden),
                    text(f"{c.op} over {c.axis}, {_words(c.phase, c.unit)}, {c.algorithm}"),
                    c.payload, c.sent, -1 if c.late is None else c.late,
                ]
                for c in calls
            ],
        })  # fmt: skip
    return {"kinds": KINDS, "texts": list(texts), "ranks": ranks}


def exposed_table(timeline: Timeline) -> Html:
    """How much of each collective's time in flight was covered by computation."""
    ranks, steps = len(timeline.ranks), len(timeline.steps)
    sums: dict[tuple[str, str], list[float]] = {}
    for rank in timeline.ranks:
        for call in rank.calls_of_steps():
            total = sums.setdefault((call.axis, call.op), [0.0] * 4)
            for i, value in enumerate((1, call.sent, call.exposed / 1e6, call.hidden / 1e6)):
                total[i] += value / ranks / steps
    most = max((exposed + hidden for *_, exposed, hidden in sums.values()), default=0.0) or 1.0
    rows: list[list[Content | Cell]] = [
        [
            axis, op, bar([(exposed, "waiting"), (hidden, "work")], most),
            number(f"{calls:g}", calls), number(of_bytes(sent), sent),
            number(of_ms(exposed), exposed), number(of_ms(hidden), hidden),
            number(percent(hidden / (exposed + hidden or 1)), hidden / (exposed + hidden or 1)),
        ]
        for (axis, op), (calls, sent, exposed, hidden) in sorted(sums.items())
    ]  # fmt: skip
    if not rows:
        return tag("p", "No collective ran that can be seen here.")
    head = ["axis", "collective", "", "calls", "sent", "exposed", "hidden", "share hidden"]
    caption = (
        "exposed and hidden communication: a rank's mean in one step, without validation and "
        "checkpoints" + (", of our own calls alone" if timeline.about.get("library") else "")
    )
    return table(caption, head, rows)


def time_table(timeline: Timeline) -> Html:
    """Each rank's time by kind. The kinds add up to the wall time."""
    shares = [rank.share() for rank in timeline.ranks]
    kinds = [kind for kind in KINDS if any(share[kind] for share in shares)]
    most = max(sum(share.values()) for share in shares)
    rows: list[list[Content | Cell]] = [
        [
            Cell(f"rank {rank.rank}", rank.rank),
            bar([(share[kind], f"k-{kind}") for kind in kinds], most),
            number(of_ms(1e3 * sum(share.values())), sum(share.values())),
            *(number(of_ms(1e3 * share[kind]), share[kind]) for kind in kinds),
        ]
        for rank, share in zip(timeline.ranks, shares, strict=True)
    ]  # fmt: skip
    return table("time of each rank, by kind", ["rank", "", "all", *kinds], rows)


def _us(nanoseconds: int) -> int:
    return round(nanoseconds / 1000)


def _words(*parts: str) -> str:
    return " ".join(filter(None, parts))
