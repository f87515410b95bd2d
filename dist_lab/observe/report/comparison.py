"""The page of a comparison: which strategy is faster, by how much, and what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.observe.report.charts import Scale, Series, bar, legend, plot
from dist_lab.observe.report.cost import words
from dist_lab.observe.report.folder import Comparison
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Section,
    figure,
    items,
    join,
    number,
    section,
    table,
    tag,
)
from dist_lab.observe.report.page import page
from dist_lab.observe.report.settings import in_text, is_set, machine_of, pairs
from dist_lab.observe.report.units import digits, of_bytes, of_ms, percent, plural

Row = Mapping[str, Any]
LOOKS = 8  # of lines: page.css has l0 to l7
OF_ONE_STRATEGY = "strategy", "impl", "mesh"  # settings
VERDICTS = "faster", "slower", "too noisy to tell"


def page_of_comparison(comparison: Comparison) -> str:
    """Returns the HTML page of a comparison."""
    results = comparison.results
    setting = results["setting"]
    config = setting["config"]
    rows: Sequence[Row] = results["strategies"]
    measured: Sequence[Row] = results["measured"]
    sections = [
        in_short(results),
        throughput(results),
        losses(measured, results["loss_tolerance"]),
        memory(measured),
        traffic(measured),
        whole_table(rows, results["unit"]),
        settings(results),
    ]
    subtitle = (
        f"{config['model']} of {digits(setting['parameters'] / 1e6)} million parameters in "
        f"{config['dtype']}, {results['batch']:,} {results['unit'].removesuffix('/s')} a step, "
        f"{plural(setting['world_size'], 'rank')} on {plural(setting['cores'], 'core')}; "
        f"in {comparison.name}"
    )
    return page(f"{plural(len(rows), 'strategy').replace('strategys', 'strategies')} compared",
                subtitle, sections)  # fmt: skip


def in_short(results: Mapping[str, Any]) -> Section:
    """The verdicts in words."""
    rows, reference = results["strategies"], results["reference"]
    lines: list[Content] = []
    for verdict in VERDICTS:
        told = verdict in VERDICTS[:2]
        labels = [
            row["strategy"] + (f" ({row['ratio']:.2f} times as fast)" if told else "")
            for row in rows
            if row["verdict"] == verdict
        ]
        if labels:
            beside = f" than {reference}: " if told else f", compared with {reference}: "
            lines.append(join([tag("b", verdict), beside, ", ".join(labels)]))
    unlike = [row["strategy"] for row in rows if row["loss_error"] > results["loss_tolerance"]]
    lines.append(
        f"Other final losses: {', '.join(unlike)}." if unlike else "All final losses are equal."
    )
    lines += [f"{label} did not run: {why}" for label, why in results["refused"].items()]
    return section("numbers", "In short", items(lines, "findings calm"))


def throughput(results: Mapping[str, Any]) -> Section:
    """A bar for each strategy, with the quartiles of its rounds, and its ratio to the reference."""
    rate, batch, reference = (results[name] for name in ("unit", "batch", "reference"))
    field = rate.replace("/", "_per_")
    rows = results["strategies"]
    most = max(batch / row["step_ms_lower_quartile"] * 1e3 for row in rows)
    cells: list[list[Content | Cell]] = []
    for row in rows:
        low, high = (batch / row[f"step_ms_{side}_quartile"] * 1e3 for side in ("upper", "lower"))
        interval = "-"
        if row["ratio_low"] is not None:
            interval = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        cells.append([
            row["strategy"], row["verdict"], number(f"{row['ratio']:.3f}", row["ratio"]), interval,
            bar([(row[field], "work")], most, (low, high)), number(digits(row[field]), row[field]),
            number(of_ms(row["step_ms"]), row["step_ms"]),
        ])  # fmt: skip
    head = ["strategy", "verdict", f"ratio to {reference}", "99% interval", "", rate, "step"]
    lead = (
        "Bars: the median over rounds; whiskers: lower and upper quartile. The ratio is computed "
        "within each round, so a slow minute of the machine does not count. If the interval holds "
        "1, the two cannot be told apart."
    )
    whole = table(f"throughput over {rows[0]['rounds']} rounds", head, cells)
    return section("throughput", "Throughput", whole, lead=lead)


def losses(measured: Sequence[Row], tolerance: float) -> Section:
    """The loss of each strategy by step, one over another."""
    lines = [
        Series(row["label"], range(1, len(row["losses"]) + 1), row["losses"], line_look(i))
        for i, row in enumerate(measured)
    ]
    every = [y for line in lines for y in line.ys]
    steps = max(len(line.xs) for line in lines)
    title = "loss by step; equal curves lie on one another"
    chart = plot(lines, Scale(0, steps), Scale.around(every), title=title, x_label="step",
                 y_label="loss", cursor=True)  # fmt: skip
    rows: list[list[Content | Cell]] = [
        [
            Cell(str(step + 1), step + 1),
            *(number(f"{one.ys[step]:.5f}", one.ys[step]) if step < len(one.ys) else ""
              for one in lines),
        ]
        for step in range(steps)
    ]  # fmt: skip
    whole = table("loss by step", ["step", *(line.name for line in lines)], rows)
    lead = (
        "All strategies train the same model on the same batches. Their losses may differ by "
        f"rounding: by {tolerance:g} at most, relative to the reference, after the last step."
    )
    names = legend([(line.name, line.look) for line in lines])
    return section("loss", "Loss", figure(title, names, chart, details=whole), lead=lead)


def line_look(i: int) -> str:
    """The class of the i-th line: eight colors, then the same ones dashed."""
    return f"l{i % LOOKS}" + (" dash" if i >= LOOKS else "")


def memory(measured: Sequence[Row]) -> Section:
    """A stacked bar for each strategy: the bytes of each kind at the peak of its fullest rank."""
    peaks = [row["peak_memory"]["at_peak"] for row in measured]
    kinds = [kind for kind in peaks[0] if any(peak[kind] for peak in peaks)]
    most = max(row["peak_memory_bytes"] for row in measured)
    rows: list[list[Content | Cell]] = [
        [
            row["label"], bar([(peak[kind], kind) for kind in kinds], most),
            number(of_bytes(row["peak_memory_bytes"]), row["peak_memory_bytes"]),
            *(number(of_bytes(peak[kind]), peak[kind]) for kind in kinds),
        ]
        for row, peak in zip(measured, peaks, strict=True)
    ]  # fmt: skip
    head = ["strategy", "", "peak", *map(words, kinds)]
    keys = legend([(words(kind), kind) for kind in kinds])
    whole = table("live bytes at the peak of the rank that needs most", head, rows)
    return section("memory", "Memory by kind", keys, whole)


def traffic(measured: Sequence[Row]) -> Section:
    """What a rank sends in a step, by collective, beside the published formula."""
    most = max((call["sent"] for row in measured for call in row["traffic"] or []), default=0) or 1
    rows: list[list[Content | Cell]] = []
    for row in measured:
        kernel = row["kernel_bytes"]
        on_sockets: Content | Cell = "-" if kernel is None else number(of_bytes(kernel), kernel)
        calls = row["traffic"]
        if not calls:
            why = "not counted: a library's own" if calls is None else "nothing is sent"
            rows.append([row["label"], why, None, *["-"] * 4, on_sockets])
        for i, call in enumerate(calls or []):
            rows.append([
                row["label"], call["collective"], bar([(call["sent"], "work")], most),
                number(f"{call['calls']:g}", call["calls"]),
                *(number(of_bytes(call[n]), call[n]) for n in ("payload", "formula", "sent")),
                on_sockets if i == 0 else "",
            ])  # fmt: skip
    lead = (
        "One step, the mean over ranks. Formula: the published, bandwidth-optimal one for this "
        "payload. Kernel: what the system counted on sockets, for all collectives of a strategy."
    )
    head = ["strategy", "collective", "", "calls", "payload", "formula", "sent", "kernel"]
    return section("bytes", "Bytes sent", table("bytes of a step", head, rows), lead=lead)


def whole_table(rows: Sequence[Row], unit: str) -> Section:
    """All numbers of compare.csv that are not in the other tables, sortable."""
    rate = unit.replace("/", "_per_")
    head = ["strategy", "mesh", unit, "step", "MFU", "waiting", "sent", "peak memory", "final loss"]
    cells: list[list[Content | Cell]] = [
        [
            row["strategy"], row["mesh"], number(digits(row[rate]), row[rate]),
            number(of_ms(row["step_ms"]), row["step_ms"]),
            _maybe(row["mfu"], percent), _maybe(row["blocked_ms"], of_ms),
            _maybe(row["sent_bytes"], of_bytes), _maybe(row["peak_memory_bytes"], of_bytes),
            number(f"{row['final_loss']:.5g}", row["final_loss"]),
        ]
        for row in rows
    ]  # fmt: skip
    lead = "A click on a heading sorts by it. Everything that was measured is in compare.json."
    whole = table("all strategies", head, cells, sortable=True)
    return section("table", "All strategies", whole, lead=lead)


def settings(results: Mapping[str, Any]) -> Section:
    setting = results["setting"]
    common = {n: v for n, v in setting["config"].items() if n not in OF_ONE_STRATEGY}
    given = {name: in_text(value) for name, value in common.items() if is_set(value)}
    about = {row["label"]: row["about"] for row in results["measured"] if row["about"]}
    return section(
        "settings", "Settings and versions", pairs(given),
        tag("h3", "Machine, data and versions"), pairs(machine_of(setting)),
        items(f"{label}: {text}" for label, text in about.items()) if about else None,
    )  # fmt: skip


def _maybe(value: float | None, text: Any) -> Content | Cell:
    return "-" if value is None else number(text(value), value)
