"""The numbers of a race as tables, files and a picture."""

from collections import abc
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from dist_lab.observe import export
from dist_lab.observe.console import empty_table, wide_console
from dist_lab.programs.serve_compare.replay import Replay
from dist_lab.programs.serve_compare.results import Result

FULL, EMPTY, FREE = "#0f3565", "#dd6a1b", "#eeeeee"


def report(
    results: abc.Sequence[Result], replays: abc.Mapping[str, Replay],
    run_info: abc.Mapping[str, Any], folder: Path | None,
) -> None:  # fmt: skip
    """Print the tables, and write serve_compare.json, .csv and .png if there is a folder."""
    console = wide_console()
    for clock in dict.fromkeys(r.clock for r in results):
        console.print(times_table([r for r in results if r.clock == clock], title(run_info, clock)))
    console.print(machine_table([r for r in results if r.clock == "virtual"]))
    others = [r for r in results if r.same is not None]
    texts = run_info["config"]["requests"]
    if others:
        different = [
            f"{r.policy} ({texts - r.same})" for r in others if r.same not in (None, texts)
        ]
        line = "all policies wrote the same texts"
        if different:
            line = f"texts differ by rounding, in so many requests: {', '.join(different)}"
        console.print(line, highlight=False, soft_wrap=True)
    if folder is None:
        return
    rows = [r.to_dict() for r in results]
    with export.writing(folder):
        picture_of = picture(replays, run_info)
        export.write(folder, "serve_compare", dict(run_info) | {"rows": rows}, rows, picture_of)
    console.print(
        f"wrote to {folder}: serve_compare.json, .csv, .png", highlight=False, soft_wrap=True
    )


def title(run_info: abc.Mapping[str, Any], clock: str) -> str:
    """The line above a table of times."""
    config = run_info["config"]
    a, b = 1e3 * run_info["a_seconds"], 1e3 * run_info["b_seconds"]
    costs = f", a step of n tokens takes {a:.2f} + {b:.3f} n ms" if clock == "virtual" else ""
    model = f"gpt of {run_info['parameters'] / 1e6:,.1f} M parameters"
    cache = f"{config['blocks']} blocks of {config['block_size']} tokens"
    return f"{config['requests']} requests, {model}, {cache}; {clock} clock{costs}"


def times_table(results: abc.Sequence[Result], title: str) -> Table:
    """What users notice."""
    table = empty_table(
        ["policy"],
        [
            "first token, ms",
            "95%",
            "per token, ms",
            "gap 99%",
            "seconds",
            "tokens/s",
            f"x {results[0].policy}",
        ],
        title=title,
    )
    for r in results:
        times = [1e3 * x for x in (r.first, r.first_p95, r.token, r.gap_p99)]
        first, late, token, gap = times
        table.add_row(
            r.policy, f"{first:,.0f}", f"{late:,.0f}", f"{token:.2f}", f"{gap:.2f}",
            f"{r.seconds:.2f}", f"{r.rate:,.0f}", f"{r.rate / results[0].rate:.2f}",
        )  # fmt: skip
    return table


def machine_table(results: abc.Sequence[Result]) -> Table:
    """What the machine does for it."""
    table = empty_table(
        ["policy"],
        [
            "steps", "mean", "largest", "computed", "generated", "preempted", "cached", "empty",
            "a sequence", "used",
        ],
        title="on the virtual clock: steps and their tokens; memory that is taken and empty",
    )  # fmt: skip
    for r in results:
        table.add_row(
            r.policy, f"{r.steps:,}", f"{r.mean_step:.1f}", f"{r.largest_step:,}",
            f"{r.computed:,}", f"{r.generated:,}", f"{r.preemptions:,}", f"{r.cached:,}",
            f"{r.empty:.0%}", f"{r.empty_each:.1f}", f"{r.fullest:.0%}",
        )  # fmt: skip
    return table


def picture(replays: abc.Mapping[str, Replay], run_info: abc.Mapping[str, Any]) -> Figure:
    """For each policy, over time: the tokens of each step, and what is in the memory."""
    size = run_info["config"]["block_size"]
    figure = Figure(figsize=(12, 1.7 * len(replays) + 0.8), dpi=130, layout="constrained")
    figure.suptitle(title(run_info, "virtual"), fontsize=10)
    axes = figure.subplots(len(replays), 2, sharex=True, squeeze=False)
    for (name, seen), (steps, memory) in zip(replays.items(), axes, strict=True):
        times = [step.time for step in seen.steps]
        counts = [step.counts for step in seen.steps]
        steps.fill_between(times, [c.tokens for c in counts], step="pre", color=FULL, linewidth=0)
        steps.set_ylabel(name)
        held = [c.used * size for c in counts]
        full = [places - c.empty for places, c in zip(held, counts, strict=True)]
        total = (counts[0].used + counts[0].free) * size
        memory.axhspan(0, total, color=FREE)
        memory.fill_between(times, held, step="pre", color=EMPTY, linewidth=0)
        memory.fill_between(times, full, step="pre", color=FULL, linewidth=0)
        memory.set_ylim(0, total)
    axes[0][0].set_title("tokens of a step", fontsize=9)
    axes[0][1].set_title(
        "places in memory: with a token (blue), taken and empty (orange), free (grey)", fontsize=9
    )
    for bottom in axes[-1]:
        bottom.set_xlabel("seconds on the virtual clock")
    return figure
