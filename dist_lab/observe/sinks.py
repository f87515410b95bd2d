"""Sinks for the numbers of a run: JSON files, TensorBoard, a report, and the console.

A sink takes one row per logged step, and the summary at the end. Rank 0 has all four sinks, the
other ranks none.

[Note: each step once] A run that is killed has logged steps that are after its last checkpoint. The
run that resumes takes them again. So metrics.jsonl is cut before the first step to come, and with
it a line of which only a part was written. TensorBoard is told to purge the events from that step
on. Both files are flushed after every row: a row that is before a checkpoint is never lost.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from dist_lab.errors import UserError
from dist_lab.observe.console import Progress
from dist_lab.observe.export import write_json, writing
from dist_lab.observe.flops import in_percent
from dist_lab.observe.report.folder import REPORT, Run, read
from dist_lab.observe.report.run import page_of_run
from dist_lab.observe.stragglers import closing_words
from dist_lab.observe.tensorboard import log_summary
from dist_lab.observe.theory import against_theory, in_one_line
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.simulate import TimedAction

Row = Mapping[str, Any]
SUMMARY = "summary.json"
LAST_STEP = "the last step, measured"


class Sink:
    """The events that a sink can write. By default it ignores them."""

    def begin(self, step: int) -> None:
        """Training begins after this step; 0: from the start."""

    def tick(self, step: int) -> None:
        """A step is done."""

    def after(self, step: int) -> None:
        """All of a step is done: its validation, row and checkpoint too. On all ranks."""

    def row(self, row: Row) -> None:
        """A step is logged. README describes the fields of a row."""

    def notice(self, line: str) -> None:
        """Something has happened that a reader should see at once."""

    def pipeline(self, rows: Sequence[Sequence[TimedAction]], schedule: Schedule) -> None:
        """The last step is measured: the timed actions of each pipeline rank, in ms."""

    def memory(self, over_time: Mapping[str, Any]) -> None:
        """The live bytes of a step of every rank: see memory_series.py."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The run is over; None if it failed."""


def open_sinks(folder: Path, steps: int, *, plain: bool = False, first: int = 0) -> list[Sink]:
    """Returns all four, writing to `folder`, which exists. `plain`: lines in place of a bar.

    `first`: the steps that were taken before. Rows of later steps are removed: see
    [Note: each step once].
    """
    screen = Screen(steps, plain=plain)
    # The report reads the files that JsonLines has closed.
    return [JsonLines(folder, first), TensorBoard(folder, first), HtmlReport(folder), screen]


class JsonLines(Sink):
    """Writes metrics.jsonl, a line at once."""

    def __init__(self, folder: Path, first: int) -> None:
        self.folder = folder
        with writing(folder):
            drop_rows(folder / "metrics.jsonl", first)
            (folder / SUMMARY).unlink(missing_ok=True)
            self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def row(self, row: Row) -> None:
        with writing(self.folder):
            self.file.write(json.dumps(row, allow_nan=False) + "\n")

    def pipeline(self, rows: Sequence[Sequence[TimedAction]], schedule: Schedule) -> None:
        """Write pipeline.json, and a picture of the measured step above the ideal one."""
        from dist_lab.observe import pipeline_plot  # matplotlib is slow to import

        measured = pipeline_plot.to_json(rows, schedule.name)
        ideal = {"ideal": pipeline_plot.ideal_to_json(schedule)}
        picture = pipeline_plot.side_by_side(rows, schedule, LAST_STEP)
        with writing(self.folder):
            write_json(self.folder / "pipeline.json", measured | ideal)
            pipeline_plot.write(picture, self.folder / "pipeline.svg")

    def memory(self, over_time: Mapping[str, Any]) -> None:
        text = json.dumps(over_time, separators=(",", ":"), allow_nan=False)
        with writing(self.folder):
            (self.folder / "memory.json").write_text(text + "\n", encoding="utf-8")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        with closing(self.folder, summary):
            self.file.close()
            if summary is not None:
                write_json(self.folder / SUMMARY, summary)


class TensorBoard(Sink):
    """Writes events for `tensorboard --logdir runs`: tensorboard.py has the list."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 does

        self.folder = folder
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        # Files are read in the order of their names, which begin with the second: the files of two
        # attempts must not begin alike.
        while earlier and int(time.time()) == int(earlier[-1].name.split(".")[3]):
            time.sleep(0.02)
        with writing(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first + 1 if earlier else None)

    def row(self, row: Row) -> None:
        with writing(self.folder):
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()

    def pipeline(self, rows: Sequence[Sequence[TimedAction]], schedule: Schedule) -> None:
        from dist_lab.observe import pipeline_plot

        for name, figure in (
            ("pipeline/the last step", pipeline_plot.draw(rows, title=schedule.name, unit="ms")),
            ("pipeline/beside the ideal", pipeline_plot.side_by_side(rows, schedule, LAST_STEP)),
        ):
            with writing(self.folder):
                self.writer.add_image(name, pipeline_plot.image(figure), dataformats="HWC")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        with closing(self.folder, summary):
            if summary is not None:
                log_summary(self.writer, summary)
            self.writer.close()


class HtmlReport(Sink):
    """Writes report.html at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / REPORT).unlink(missing_ok=True)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            try:
                run = read(self.folder)
            except UserError as error:  # a damaged file of an earlier attempt: the run is over well
                print(f"no report: {error}", flush=True)
            else:
                assert isinstance(run, Run)
                page = page_of_run(run)
                with writing(self.folder):
                    (self.folder / REPORT).write_text(page, encoding="utf-8")


