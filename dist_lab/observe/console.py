"""Console output while a program runs: a progress bar at a terminal, plain lines in a log."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import rich.progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

T = TypeVar("T")
EVERY = 5.0  # seconds between two lines of progress in a log


def wide_console() -> Console:
    """Returns a console as wide as the terminal, or 120 columns wide for a log file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def empty_table(text: Sequence[str], numbers: Sequence[str], **options: Any) -> Table:
    """Returns a table of text columns, then number columns. Long cells are wrapped, not cut off."""
    columns = [Column(name, overflow="fold") for name in text]
    columns += [Column(name, justify="right", overflow="fold") for name in numbers]
    return Table(*columns, **{"box": SIMPLE_HEAD} | options)


class Progress:
    """Shows how much of `total` is done. Close it at the end.

    Args:
        noun: the thing that is counted.
        quiet: show nothing, as on all ranks but rank 0.
        plain: print lines even at a terminal, because other processes print there, too.
        auto_refresh: redraw the bar in a thread. Set to False, it takes no time from a measurement.
        transient: the bar goes away at the end.
    """

    def __init__(
        self, noun: str, total: int, *, quiet: bool = False, plain: bool = False,
        auto_refresh: bool = True, transient: bool = False,
    ) -> None:  # fmt: skip
        self.noun, self.total, self.told = noun, total, time.monotonic()
        self.console = Console(quiet=quiet)
        self.in_lines = plain or not self.console.is_terminal
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn(noun), rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(),
            console=self.console, disable=quiet or self.in_lines, auto_refresh=auto_refresh,
            transient=transient,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def reach(self, done: int) -> None:
        self.bar.update(self.task, completed=done)

    def keep_to(self, done: int) -> None:
        """Reach this number. In a log, print it if nothing was printed for EVERY seconds."""
        self.reach(done)
        if self.in_lines and time.monotonic() - self.told > EVERY:
            self.print(f"{self.noun} {done}/{self.total}")

    def say(self, line: str, *, on_the_bar: str | None = None) -> None:
        """Print a line to a log. At a terminal show it on the bar, or `on_the_bar` in its place."""
        self.bar.update(self.task, description=line if on_the_bar is None else on_the_bar)
        self.bar.refresh()
        if self.in_lines:
            self.print(line)

    def print(self, line: str) -> None:
        """Print a line, at a terminal and to a log."""
        self.told = time.monotonic()
        self.console.print(line, highlight=False, soft_wrap=True)
        self.console.file.flush()

    def close(self) -> None:
        self.bar.stop()


def watched(items: Sequence[T], noun: str, *, lines: bool = True) -> Iterator[T]:
    """Yield items one after another, with a bar if a person watches, which goes away at the end.

    What is printed meanwhile appears above the bar. `lines`: in a log, tell how far it is.
    """
    progress = Progress(noun, len(items), transient=True)
    try:
        for done, item in enumerate(items):
            progress.keep_to(done) if lines else progress.reach(done)
            yield item
        progress.reach(len(items))
    finally:
        progress.close()
