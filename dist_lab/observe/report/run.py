"""The page of one run: `page_of_run`, and the headline of it."""

from collections.abc import Iterator, Mapping
from typing import Any

from dist_lab.observe.report import cost, memory_strip, mesh, pipeline, progress, settings
from dist_lab.observe.report import timeline as timeline_section
from dist_lab.observe.report.folder import Run
from dist_lab.observe.report.markup import (
    Content,
    Html,
    Section,
    data,
    items,
    section,
    table,
    tag,
)
from dist_lab.observe.report.page import page
from dist_lab.observe.report.units import digits, of_bytes, of_ms, percent, plural
from dist_lab.observe.stragglers import closing_words
from dist_lab.observe.theory import Check, against_theory

CAUSES = "Where the two differ, the likely cause is named."


def page_of_run(run: Run) -> str:
    """Returns the HTML page of a run."""
    summary, checks = run.summary, against_theory(run.summary)
    strip = memory_strip.over_time(run.memory, run.predicted) if run.memory is not None else None
    sections = [
        headline(run, checks),
        theory(checks),
        progress.losses(run),
        progress.step_times(summary),
    ]
    if run.timeline is not None:
        sections.append(timeline_section.timeline_of(run.timeline))
    if run.pipeline is not None:
        sections.append(pipeline.grids(run.pipeline))
    sections += [
        cost.memory(summary, strip),
        cost.traffic(summary),
        mesh.who_holds_what(summary),
        cost.ranks(summary),
        settings.of_run(run),
    ]
    return page(
        f"{summary['strategies']} on {settings.axes(summary['mesh'])}", subtitle(run), sections
    )


def subtitle(run: Run) -> str:
    summary = run.summary
    config = summary["config"]
    return (
        f"{config['model']} of {digits(summary['parameters'] / 1e6)} million parameters in "
        f"{config['dtype']}, {plural(summary['world_size'], 'rank')} on "
        f"{plural(summary['cores'], 'core')}, {plural(summary['steps'], 'step')}; in {run.name}"
    )


def headline(run: Run, checks: list[Check]) -> Section:
    """The numbers that a reader looks for first, and what he should know of the run."""
    tiles = [
        tag("div", tag("dt", name), tag("dd", *content)) for name, content in numbers(run.summary)
    ]
    unusual, expected = list(alarms(run, checks)), list(notes(run, checks))
    return section(
        "numbers", "In short", tag("dl", *tiles, class_="tiles"),
        items(unusual, "findings") if unusual else None,
        items(expected if unusual else ["Nothing unusual was found.", *expected], "findings calm"),
    )  # fmt: skip


def numbers(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[Content]]]:
    """Yields the name of each headline number and its text, with the exact value for a program."""
    median, unit = summary["median"], "tokens_per_s"
    if unit not in median:
        unit = "samples_per_s"
    yield "throughput", shown(digits(median[unit]), median[unit], f"median.{unit}",
                              unit.replace("_per_", "/"))  # fmt: skip
    yield "step time, median", in_units(of_ms, median["step_ms"], "median.step_ms")
    yield "final loss", shown(f"{summary['final_loss']:.4f}", summary["final_loss"], "final_loss")
    if summary["final_val_loss"] is not None:
        value = summary["final_val_loss"]
        yield "validation loss", shown(f"{value:.4f}", value, "final_val_loss")
    if summary.get("final_val_nats_per_byte") is not None:
        value = summary["final_val_nats_per_byte"]
        yield "validation, nats a byte", shown(f"{value:.4f}", value, "final_val_nats_per_byte")
    if summary.get("final_val_accuracy") is not None:
        value = summary["final_val_accuracy"]
        yield "validation accuracy", shown(percent(value), value, "final_val_accuracy")
    if summary["mfu"] is not None:
        peak = f"of {digits(summary['peak_flops_per_s'] / 1e9)} GFLOP/s"
        yield "MFU", shown(percent(summary["mfu"]), summary["mfu"], "mfu", small=peak)
    if summary["traffic"] is not None:  # a library's waits and bytes do not pass through our ledger
        share, waited = f"{median['comm_ms'] / median['step_ms']:.0%} of a step", median["comm_ms"]
        yield "waiting for others", in_units(of_ms, waited, "median.comm_ms", small=share)
        sent = median["comm_sent_bytes"]
        yield "sent by rank 0 a step", in_units(of_bytes, sent, "median.comm_sent_bytes")
    else:
        for name in ("waiting for others", "sent by rank 0 a step"):
            yield name, ["-", tag("small", "not counted: a library's own")]
    yield (
        "peak memory of rank 0",
        in_units(of_bytes, summary["peak_memory_bytes"], "peak_memory_bytes"),
    )


def in_units(text: Any, value: float, field: str, small: str = "") -> list[Content]:
    """A number whose unit `text` chooses."""
    figure, _, unit = text(value).partition(" ")
    return shown(figure, value, field, unit, small)


def shown(text: str, value: float, field: str, unit: str = "", small: str = "") -> list[Content]:
    more = [tag("small", small)] if small else []
    return [data(text, value, field), tag("span", f" {unit}") if unit else None, *more]


def alarms(run: Run, checks: list[Check]) -> Iterator[Content]:
    """Yields a sentence for each thing that is not as it should be."""
    yield from filter(None, closing_words(run.summary).split("; "))
    for check in checks:
        if not check.exact and not check.as_expected:
            yield check.sentence


def notes(run: Run, checks: list[Check]) -> Iterator[Content]:
    """Yields a sentence for each thing that is as expected, but not as one would think."""
    summary = run.summary
    yield from run.notes
    if summary["about"]:
        yield f"{summary['about']}. A library's own collectives and memory are not in our tables."
    for check in checks:
        if not check.exact and check.as_expected:
            yield check.sentence
    ranks, threads, cores = (summary[name] for name in ("world_size", "threads", "cores"))
    if ranks * threads > cores and summary["pipeline"] is None:
        yield (
            f"{plural(ranks, 'rank')} of {plural(threads, 'thread')} share "
            f"{plural(cores, 'core')}: times say nothing about a cluster, bytes and memory do"
        )


def theory(checks: list[Check]) -> Section:
    """The table of measured and computed numbers."""
    rows = [
        [
            check.name,
            check.measured,
            check.computed,
            verdict(check),
            tag("span", check.cause or "-", class_="long"),
        ]
        for check in checks
    ]
    head = ["what", "measured", "computed", "verdict", "likely cause"]
    content: Html = table("measured and computed, on rank 0", head, rows)
    if not rows:
        content = tag("p", "Nothing that a formula gives was measured.")
    return section("theory", "Measured against theory", content, lead=CAUSES)


def verdict(check: Check) -> Html:
    if check.exact:
        return tag("span", "as computed", class_="ok")
    if check.as_expected:
        return tag("span", "explained", class_="ok")
    return tag("span", "differs", class_="off")