class Screen(Sink):
    """Shows a progress bar with the last numbers, or prints a line per row in a log."""

    def __init__(self, steps: int, *, plain: bool) -> None:
        self.steps, self.first, self.validation = steps, 0, ""
        self.progress = Progress("step", steps, plain=plain)

    def begin(self, step: int) -> None:
        self.first = step

    def tick(self, step: int) -> None:
        self.progress.reach(step)

    def row(self, row: Row) -> None:
        validation = ""
        if "val_loss" in row:
            more = _accuracy(row, "val_accuracy") + _per_byte(row, "val_nats_per_byte")
            validation = f"  val {row['val_loss']:.4f}{more}"
            self.validation = validation
        loss = f"loss {row['loss']:.4f}{_per_byte(row, 'nats_per_byte')}"
        self.progress.say(
            f"step {row['step']:>5}/{self.steps}  {loss}{validation}  norm "
            f"{row['grad_norm']:.3f}  {_rate(row)}  {row['step_ms']:.0f} ms "
            f"({row['comm_ms']:.0f} waiting)",
            on_the_bar=f"{loss}{self.validation}  {_rate(row)}",
        )

    def notice(self, line: str) -> None:
        self.progress.print(line)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.progress.close()
        if summary is not None:
            self.progress.print(closing_line(summary, self.first))
            self.progress.print(in_one_line(against_theory(summary)))


def closing(folder: Path, summary: Mapping[str, Any] | None) -> AbstractContextManager[None]:
    """For closing files: an error is raised, unless the run has failed with one of its own."""
    return suppress(OSError) if summary is None else writing(folder)


def drop_rows(path: Path, first: int) -> None:
    """Removes the rows of steps after `first`, and a last line that is not complete."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [ln for ln in lines if ln.endswith(b"\n") and json.loads(ln)["step"] <= first]
    if kept != lines:
        new = path.with_name(f"{path.name}.tmp")
        new.write_bytes(b"".join(kept))
        new.replace(path)  # at once, so that a run that is killed here loses no row


def closing_line(summary: Mapping[str, Any], first: int = 0) -> str:
    """The result of a run in one line. `first`: the steps that were taken before it resumed."""
    median, validation = summary["median"], summary["final_val_loss"]
    validated = ""
    if validation is not None:
        more = _accuracy(summary, "final_val_accuracy")
        more += _per_byte(summary, "final_val_nats_per_byte")
        validated = f", validation {validation:.4f}{more}"
    step = f"{median['step_ms']:.0f} ms a step"
    if not summary["about"]:  # a library waits where we do not see it
        step = f"{median['comm_ms']:.0f} of {step} waiting for others"
    since = f" ({summary['steps'] - first} since it resumed)" if first else ""
    return (
        f"{summary['steps']} step{'s' * (summary['steps'] != 1)}{since}, "
        f"loss {summary['final_loss']:.4f}{_per_byte(summary, 'final_nats_per_byte')}{validated}; "
        f"{_rate(median)}, MFU {in_percent(summary['mfu'])}, "
        f"{step}; "
        f"peak memory {memory_in_words(summary['peak_memory']['at_peak'])}"
        f"{closing_words(summary)}; in {summary['out']}"
    )


def memory_in_words(kinds: Mapping[str, int]) -> str:
    """Returns bytes by kind as one phrase, the largest first. Kinds below 1% are left out."""
    total = sum(kinds.values())
    large = sorted((n, kind) for kind, n in kinds.items() if 100 * n > total)
    parts = ", ".join(f"{kind.replace('_', ' ')} {n / 1e6:,.1f}" for n, kind in reversed(large))
    return f"{total / 1e6:,.1f} MB ({parts})"


def _accuracy(row: Row, field: str) -> str:
    return f" ({row[field]:.1%} right)" if field in row else ""


def _per_byte(row: Row, field: str) -> str:
    """The loss per byte, if a token is no byte: losses per token of two tokenizers say nothing."""
    return f" ({row[field]:.4f} a byte)" if field in row else ""


def _rate(row: Row) -> str:
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:,.0f} tokens/s"
    return f"{row['samples_per_s']:,.1f} samples/s"
