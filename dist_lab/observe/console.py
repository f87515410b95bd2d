"""Console output while a program runs: a progress bar at a terminal, plain lines in a log."""

from collections.abc import Sequence
from typing import Any

import rich.progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table


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
    """

    def __init__(
        self, noun: str, total: int, *, quiet: bool = False, plain: bool = False,
        auto_refresh: bool = True,
    ) -> None:  # fmt: skip
        self.console = Console(quiet=quiet)
        self.in_lines = plain or not self.console.is_terminal
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn(noun), rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(),
            console=self.console, disable=quiet or self.in_lines, auto_refresh=auto_refresh,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def reach(self, done: int) -> None:
        self.bar.update(self.task, completed=done)

    def say(self, line: str, *, on_the_bar: str | None = None) -> None:
        """Print a line to a log. At a terminal show it on the bar, or `on_the_bar` in its place."""
        self.bar.update(self.task, description=line if on_the_bar is None else on_the_bar)
        self.bar.refresh()
        if self.in_lines:
            self.print(line)

    def print(self, line: str) -> None:
        """Print a line, at a terminal and to a log."""
        self.console.print(line, highlight=False, soft_wrap=True)
        self.console.file.flush()

    def close(self) -> None:
        self.bar.stop()
