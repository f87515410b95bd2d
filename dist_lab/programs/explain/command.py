"""Explain a run before any rank is started: the ranks of the mesh, the layout of parameters, and
the collectives and the memory of a step.
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
from dist_lab.programs.explain.dry_run import DryRunResult, observe
from dist_lab.programs.explain.file import write
from dist_lab.programs.explain.settings import Explain


def explain(config: Explain, mesh: Mesh) -> int:
    """Print the rank grid, layouts, memory and one step's collectives of `config` on its mesh."""
    run = config.run()
    if config.impl != "hand":
        label = " x ".join(run.strategies)
        raise UserError(
            f"explain works with impl hand only, and {label}@{config.impl} is a "
            "library's (--impl); give --impl hand, or measure both with launch/compare.py"
        )
    size = math.prod((run.mesh or {}).values())
    axes, run = run.axes(size), run.fitted(size)
    folder = make_folder(config.out, "explain.json") if config.out else None
    console = wide_console()
    if "pp" in axes:
        show_schedule(console, run.pipeline(axes["pp"]), config.svg)
    with ExitStack() as cleanup:
        if math.prod(axes.values()) > 1:
            console.print(tables.rank_grid(axes))
            mesh = cleanup.enter_context(
                dry_run(axes, backend=config.backend, collectives=config.collectives)
            )
        result = observe(run, mesh)
        show(console, result)
        console.print(summary(result, axes), highlight=False, soft_wrap=True)
        if folder is not None:
            path = write(folder, result.job.strategies, result)
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 0


def summary(result: DryRunResult, axes: Mapping[str, int]) -> str:
    """The result in one line."""
    ranks, sent = math.prod(axes.values()), sum(call.sent for call in result.steady)
    traffic = "nothing is sent, and rank 0"
    if result.steady:
        traffic = f"rank 0 sends {sent / 1e6:,.2f} MB a step in {len(result.steady)} calls, and"
    peak = f"{result.peak.total / 1e6:,.1f} MB"
    return f"{ranks} rank{'s' * (ranks > 1)}: {traffic} holds {peak} at most"


def show(console: Console, result: DryRunResult) -> None:
    """Print the tables of layouts, memory and collectives."""
    console.print(tables.layout_table(result.job))
    console.print(tables.memory_table(result))
    first, steady = result.first, result.steady
    if not steady:
        return
    console.print(tables.calls_table("collectives of a step, in order; bytes", steady))
    console.print(tables.totals_table(steady))
    if [(c.op, c.payload) for c in first] != [(c.op, c.payload) for c in steady]:
        console.print(tables.calls_table("the first step, which differs; bytes", first))


def show_schedule(console: Console, schedule: Schedule, svg: str) -> None:
    """Print a schedule, its idle time and its activations; plot it if `svg` names a file."""
    console.print(
        f"{schedule.name}, one column per unit of time (F takes 1, B 2; or split: I 1, W 1); "
        f"{bubble(schedule):.1%} idle"
    )
    console.print(render(schedule), soft_wrap=True, highlight=False)
    peaks = ", ".join(map(str, peak_activations(schedule)))
    console.print(f"most forwards held at once, by rank: {peaks}", highlight=False)
    if svg:
        from dist_lab.observe import pipeline_plot  # here: matplotlib is slow to import

        pipeline_plot.write(pipeline_plot.ideal(schedule), svg)
        console.print(f"plotted in {svg}", highlight=False, soft_wrap=True)
