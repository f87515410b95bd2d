"""Records some steps of a training run: `--timeline FIRST:LAST`.

Recording begins after the step before FIRST, and ends when all of LAST is done. The file is written
at once, so a run that is killed later has it. A run that resumes among these steps records the ones
that are left, and one that resumes after them keeps the file.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_lab.comm.agree import together
from dist_lab.errors import MachineError
from dist_lab.job import Job
from dist_lab.observe.sinks import Sink
from dist_lab.observe.timeline import perfetto
from dist_lab.observe.timeline.recorder import Recorder, recorded


class Recording(Sink):
    """On every rank. Rank 0 writes the file, and says so by `tell`."""

    def __init__(
        self, job: Job, folder: Path, steps: range, tell: Callable[[str], object] = print
    ) -> None:
        self.job, self.path, self.steps, self.tell = job, folder / perfetto.FILE, steps, tell
        self.recorder: Recorder | None = None
        self.stack = ExitStack()

    def begin(self, step: int) -> None:
        """Begin to record, if the next step is among those to record."""
        if self.recorder is None and step + 1 in self.steps:
            self.recorder = self.stack.enter_context(recorded(self.job))

    def after(self, step: int) -> None:
        if self.recorder is not None and step == self.steps[-1]:
            self.stack.close()
            self._write(self.recorder)
            self.recorder = None
        self.begin(step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.stack.close()

    def _write(self, recorder: Recorder) -> None:
        timeline = recorder.gather()
        with together(self.job.mesh.world):
            if timeline is not None:
                try:
                    perfetto.write(timeline, self.path)
                except OSError as error:
                    problem = f"cannot write {str(self.path)!r}: {error.strerror}"
                    raise MachineError(problem) from error
                self.tell(f"{timeline}; in {self.path}, for ui.perfetto.dev")
