"""Print the report: tables of speed, communication and memory, and notes below them."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from dist_lab.observe.console import empty_table, wide_console
from dist_lab.observe.flops import in_percent, why_no_mfu
from dist_lab.observe.memory import KINDS
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.compare.ratios import Ratio
from dist_lab.programs.compare.report import IN_MEMORY, CompareReport, ContenderRow

PADDING = (0, 1, 0, 0)  # narrow cells, because the tables are wide
COLOR = {"faster": "green", "slower": "red", "too noisy to tell": "yellow"}


def show(report: CompareReport, folder: Path) -> None:
    """Print the tables, the notes, and the result in one line."""
    console = wide_console()
    console.print(speed(report))
    console.print(cost(report))
    console.print(memory(report))
    for line in notes(report):
        console.print(line, highlight=False, soft_wrap=not console.is_terminal, markup=False)
    results = "; ".join(filter(None, [verdicts(report), losses(report), f"files in {folder}"]))
    console.print(results, highlight=False, soft_wrap=True)


def verdicts(report: CompareReport) -> str:
    """The result in one line: which strategies are faster or slower than the reference."""
    by_verdict: dict[str, list[str]] = {}
    for row in report.rows:
        ratio = report.ratio(row)
        if ratio:
            times = f" ({ratio.median:.2f} x)" if ratio.verdict in ("faster", "slower") else ""
            by_verdict.setdefault(ratio.verdict, []).append(row.label + times)
    parts = [f"{verdict}: {', '.join(labels)}" for verdict, labels in by_verdict.items()]
    return f"compared with {report.reference}: {'; '.join(parts) or 'nothing else ran'}"


def losses(report: CompareReport) -> str:
    """Whether all final losses are equal to rounding; "" if there is one strategy only."""
    if len(report.rows) < 2:
        return ""
    unlike = [row.label for row in report.rows if report.loss_error(row) > report.tolerance]
    return f"other final losses: {', '.join(unlike)}" if unlike else "equal final losses"


def speed(report: CompareReport) -> Table:
    """The table of step times and of ratios to the reference."""
    config = report.setting["config"]
    table = empty_table(
        ["strategy", "step ms (quartiles)", f"x {report.reference} (99% interval)", "verdict"],
        [report.unit, "MFU", "waiting ms"],
        title=f"{config['model']} {report.setting['parameters'] / 1e6:.1f}M in {config['dtype']}, "
        f"{report.batch:,} {report.unit.removesuffix('/s')} a step, on "
        f"{report.setting['world_size']} ranks x {report.setting['threads']} threads "
        f"({report.setting['cores']} cores)",
        padding=PADDING,
    )
    for row in report.rows:
        ratio, blocked = report.ratio(row), row.blocked_seconds
        table.add_row(
            row.label,
            f"{ms(row.seconds.median)} ({ms(row.seconds.low)} - {ms(row.seconds.high)})",
            as_text(ratio) if ratio else "1",
            f"[{COLOR[ratio.verdict]}]{ratio.verdict}" if ratio else "reference",
            f"{report.throughput(row).median:,.0f}",
            in_percent(report.mfu(row)),
            "-" if blocked is None else ms(blocked),
        )
    for label in report.refused:
        table.add_row(label, "refused")
    return table


def cost(report: CompareReport) -> Table:
    """The table of the bytes that each strategy sends per step, and of its final loss."""
    table = empty_table(
        ["strategy", "a step of a rank"],
        ["calls", "payload MB", "sent MB", "formula MB", "kernel MB", "final loss"],
        padding=PADDING,
    )
    for row in report.rows:
        kernel = "-" if row.kernel_bytes is None else mb(row.kernel_bytes)
        first, *more = traffic_lines(row)
        table.add_row(row.label, *first, kernel, loss(report, row))
        for line in more:
            table.add_row("", *line)
    return table


def memory(report: CompareReport) -> Table:
    """The table of memory by kind, at the peak of the rank that needs most."""
    kinds = [kind for kind in KINDS if any(row.peak_memory["at_peak"][kind] for row in report.rows)]
    columns = ["peak MB", *(kind.replace("_", " ") for kind in kinds)]
    table = empty_table(["strategy"], columns, padding=PADDING)
    for row in report.rows:
        by_kind = [mb(row.peak_memory["at_peak"][kind]) for kind in kinds]
        table.add_row(row.label, mb(row.peak_memory_bytes), *by_kind)
    return table


def traffic_lines(row: ContenderRow) -> Iterator[list[str]]:
    """Yields the cells of each collective: name, calls, and bytes in MB."""
    if row.traffic is None:
        yield ["not counted here", "-", "-", "-", "-"]
    elif not row.traffic:
        yield ["nothing", "0", "0", "0", "0"]
    for traffic in row.traffic or []:
        numbers = [mb(traffic.payload), mb(traffic.sent), mb(traffic.formula)]
        yield [traffic.collective, f"{traffic.calls:g}", *numbers]


def notes(report: CompareReport) -> Iterator[str]:
    """Yields the notes below the tables."""
    config, rounds = report.setting["config"], len(report.rows[0].rounds)
    yield (
        f"{rounds} rounds of {config['steps']} steps each, in changing order; step ms: the median "
        f"over rounds; x {report.reference}: throughput relative to {report.reference}'s, per round"
    )
    for row in report.rows:
        if " x " in row.mix:
            yield f"{row.label}: {row.mix} on {mesh_in_words(row.mesh)}"
        if row.processes < report.setting["world_size"]:
            yield f"{row.label}: the whole batch on rank 0 alone; the other ranks wait"
        if row.about:
            yield f"{row.label}: {row.about}"
    for label, reason in report.refused.items():
        yield f"{label}: refused: {reason}"
    if any(IN_MEMORY in traffic.collective for row in report.rows for traffic in row.traffic or []):
        yield f"{IN_MEMORY}: through memory that the ranks share; the kernel does not count it"
    if any(row.traffic is None for row in report.rows):
        yield "not counted here: a library's own collectives; the kernel counts their bytes"
    if config["model"] == "resnet18" and not config["sync_batchnorm"]:
        yield "resnet18 normalizes by each rank's samples: losses depend on the number of ranks"
    yield "MFU: relative to the peak FLOP/s of all ranks together"
    for row in report.rows:
        if report.mfu(row) is None:
            yield f"{row.label}: no MFU, because {why_no_mfu(row.about)}"
    worst = max(report.rows, key=report.loss_error)
    if len(report.rows) > 1:
        equal = report.loss_error(worst) <= report.tolerance
        yield (
            f"final losses after {len(worst.losses)} steps each "
            f"{'are equal' if equal else 'differ'}: {worst.label}'s is the furthest from "
            f"{report.reference}'s, relative difference {report.loss_error(worst):.1e} "
            f"(tolerance {report.tolerance:.0e}, {config['dtype']})"
        )


def loss(report: CompareReport, row: ContenderRow) -> str:
    equal = report.loss_error(row) <= report.tolerance
    return f"{row.losses[-1]:.5g} {'[green]equal' if equal else '[red]differs'}"


def as_text(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} - {ratio.high:.3f})"  # spaces allow a line break


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def mb(number: float) -> str:
    return f"{number / 1e6:.2f}" if number >= 1e4 or not number else f"{number / 1e6:.6f}"
