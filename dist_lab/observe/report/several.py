"""The page of several runs: a sortable table, loss curves, and the settings that differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.observe.report.charts import Scale, Series, legend, plot
from dist_lab.observe.report.comparison import line_look
from dist_lab.observe.report.folder import Run
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Html,
    figure,
    items,
    number,
    section,
    table,
    tag,
)
from dist_lab.observe.report.page import page
from dist_lab.observe.report.settings import axes, in_text
from dist_lab.observe.report.units import digits, of_bytes, of_ms, percent, plural

MOST_CURVES = 24
# What two runs must have in common, for their numbers to be compared. Of the settings, or facts.
SAME_WORK = "model", "size", "layers", "batch", "seq", "dtype", "cores", "torch"
SAME_LOSS = (
    "model", "size", "layers", "data", "batch", "seq", "seed", "steps", "lr", "warmup", "optimizer",
    "weight_decay", "clip", "dropout", "dtype",
)  # fmt: skip
NOT_SETTINGS = "out", "config", "overwrite", "resume"


def page_of_runs(runs: Sequence[Run], left_out: Mapping[str, str]) -> str:
    """Returns the HTML page of several runs.

    Args:
        left_out: folder -> why it is not among them.
    """
    sections = [
        ("table", "Runs", all_runs(runs, left_out)),
        ("loss", "Loss", losses(runs)),
        ("compare", "Compared", comparable(runs)),
        ("settings", "Differences", differences(runs)),
    ]
    names = f"{runs[0].name} to {runs[-1].name}" if len(runs) > 1 else runs[0].name
    return page(plural(len(runs), "run"), names, sections)


def all_runs(runs: Sequence[Run], left_out: Mapping[str, str]) -> Html:
    """The table of the numbers of each run."""
    rows: list[list[Content | Cell]] = []
    for run in runs:
        summary, median = run.summary, run.summary["median"]
        unit = "tokens_per_s" if "tokens_per_s" in median else "samples_per_s"
        mfu, validation = summary["mfu"], summary["final_val_loss"]
        rows.append([
            tag("a", run.name, href=f"{run.name}/report.html"), summary["strategies"],
            axes(summary["mesh"]), number(f"{summary['steps']:,}", summary["steps"]),
            number(f"{digits(median[unit])} {unit.replace('_per_', '/')}", median[unit]),
            number(of_ms(median["step_ms"]), median["step_ms"]),
            "-" if mfu is None else number(percent(mfu), mfu),
            number(of_bytes(median["comm_sent_bytes"]), median["comm_sent_bytes"]),
            number(of_bytes(summary["peak_memory_bytes"]), summary["peak_memory_bytes"]),
            number(f"{summary['final_loss']:.4f}", summary["final_loss"]),
            "-" if validation is None else number(f"{validation:.4f}", validation),
        ])  # fmt: skip
    head = [
        "run", "strategies", "mesh", "steps", "throughput", "step", "MFU", "sent a step", "peak",
        "loss", "validation",
    ]  # fmt: skip
    notes = [f"left out: {why}" for why in left_out.values()]
    return section(
        "table", "Runs", table("a click on a heading sorts by it", head, rows, sortable=True),
        items(notes, "findings") if notes else None,
    )  # fmt: skip


def losses(runs: Sequence[Run]) -> Html:
    """The loss curves of all runs, one over another."""
    drawn = runs[:MOST_CURVES]
    lines = [
        Series(run.name, [r["step"] for r in run.rows], [r["loss"] for r in run.rows], line_look(i))
        for i, run in enumerate(drawn)
    ]
    xs, ys = [x for line in lines for x in line.xs], [y for line in lines for y in line.ys]
    title = f"loss by step of {plural(len(drawn), 'run')}"
    chart = plot(
        lines, Scale(0, max(xs)), Scale.around(ys), title=title, x_label="step", y_label="loss"
    )
    rows: list[list[Content | Cell]] = [
        [line.name, *(number(f"{loss:.4f}", loss) for loss in (line.ys[0], line.ys[-1]))]
        for line in lines
    ]  # fmt: skip
    whole = table("loss of each run", ["run", "first logged", "last"], rows)
    names = legend([(line.name, line.look) for line in lines])
    return section("loss", "Loss", figure(title, names, chart, details=whole))


def comparable(runs: Sequence[Run]) -> Html:
    """Whether each run's speed and loss can be compared with the first one's, or why not."""
    first, *others = runs
    rows: list[list[Content | Cell]] = [
        [run.name, _same(first, run, SAME_WORK), _same(first, run, SAME_LOSS)] for run in others
    ]
    lead = (
        f"Compared with {first.name}. Speeds can be compared if the work and the machine are the "
        "same, losses if the data, the seed and the schedule of the learning rate are as well. "
        "Only launch/compare.py runs strategies in turns, and so says what is certain."
    )
    head = ["run", "speed", "loss"]
    return section(
        "compare", "What can be compared", table("with the first run", head, rows), lead=lead
    )


def _same(first: Run, run: Run, names: Sequence[str]) -> Content:
    """Yes, or the facts in which two runs differ."""
    unlike = [
        f"{name} {in_text(a)} and {in_text(b)}"
        for name in names
        if (a := facts(first).get(name)) != (b := facts(run).get(name))
    ]
    return tag("span", f"no: {'; '.join(unlike)}", class_="off long") if unlike else "yes"


def differences(runs: Sequence[Run]) -> Html:
    """The settings in which the runs differ, a column for each."""
    every = [facts(run) for run in runs]
    names = [name for name in every[0] if len({repr(one.get(name)) for one in every}) > 1]
    head = ["run", *names]
    rows: list[list[Content | Cell]] = [
        [run.name, *("-" if one.get(n) is None else in_text(one[n]) for n in names)]
        for run, one in zip(runs, every, strict=True)
    ]  # fmt: skip
    if not names:
        return section("settings", "Differences of settings", tag("p", "All settings are equal."))
    whole = table("settings in which the runs differ", head, rows, sortable=True)
    return section("settings", "Differences of settings", whole)


def facts(run: Run) -> dict[str, Any]:
    """The settings of a run, and what else its numbers depend on."""
    summary = run.summary
    config = {n: value for n, value in summary["config"].items() if n not in NOT_SETTINGS}
    found = {"mesh": dict(summary["mesh"]), "ranks": summary["world_size"],
             "threads": summary["threads"], "cores": summary["cores"]}  # fmt: skip
    data = summary["data"]["sha256"] or summary["data"]["name"]
    return config | found | summary["versions"] | {"data": data}
