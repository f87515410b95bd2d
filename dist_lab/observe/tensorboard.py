"""What TensorBoard shows of a run and of a comparison: `tensorboard --logdir runs`.

The names are those of metrics.jsonl and summary.json:

    scalars      every number of a logged step; at the end, memory at the peak by kind
                 (memory/activations) and the bytes of a step by collective (traffic/all_reduce dp)
    histograms   step_ms: the times of all steps
    images       the mesh; of a pipeline, the last step alone and beside the ideal one
    text         settings: those of the run, and what it ran on
    hparams      of a comparison: one run for each strategy, with its speed, bytes and memory
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ABOUT = ("strategies", "world_size", "threads", "cores", "parameters")
METRICS = ("step_ms", "ratio", "mfu", "sent_bytes", "peak_memory_bytes", "final_loss")


def log_summary(writer: "SummaryWriter", summary: Mapping[str, Any]) -> None:
    """Log what a run knows at its end: see above. `summary` is that of summary.json."""
    last = summary["step_times_ms"]["first_step"] + len(summary["step_times_ms"]["ms"]) - 1
    for kind, size in summary["peak_memory"]["at_peak"].items():
        writer.add_scalar(f"memory/{kind}", size, last)
    sent = Counter[str]()
    for row in summary["traffic"] or []:  # a library's own collectives are not known
        sent[f"traffic/{row['op']} {row['axis']}"] += row["sent"]
    for name, size in sent.items():
        writer.add_scalar(name, size, last)
    writer.add_histogram("step_ms", numpy.array(summary["step_times_ms"]["ms"]), last)
    if summary["world_size"] > 1:
        from dist_lab.observe import pipeline_plot, rank_plot  # matplotlib is slow to import

        picture = pipeline_plot.image(rank_plot.draw(summary["mesh"], 0))
        writer.add_image("mesh", picture, last, dataformats="HWC")
    settings = {name: summary[name] for name in ABOUT} | dict(summary["config"])
    writer.add_text("settings", as_markdown(settings), last)


def as_markdown(settings: Mapping[str, Any]) -> str:
    """
    >>> print(as_markdown({"steps": 20, "mesh": {"dp": 2}, "out": ""}))
    | setting | value |
    |---|---|
    | steps | 20 |
    | mesh | dp=2 |
    """
    lines = ["| setting | value |", "|---|---|"]
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}={size}" for key, size in value.items())
        if value not in (None, ""):
            text = str(value).replace("|", "\\|")
            lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def log_comparison(folder: Path, results: Mapping[str, Any]) -> None:
    """Log a comparison as hyperparameters: folder/tensorboard has a run for each strategy."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    rate = results["unit"].replace("/", "_per_")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for row in results["strategies"]:
            values = {"strategy": row["strategy"], "mesh": row["mesh"], "ranks": row["processes"]}
            metrics = {name: row[name] for name in (*METRICS, rate) if row[name] is not None}
            writer.add_hparams(values, metrics, run_name=row["strategy"].replace(":", "-"))
