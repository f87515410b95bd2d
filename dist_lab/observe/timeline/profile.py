"""torch's profiler in some steps of a run, and beside it our timeline: `--profile FIRST:LAST`.

    OUT/profile/rank-N.json     one rank, as torch writes it
    OUT/profile/merged.json     all ranks of rank 0's machine, with the timeline of the same steps

Both are for https://ui.perfetto.dev. In the merged file each rank has a process with our slices,
and after it those of torch: every operation, on the thread that ran it. Profiling slows a step
down, so the timeline of these steps is not that of others.

[Note: not in the timeline] Writing the files takes a second or so. It waits until `--timeline` has
recorded its own steps, which would have this second in them.

[Note: one clock] torch's times count from a moment of its own. Each rank marks a time of our clock
in its trace, as an operation of a name that we know; the difference is added to all of its times.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.errors import MachineError
from dist_lab.job import Job
from dist_lab.observe.sinks import Sink
from dist_lab.observe.timeline import perfetto
from dist_lab.observe.timeline.recorder import Recorder, recorded
from dist_lab.observe.timeline.timeline import Timeline, in_words

FOLDER, MERGED, MARK = "profile", "merged.json", "the clock of dist_lab"
Event = dict[str, Any]


class Profile(Sink):
    """On every rank, after sink.py's Recording.

    `recorded`: the steps of the timeline; see [Note: not in the timeline].
    """

    def __init__(
        self, job: Job, folder: Path, steps: range, tell: Callable[[str], object] = print,
        *, recorded: range = range(0),
    ) -> None:  # fmt: skip
        self.job, self.folder, self.steps, self.tell = job, folder / FOLDER, steps, tell
        self.recorded = recorded
        self.recorder: Recorder | None = None
        self.profiler: profile | None = None
        self.stack = ExitStack()
        self.marked = 0.0

    def begin(self, step: int) -> None:
        """Begin to profile, if the next step is among those to profile."""
        if self.recorder is None and step + 1 in self.steps:
            activities = [ProfilerActivity.CPU]
            if self.job.mesh.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = self.stack.enter_context(profile(activities=activities))
            self.recorder = self.stack.enter_context(recorded(self.job))
            for _ in range(3):  # the first takes longer, and the last counts
                with record_function(MARK):
                    self.marked = time.perf_counter()

    def after(self, step: int) -> None:
        if step == self.steps[-1]:
            self.stack.close()
        if self.recorder is not None and step >= self.steps[-1] and step + 1 not in self.recorded:
            self._write()
            self.recorder = self.profiler = None
        self.begin(step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.stack.close()

    def _write(self) -> None:
        assert self.recorder is not None
        assert self.profiler is not None
        mesh, timeline = self.job.mesh, self.recorder.gather()
        moments = [self.marked, self.recorder.labels[0][0]]
        own = torch.tensor([moments], dtype=torch.float64, device=mesh.device)
        marks, begins = ops.all_gather(own + self.recorder.offset, mesh.world).unbind(1)  # (N,)
        with together(mesh.world):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)  # on another machine
                self.profiler.export_chrome_trace(str(self.folder / f"rank-{mesh.rank}.json"))
            except OSError as error:
                raise MachineError(f"cannot write to {str(self.folder)!r}: {error}") from error
        with together(mesh.world):
            if timeline is not None:
                write_merged(timeline, self.folder, ((marks - begins.min()) * 1e6).tolist())
                steps = in_words(self.steps)
                self.tell(f"profile of {steps} in {self.folder}, for ui.perfetto.dev")


def write_merged(timeline: Timeline, folder: Path, marks: list[float]) -> None:
    """Write the traces in `folder` and the timeline as one file.

    Args:
        marks: the time of each rank's mark, in microseconds of the timeline.
    """
    events = [*perfetto.events(timeline)]
    for rank, mark in enumerate(marks):
        path = folder / f"rank-{rank}.json"
        if path.exists():  # on another machine it is there
            events += of_torch(json.loads(path.read_text(encoding="utf-8")), rank, mark)
    everything = {"displayTimeUnit": "ms", "traceEvents": events}
    text = json.dumps(everything, separators=(",", ":"))
    (folder / MERGED).write_text(text, encoding="utf-8")


def of_torch(trace: Mapping[str, Any], rank: int, mark: float) -> Iterator[Event]:
    """Yields torch's events of one rank, as processes of their own and on our clock."""
    events = trace["traceEvents"]
    last = max(e["ts"] + e["dur"] / 2 for e in events if e["name"] == MARK and e["ph"] == "X")
    shift = mark - last
    pids: dict[Any, int] = {}
    for event in events:
        pid = event.get("pid")
        if pid not in pids:
            pids[pid] = 1000 * (rank + 1) + len(pids)
            place = {"pid": pids[pid], "tid": 0}
            name = {"name": f"rank {rank}, torch: {pid}"}
            yield {"ph": "M", "name": "process_name", **place, "args": name}
            order = {"sort_index": 2 * rank + 1}
            yield {"ph": "M", "name": "process_sort_index", **place, "args": order}
        if event["ph"] == "M" and event["name"].startswith("process_"):
            continue
        moved = {"ts": event["ts"] + shift} if event["ph"] != "M" else {}
        yield event | {"pid": pids[pid]} | moved
