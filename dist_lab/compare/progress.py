"""What a person sees while a comparison runs: a bar at a terminal, plain lines in a log."""

import statistics
from collections.abc import Mapping, Sequence
from types import TracebackType

import rich.progress
from rich.console import Console

from dist_lab.compare.settings import Settings
from dist_lab.mesh import Mesh


class Progress:
    """Rank 0 shows it, the others nothing. A context: at its end the bar is gone."""

    def __init__(self, config: Settings, mesh: Mesh) -> None:
        self.console = Console(quiet=mesh.rank > 0)
        self.rounds, self.done = config.rounds, 0
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
            auto_refresh=False,  # a thread that draws would take time from whoever runs
        )  # fmt: skip
        self.task = self.bar.add_task("", total=config.rounds)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def begins(self, label: str) -> None:
        """A strategy is built and warmed up."""
        self._say(f"warm-up  {label}", f"warm-up of {label}")

    def round_done(self, steps: Mapping[str, Sequence[float]]) -> None:
        """Seconds of each step of the last round, by label."""
        self.done += 1
        times = "  ".join(
            f"{label} {statistics.median(seconds) * 1e3:.0f} ms" for label, seconds in steps.items()
        )
        self._say("rounds", f"round {self.done:>3}/{self.rounds}  {times}")

    def _say(self, on_the_bar: str, line: str) -> None:
        self.bar.update(self.task, description=on_the_bar, completed=self.done)
        self.bar.refresh()
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)
            self.console.file.flush()
