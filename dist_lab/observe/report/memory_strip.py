"""Memory over one step, as a strip: the live bytes of each kind at every event, and the peak."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.observe.report.charts import SIZE, Scale, legend, plot
from dist_lab.observe.report.cost import words
from dist_lab.observe.report.markup import Cell, Content, Html, figure, join, number, table, tag
from dist_lab.observe.report.units import of_bytes, plural


def over_time(memory: Mapping[str, Any], predicted: Mapping[str, Any] | None = None) -> Html:
    """The strip of the rank with the highest peak, what is alive there, and all ranks' peaks.

    Args:
        predicted: by explain; the total of the same rank is drawn over the strip.
    """
    ranks = memory["ranks"]
    fullest = max(ranks, key=lambda entry: entry["peak"]["total"])
    kinds = [kind for kind in memory["kinds"] if any(fullest["bytes"][kind])]
    peak = fullest["peak"]
    title = (
        f"rank {fullest['rank']}, step {fullest['step']}: {of_bytes(peak['total'])} at the peak, "
        f"{running_at(fullest, peak['at'])}"
    )
    same = [e for e in (predicted or {"ranks": []})["ranks"] if e["rank"] == fullest["rank"]]
    highest = max(entry["peak"]["total"] for entry in [fullest, *same])
    last = max(entry["changes"] for entry in [fullest, *same])
    x, y = Scale(0, max(last, 1)), Scale(0.0, 1.05 * highest / 1e6)
    chart = plot(
        [], x, y, title=title, x_label="allocations and frees since the step began", y_label="MB",
        extra=join([
            areas(fullest, kinds, x, y), peak_line(peak["at"], x),
            *(outline(entry, x, y) for entry in same),
        ]),
    )  # fmt: skip
    keys = [(words(kind), kind) for kind in kinds]
    return join([
        tag("h3", "Memory over a step"),
        figure(title, legend(keys + [("predicted, dashed", "predicted")] * len(same)), chart),
        *(tag("p", beside(entry["peak"]["total"], peak["total"])) for entry in same),
        alive(fullest), peaks(ranks, kinds) if len(ranks) > 1 else None,
    ])  # fmt: skip


def outline(entry: Mapping[str, Any], x: Scale, y: Scale) -> Html:
    """The total of all kinds as a dashed line."""
    totals = [sum(sizes) / 1e6 for sizes in zip(*entry["bytes"].values(), strict=True)]
    points = _edge([*entry["at"], entry["changes"]], [*totals, totals[-1]], x, y)
    return tag("path", d=f"M{'L'.join(points)}", class_="line dash predicted")


def beside(predicted: int, measured: int) -> str:
    """
    >>> beside(100, 100), beside(110, 100)
    ('The peak is what explain predicts.', 'explain predicts a peak of 110 B, 10.0% more.')
    """
    if predicted == measured:
        return "The peak is what explain predicts."
    more = predicted / max(measured, 1) - 1
    by = f"{abs(more):.1%} {'more' if more > 0 else 'less'}"
    return f"explain predicts a peak of {of_bytes(predicted)}, {by}."


def areas(entry: Mapping[str, Any], kinds: Sequence[str], x: Scale, y: Scale) -> Html:
    """Areas in the colors of their kinds, each on top of the one before."""
    ats = [*entry["at"], entry["changes"]]
    lower = [0.0] * len(ats)
    paths = []
    for kind in kinds:
        values = entry["bytes"][kind]
        upper = [a + b / 1e6 for a, b in zip(lower, [*values, values[-1]], strict=True)]
        forth, back = (_edge(ats, heights, x, y) for heights in (upper, lower))
        paths.append(tag("path", d=f"M{'L'.join(forth)}L{'L'.join(reversed(back))}z",
                         class_=f"fill {kind}"))  # fmt: skip
        lower = upper
    return join(paths)


def _edge(ats: Sequence[int], heights: Sequence[float], x: Scale, y: Scale) -> list[str]:
    """The points of an edge; those in the middle of a level part are left out."""
    kept = [
        i for i in range(len(ats))
        if i in (0, len(ats) - 1) or not heights[i - 1] == heights[i] == heights[i + 1]
    ]  # fmt: skip
    return [f"{SIZE * x.at(ats[i]):.0f} {SIZE - SIZE * y.at(heights[i]):.0f}" for i in kept]


def peak_line(at: int, x: Scale) -> Html:
    return tag("path", d=f"M{SIZE * x.at(at):.0f} 0v{SIZE}", class_="cursor")


def running_at(entry: Mapping[str, Any], at: int) -> str:
    """What ran at a position: "in backward of model.layers.1"."""
    running = [(phase, unit) for start, phase, unit in entry["phases"] if start <= at]
    phase, unit = running[-1] if running else ("", "")
    return f"in {phase or 'the step'}" + (f" of {unit}" if unit else "")


def alive(entry: Mapping[str, Any]) -> Html:
    """The table of what is alive at the peak."""
    rows: list[list[Content | Cell]] = [
        [
            each["of"] or "-", each["kind"].replace("_", " ") or "-", each["when"] or "-",
            number(str(each["tensors"]), each["tensors"]),
            number(of_bytes(each["bytes"]), each["bytes"]),
        ]
        for each in entry["peak"]["alive"]
    ]  # fmt: skip
    head = ["whose", "kind", "created in", "tensors", "bytes"]
    whole = table(f"alive at the peak of rank {entry['rank']}", head, rows)
    return tag("details", tag("summary", "what is alive at the peak"), whole)


def peaks(ranks: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Html:
    rows: list[list[Content | Cell]] = [
        [
            Cell(f"rank {entry['rank']}", entry["rank"]), entry["place"] or "-",
            number(of_bytes(entry["peak"]["total"]), entry["peak"]["total"]),
            *(number(of_bytes(by_kind[kind]), by_kind[kind]) for kind in kinds),
        ]
        for entry in ranks
        for by_kind in [entry["peak"]["by_kind"]]
    ]  # fmt: skip
    head = ["rank", "place", "peak", *map(words, kinds)]
    whole = table("bytes at the peak of each rank", head, rows)
    return tag("details", tag("summary", f"the peaks of all {plural(len(ranks), 'rank')}"), whole)
