"""The page of several runs: a sortable table, loss curves, and the settings that differ."""

from collections.abc import Collection, Mapping, Sequence
from os.path import commonpath, relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dist_lab.observe.report.charts import Scale, Series, legend, plot
from dist_lab.observe.report.comparison import line_look
from dist_lab.observe.report.folder import REPORT, Run
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Section,
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

MOST_CURVES, MOST_NAMES = 24, 4
# Settings, and facts, in which runs may differ if their numbers are to be compared. Any other one,
# such as a setting that is new, is named as a reason not to.
HOW = (
    "strategy", "impl", "mesh", "nproc", "ranks", "threads", "microbatches", "bucket_mb",
    "reshard_after_forward", "keep_gathered", "prefetch", "offload", "defer_reduce",
    "sequence_parallel", "regather", "schedule", "chunks", "pp_balance", "collectives",
)  # fmt: skip
OF_NO_NUMBER = (
    "oversubscribe", "timeout", "debug", "download", "cache", "val_every", "log_every",
    "log_samples", "timeline", "profile", "about", "keep", "restarts", "python",
)  # fmt: skip
SPEED_MAY = {
    *HOW, *OF_NO_NUMBER, "reduce_dtype", "seed", "steps", "lr", "adamw_lr", "weight_decay",
    "warmup",
}  # fmt: skip
LOSS_MAY = {
    *HOW, *OF_NO_NUMBER, "backend", "threads in all", "cores", "emulate_compute", "recompute",
    "reduce_order", "log_collectives", "check_collectives", "sentinel", "save_every", "fault",
}  # fmt: skip
BATCHNORM = "resnet18"  # whose loss depends on which samples a rank has at a time
NOT_SETTINGS = "out", "config", "overwrite", "resume"


def page_of_runs(runs: Sequence[Run], left_out: Mapping[str, str], beside: Path) -> str:
    """Returns the HTML page of several runs.

    Args:
        left_out: folder -> why it is not among them.
        beside: the folder of the page, from which it links to the runs' own.
    """
    named = dict(zip(names_of(runs), runs, strict=True))
    sections = [
        all_runs(named, left_out, beside),
        losses(named),
        comparable(named),
        differences(named),
    ]
    names = ", ".join([*named][:MOST_NAMES]) + (", ..." if len(named) > MOST_NAMES else "")
    return page(plural(len(runs), "run"), f"in {names}", sections)


def names_of(runs: Sequence[Run]) -> list[str]:
    """The names of the runs' folders, which are different; if two are alike, their paths."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    folders = [run.folder.resolve() for run in runs]
    above = commonpath(folder.parent for folder in folders)
    return [str(folder.relative_to(above)) for folder in folders]


def all_runs(named: Mapping[str, Run], left_out: Mapping[str, str], beside: Path) -> Section:
    """The table of the numbers of each run."""
    rows: list[list[Content | Cell]] = []
    for name, run in named.items():
        summary, median = run.summary, run.summary["median"]
        unit = "tokens_per_s" if "tokens_per_s" in median else "samples_per_s"
        mfu, validation = summary["mfu"], summary["final_val_loss"]
        sent, known = median["comm_sent_bytes"], summary["traffic"] is not None
        link = quote(relpath(run.folder.resolve() / REPORT, beside.resolve()))
        rows.append([
            tag("a", name, href=link), summary["strategies"],
            axes(summary["mesh"]), number(f"{summary['steps']:,}", summary["steps"]),
            number(f"{digits(median[unit])} {unit.replace('_per_', '/')}", median[unit]),
            number(of_ms(median["step_ms"]), median["step_ms"]),
            "-" if mfu is None else number(percent(mfu), mfu),
            number(of_bytes(sent), sent) if known else "-",
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


def losses(named: Mapping[str, Run]) -> Section:
    """The loss curves of all runs, one over another."""
    drawn = [*named.items()][:MOST_CURVES]
    lines = [
        Series(name, [r["step"] for r in run.rows], [r["loss"] for r in run.rows], line_look(i))
        for i, (name, run) in enumerate(drawn)
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


def comparable(named: Mapping[str, Run]) -> Section:
    """Whether each run's speed and loss can be compared with the first one's, or why not."""
    first, *others = named
    rows: list[list[Content | Cell]] = [
        [
            name,
            same(named[first], named[name], SPEED_MAY),
            same(named[first], named[name], loss_may(named[name])),
        ]
        for name in others
    ]
    lead = (
        f"Compared with {first}. Speeds can be compared if the work and the machine are the "
        "same, losses if the data, the seed and the schedule of the learning rate are as well. "
        "Only launch/compare.py runs strategies in turns, and so says what is certain."
    )
    head = ["run", "speed", "loss"]
    return section(
        "compare", "What can be compared", table("with the first run", head, rows), lead=lead
    )


def loss_may(run: Run) -> Collection[str]:
    """The facts in which another run may differ, if its loss is to be compared with this one's."""
    alone = run.summary["config"]["model"] == BATCHNORM
    return LOSS_MAY - {"mesh", "microbatches"} if alone else LOSS_MAY


def same(first: Run, run: Run, may: Collection[str]) -> Content:
    """Yes, or the facts in which two runs differ. `may`: those in which they may."""
    one, other = facts(first), facts(run)
    unlike = [
        f"{name} {shown(one.get(name))} and {shown(other.get(name))}"
        for name in {**one, **other}
        if name not in may and one.get(name) != other.get(name)
    ]
    return tag("span", f"no: {'; '.join(unlike)}", class_="off long") if unlike else "yes"


def shown(value: Any) -> str:
    return "-" if value is None else in_text(value)


def differences(named: Mapping[str, Run]) -> Section:
    """The settings in which the runs differ, a column for each."""
    every = [facts(run) for run in named.values()]
    names = [name for name in every[0] if len({repr(one.get(name)) for one in every}) > 1]
    head = ["run", *names]
    rows: list[list[Content | Cell]] = [
        [run, *(shown(one.get(name)) for name in names)]
        for run, one in zip(named, every, strict=True)
    ]  # fmt: skip
    if not names:
        return section("settings", "Differences of settings", tag("p", "All settings are equal."))
    whole = table("settings in which the runs differ", head, rows, sortable=True)
    return section("settings", "Differences of settings", whole)


def facts(run: Run) -> dict[str, Any]:
    """The settings of a run, and what else its numbers depend on."""
    summary = run.summary
    config = {n: value for n, value in summary["config"].items() if n not in NOT_SETTINGS}
    ranks, threads = summary["world_size"], summary["threads"]
    found = {"mesh": dict(summary["mesh"]), "ranks": ranks, "threads": threads,
             "threads in all": ranks * threads, "cores": summary["cores"]}  # fmt: skip
    data = summary["data"]["sha256"][:12] or summary["data"]["name"]
    return config | found | summary["versions"] | {"data": data}
