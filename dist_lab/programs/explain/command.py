"""Explain a strategy before any rank is started: which rank stands where, what lies where, what is
sent, and how much memory it takes.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh, dry_run
from dist_lab.observe.console import wide_console
from dist_lab.observe.run_dir import make_folder
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.simulate import bubble, peak_activations, render
from dist_lab.programs.explain import tables
from dist_lab.programs.explain.dry_run import Seen, observe
from dist_lab.programs.explain.file import write
from dist_lab.programs.explain.settings import Explain


def explain(config: Explain, mesh: Mesh) -> int:
    """Print rank grid, layout, memory and one step's traffic of `config` on its mesh."""
    if config.impl != "hand":
        raise UserError(
            f"explain runs what is written here, {config.strategy}@{config.impl} is a library's "
            "(--impl); give --impl hand, or measure both by launch/compare.py"
        )
    run = config.run()
    size = math.prod((run.mesh or {}).values())
    axes, run = run.axes(size), run.fitted(size)
    folder = make_folder(config.out, "explain.json") if config.out else None
    console = wide_console()
    if config.strategy == "pp":
        show_schedule(console, run.pipeline(axes["pp"]), config.svg)
    with ExitStack() as held:
        if math.prod(axes.values()) > 1:
            console.print(tables.rank_grid(axes))
            mesh = held.enter_context(
                dry_run(axes, backend=config.backend, collectives=config.collectives)
            )
        seen = observe(run, mesh)
        show(console, seen)
        console.print(in_a_line(seen, axes), highlight=False, soft_wrap=True)
        if folder is not None:
            path = write(folder, f"{config.strategy}@{config.impl}", seen)
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 0


def in_a_line(seen: Seen, axes: Mapping[str, int]) -> str:
    """What was found."""
    ranks, sent = math.prod(axes.values()), sum(call.sent for call in seen.steady)
    what = "nothing is sent, and rank 0"
    if seen.steady:
        what = f"rank 0 sends {sent / 1e6:,.2f} MB a step in {len(seen.steady)} calls, and"
    return f"{ranks} rank{'s' * (ranks > 1)}: {what} holds {seen.peak.total / 1e6:,.1f} MB at most"


def show(console: Console, seen: Seen) -> None:
    """The tables of what was seen."""
    console.print(tables.layout_table(seen.job))
    console.print(tables.memory_table(seen))
    first, steady = seen.first, seen.steady
    if not steady:
        return
    console.print(tables.calls_table("collectives of a step, in order; bytes", steady))
    console.print(tables.totals_table(steady))
    if [(c.op, c.payload) for c in first] != [(c.op, c.payload) for c in steady]:
        console.print(tables.calls_table("the first step, which differs; bytes", first))


def show_schedule(console: Console, schedule: Schedule, svg: str) -> None:
    """The grid, idle time and activations of a schedule; drawn, too, if `svg` names a file."""
    console.print(
        f"{schedule.name}, one column a unit: F 1, B 2, or I 1 and W 1; {bubble(schedule):.1%} idle"
    )
    console.print(render(schedule), soft_wrap=True, highlight=False)
    held = ", ".join(map(str, peak_activations(schedule)))
    console.print(f"forwards that each rank holds at once, at most: {held}", highlight=False)
    if svg:
        from dist_lab.observe import pipeline_plot  # here: matplotlib is slow to import

        pipeline_plot.write(pipeline_plot.ideal(schedule), svg)
        console.print(f"drawn in {svg}", highlight=False, soft_wrap=True)
