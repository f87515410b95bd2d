"""A report for a person: a table of speed, one of what it cost, and what they need beside them."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from dist_lab.observe.console import empty_table, wide_console
from dist_lab.observe.flops import in_percent
from dist_lab.observe.memory import KINDS
from dist_lab.programs.compare.ratios import Ratio
from dist_lab.programs.compare.report import IN_MEMORY, CompareReport, ContenderRow

PADDING = (0, 1, 0, 0)  # of cells: narrow, for wide tables
COLOR = {"faster": "green", "slower": "red", "too noisy to tell": "yellow"}


def show(report: CompareReport, folder: Path) -> None:
    console = wide_console()
    console.print(speed(report))
    console.print(cost(report))
    console.print(memory(report))
    for line in notes(report):
        console.print(line, highlight=False, soft_wrap=not console.is_terminal, markup=False)
    console.print(f"{found(report)}; in {folder}", highlight=False, soft_wrap=True)


def found(report: CompareReport) -> str:
    """What was found, in a line: who is certainly faster than the reference, and who is not."""
    by_verdict: dict[str, list[str]] = {}
    for row in report.rows:
        ratio = report.ratio(row)
        if ratio:
            times = f" ({ratio.median:.2f} x)" if ratio.verdict in ("faster", "slower") else ""
            by_verdict.setdefault(ratio.verdict, []).append(row.label + times)
    said = [f"{verdict}: {', '.join(labels)}" for verdict, labels in by_verdict.items()]
    return f"beside {report.reference} {'; '.join(said) or 'nothing else ran'}"


def speed(report: CompareReport) -> Table:
    """Which is faster."""
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
        found, blocked = report.ratio(row), row.blocked_seconds
        table.add_row(
            row.label,
            f"{ms(row.seconds.median)} ({ms(row.seconds.low)} - {ms(row.seconds.high)})",
            as_text(found) if found else "1",
            f"[{COLOR[found.verdict]}]{found.verdict}" if found else "reference",
            f"{report.throughput(row).median:,.0f}",
            in_percent(report.mfu(row)),
            "-" if blocked is None else ms(blocked),
        )
    for label in report.refused:
        table.add_row(label, "refused")
    return table


def cost(report: CompareReport) -> Table:
    """What each sent and held, and where it ended."""
    table = empty_table(
        ["strategy", "a step of a rank"],
        ["calls", "payload MB", "sent MB", "formula MB", "kernel MB", "final loss"],
        padding=PADDING,
    )
    for row in report.rows:
        kernel = "-" if row.kernel_bytes is None else mb(row.kernel_bytes)
        first, *others = traffic_lines(row)
        table.add_row(row.label, *first, kernel, loss(report, row))
        for line in others:
            table.add_row("", *line)
    return table


def memory(report: CompareReport) -> Table:
    """Of the rank that needs most, at that moment of a step, by what it is for."""
    kinds = [kind for kind in KINDS if any(row.peak_memory["at_peak"][kind] for row in report.rows)]
    columns = ["peak MB", *(kind.replace("_", " ") for kind in kinds)]
    table = empty_table(["strategy"], columns, padding=PADDING)
    for row in report.rows:
        parts = [mb(row.peak_memory["at_peak"][kind]) for kind in kinds]
        table.add_row(row.label, mb(row.peak_memory_bytes), *parts)
    return table


def traffic_lines(row: ContenderRow) -> Iterator[list[str]]:
    if row.traffic is None:
        yield ["not counted here", "-", "-", "-", "-"]
    elif not row.traffic:
        yield ["nothing", "0", "0", "0", "0"]
    for found in row.traffic or []:
        numbers = [mb(found.payload), mb(found.sent), mb(found.formula)]
        yield [found.collective, f"{found.calls:g}", *numbers]


def notes(report: CompareReport) -> Iterator[str]:
    """What the tables cannot say."""
    config, rounds = report.setting["config"], len(report.rows[0].rounds)
    yield (
        f"{rounds} rounds of {config['steps']} steps each, in changing order; step ms: the median "
        f"over rounds; x {report.reference}: throughput over {report.reference}'s, by round"
    )
    for row in report.rows:
        if row.processes < report.setting["world_size"]:
            yield f"{row.label}: the whole batch on rank 0 alone, with its threads; the others wait"
        if row.about:
            yield f"{row.label}: {row.about}"
    for label, reason in report.refused.items():
        yield f"{label}: refused: {reason}"
    if any(IN_MEMORY in traffic.collective for row in report.rows for traffic in row.traffic or []):
        yield f"{IN_MEMORY}: read from and written to memory that ranks share, unseen by the kernel"
    if any(row.traffic is None for row in report.rows):
        yield "not counted here: a library's own calls pass by our ledger, and not by the kernel"
    if config["model"] == "resnet18" and not config["sync_batchnorm"]:
        yield "resnet18 normalizes by each rank's rows: losses depend on how many ranks there are"
    yield "MFU: of the peak of all ranks together"
    for row in report.rows:
        if report.mfu(row) is None:
            yield f"{row.label}: no MFU: each rank counts operations that others do, too"
    worst = max(report.rows, key=report.loss_error)
    if len(report.rows) > 1:
        equal = report.loss_error(worst) <= report.tolerance
        yield (
            f"final losses after {len(worst.losses)} steps each "
            f"{'are equal' if equal else 'differ'}: the furthest from {report.reference}'s is "
            f"{worst.label}'s, by {report.loss_error(worst):.1e} of it "
            f"(tolerance {report.tolerance:.0e}, {config['dtype']})"
        )


def loss(report: CompareReport, row: ContenderRow) -> str:
    equal = report.loss_error(row) <= report.tolerance
    return f"{row.losses[-1]:.5g} {'[green]equal' if equal else '[red]differs'}"


def as_text(found: Ratio) -> str:
    return f"{found.median:.3f} ({found.low:.3f} - {found.high:.3f})"  # a space to break a line at


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def mb(number: float) -> str:
    return f"{number / 1e6:.2f}" if number >= 1e4 or not number else f"{number / 1e6:.6f}"
