"""Explain a run before any rank is started: the ranks of the mesh, the layout of parameters, and
the collectives and the memory of a step.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from rich.console import Console

from dist_lab.errors import UserError
from dist_lab.job import Job
from dist_lab.layout.layout import Layout
from dist_lab.mesh.mesh import Mesh, dry_run
from dist_lab.observe import rank_grid
from dist_lab.observe.console import wide_console
from dist_lab.observe.run_dir import make_folder
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.simulate import bubble, peak_activations, render
from dist_lab.programs.explain import all_ranks, tables
from dist_lab.programs.explain.classes import Runs, classes
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
    schedule = run.pipeline(axes["pp"]) if "pp" in axes else None
    if config.all_ranks:
        with console.status("") as status:  # shown if a person watches
            runs = Runs(run, axes, values=config.values, tell=status.update)
            found = classes(runs, schedule)
        show_lines(console, rank_grid.rank_picture(axes, config.rank))
        all_ranks.show(console, found, axes)
        if folder is not None:
            path = all_ranks.write(folder, runs, found)
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
        return 0
    several = math.prod(axes.values()) > 1
    with ExitStack() as cleanup:
        if several:
            dry = dry_run(axes, config.rank, backend=config.backend, collectives=config.collectives)
            mesh = cleanup.enter_context(dry)
        result = observe(run, mesh, values=config.values)
        parameter = None
        if config.parameter:  # before anything is printed: there may be no such parameter
            parameter = config.parameter, rank_grid.find(result.job.layouts, config.parameter)
        if schedule is not None:
            show_schedule(console, schedule)
        if several:
            show_lines(console, rank_grid.rank_picture(mesh.axes, mesh.rank))
        show(console, result)
        if parameter is not None:
            show_parameter(console, *parameter, result.job)
        if config.svg:
            plot(config.svg, mesh, parameter, schedule)
            console.print(f"plotted in {config.svg}", highlight=False, soft_wrap=True)
        console.print(summary(result, axes), highlight=False, soft_wrap=True)
        if folder is not None:
            path = write(folder, result.job.strategies, result)
            console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 0


def summary(result: DryRunResult, axes: Mapping[str, int]) -> str:
    """The result in one line."""
    size, sent = math.prod(axes.values()), sum(call.sent for call in result.steady)
    rank = result.job.mesh.rank
    traffic = f"nothing is sent; rank {rank}"
    if result.steady:
        traffic = f"rank {rank} sends {sent / 1e6:,.2f} MB a step in {len(result.steady)} calls,"
    work, peak = f"{result.operations / 1e9:,.2f} GFLOP", f"{result.peak.total / 1e6:,.1f} MB"
    return f"{size} rank{'s' * (size > 1)}: {traffic} computes {work}, and holds {peak} at most"


def show(console: Console, result: DryRunResult) -> None:
    """Print the tables of layouts, memory and collectives."""
    console.print(tables.layout_table(result.job))
    console.print(tables.memory_table(result))
    console.print(tables.alive_table(result))
    first, steady = result.first, result.steady
    if not steady:
        return
    console.print(tables.calls_table("collectives of a step, in order; bytes", steady))
    console.print(tables.totals_table(steady, result.job.mesh.rank))
    if [(c.op, c.payload) for c in first] != [(c.op, c.payload) for c in steady]:
        console.print(tables.calls_table("the first step, which differs; bytes", first))


def show_schedule(console: Console, schedule: Schedule) -> None:
    """Print a schedule, its idle time and its activations."""
    console.print(
        f"{schedule.name}, one column per unit of time (F takes 1, B 2; or split: I 1, W 1); "
        f"{bubble(schedule):.1%} idle"
    )
    console.print(render(schedule), soft_wrap=True, highlight=False)
    peaks = ", ".join(map(str, peak_activations(schedule)))
    console.print(f"most forwards held at once, by rank: {peaks}", highlight=False)


def show_parameter(console: Console, name: str, layout: Layout, job: Job) -> None:
    """Print a picture of a parameter, and the part of it that each rank holds."""
    flat = "the gradient and the optimizer state" if name in job.stepped else "the parameter"
    show_lines(console, rank_grid.parameter_lines(name, layout, job.mesh.axes, flat=flat))
    console.print(rank_grid.parameter_table(layout, job.mesh.axes))


def show_lines(console: Console, lines: Sequence[str]) -> None:
    """Print a picture. It is not wrapped, and [0] is not markup."""
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def plot(
    path: str, mesh: Mesh, parameter: tuple[str, Layout] | None, schedule: Schedule | None
) -> None:
    """Plot the ranks of the mesh, and a parameter's parts and a schedule if there are any."""
    from dist_lab.observe import pipeline_plot, rank_plot  # here: matplotlib is slow to import

    pipeline_plot.write(rank_plot.draw(mesh.axes, mesh.rank, parameter, schedule), path)
