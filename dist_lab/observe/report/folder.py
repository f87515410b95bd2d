"""What a run or a comparison has left in its folder, read and checked.

Files are read as they are: no file of a run is trusted to be whole, because a run may have been
killed at any time, and a folder may be another tool's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lab.errors import UserError
from dist_lab.observe.run_dir import process_with
from dist_lab.observe.timeline.timeline import Timeline

REPORT = "report.html"
FORMAT = 2  # of summary.json; 1 had no format, no traffic, no layouts and no times of all steps
LARGEST_TIMELINE = 10_000_000  # bytes, so that a run has its report within a second
MEMORY_FORMAT = 1  # as in memory_series.py, which imports torch
FIELDS = (
    "config", "mesh", "median", "step_times_ms", "layouts", "versions", "pipeline", "traffic",
    "ranks", "slow_ranks", "stage_work_ms", "by_layout", "peak_memory", "peak_memory_bytes",
    "peak_flops_per_s", "mfu", "final_loss", "final_val_loss", "steps", "strategies", "about",
    "world_size", "threads", "cores", "parameters", "data",
)  # fmt: skip
FIELDS_OF_COMPARISON = "setting", "reference", "unit", "strategies", "measured", "refused"
FIELDS_OF_PIPELINE = "schedule", "ranks", "idle_share", "peak_activations", "ideal"
FIELDS_OF_MEMORY = "tool", "format", "kinds", "ranks"
FIELDS_OF_A_RANK = "rank", "place", "changes", "at", "bytes", "phases", "peak"  # of its memory
FIELDS_OF_A_ROW = "step", "loss", "grad_norm", "lr"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        summary: summary.json.
        rows: of metrics.jsonl, in the order of steps.
        pipeline: pipeline.json; None if the run has no pipeline.
        memory: memory.json; None if there is none.
        predicted: memory_predicted.json, which explain writes; None if there is none.
        timeline: timeline.json; None if the run has not recorded one, or one that is too large.
        notes: what a reader should know of these files.
    """

    folder: Path
    summary: Mapping[str, Any]
    rows: list[dict[str, Any]]
    pipeline: Mapping[str, Any] | None
    memory: Mapping[str, Any] | None = None
    predicted: Mapping[str, Any] | None = None
    timeline: Timeline | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: compare.json."""

    folder: Path
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read(folder: Path) -> Run | Comparison:
    """Returns what is in a folder.

    Raises:
        UserError: there is none, it is another tool's or another version's, a file in it is
            damaged, or the run has not ended.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"{str(folder)!r} {what}; give the folder of a run, such as runs/003-dp-gpt"
        )
    if (folder / "compare.json").exists():
        results = read_json(folder / "compare.json")
        refuse_others(folder / "compare.json", results, FIELDS_OF_COMPARISON)
        if not (results["strategies"] and results["measured"]):
            raise UserError(f"{str(folder / 'compare.json')!r} has no strategy; run it again")
        return Comparison(folder, results)
    if not (folder / "summary.json").exists():
        raise no_summary(folder)
    summary = read_json(folder / "summary.json")
    if isinstance(summary, dict) and "config" in summary and summary.get("format") != FORMAT:
        raise UserError(
            f"{str(folder)!r} is a run of another version: its summary.json has format "
            f"{summary.get('format', 1)}, and this report reads {FORMAT}; run it again"
        )
    refuse_others(folder / "summary.json", summary, FIELDS)
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{str(folder / 'metrics.jsonl')!r} has no row; run it again")
    for row in rows:
        refuse_others(folder / "metrics.jsonl", row, FIELDS_OF_A_ROW)
    pipeline = summary["pipeline"] and read_json(folder / "pipeline.json")
    if pipeline:
        refuse_others(folder / "pipeline.json", pipeline, FIELDS_OF_PIPELINE)
    path = folder / "timeline.json"
    timeline: Timeline | None = None
    notes: tuple[str, ...] = ()
    if path.exists() and path.stat().st_size <= LARGEST_TIMELINE:
        timeline = Timeline.read(path)
    elif path.exists():
        size = f"{path.stat().st_size / 1e6:,.0f} MB"
        notes = (f"timeline.json is not drawn here, because it has {size}: see ui.perfetto.dev",)
    return Run(
        folder, summary, rows, pipeline,
        read_memory(folder / "memory.json"), read_memory(folder / "memory_predicted.json"),
        timeline, notes,
    )  # fmt: skip


def no_summary(folder: Path) -> UserError:
    """The error of a folder in which no run has ended: it goes on, was killed, or never was one."""
    process, metrics = process_with(folder.stat()), folder / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.exists() else []
    steps = f"step {rows[-1]['step']}" if rows else "its first step"
    if process is not None:
        return UserError(
            f"the run in {str(folder)!r} is still going on (process {process}, at {steps}); it "
            "writes its report when it ends"
        )
    if metrics.exists():
        return UserError(
            f"the run in {str(folder)!r} has not ended: it was killed, or failed, at {steps}; go "
            "on with train.py --resume auto, or run it again"
        )
    names = sorted(path.name for path in folder.iterdir())
    found = f"{len(names)} entries, first {names[0]!r}" if names else "it is empty"
    return UserError(
        f"{str(folder)!r} is no folder of train.py or compare.py: {found}; give one with "
        "summary.json or compare.json"
    )


def refuse_others(path: Path, contents: Any, fields: tuple[str, ...]) -> None:
    """Raises UserError if the file lacks a field, and so is another tool's."""
    missing = [f for f in fields if not isinstance(contents, dict) or f not in contents]
    if missing:
        raise UserError(
            f"{str(path)!r} is another tool's, or another version's: it has no {missing[0]!r}; "
            "give the folder of a run of this dist_lab"
        )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not whole JSON"
        raise UserError(f"cannot read {str(path)!r}: {why}; run it again") from None


def read_memory(path: Path) -> Any:
    """Live bytes over a step; None if there is no such file."""
    if not path.exists():
        return None
    memory = read_json(path)
    refuse_others(path, memory, FIELDS_OF_MEMORY)
    if (memory["tool"], memory["format"]) != ("dist_lab", MEMORY_FORMAT):
        raise UserError(
            f"{str(path)!r} is of {memory['tool']!r}, format {memory['format']}, and this report "
            f"reads dist_lab's, format {MEMORY_FORMAT}; run it again"
        )
    if not memory["ranks"]:
        raise UserError(f"{str(path)!r} has the memory of no rank; run it again")
    for entry in memory["ranks"]:
        refuse_others(path, entry, FIELDS_OF_A_RANK)
    return memory


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. A last line of which only a part was written is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        raise UserError(f"cannot read {str(path)!r}; run it again") from None
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        assert all({*FIELDS_OF_A_ROW[:2]} <= row.keys() for row in rows)
    except (ValueError, AttributeError, AssertionError):
        raise UserError(
            f"{str(path)!r} is not a file of rows with step and loss: another tool's, or damaged; "
            "give the folder of a run of this dist_lab"
        ) from None
    return rows
