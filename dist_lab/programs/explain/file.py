"""Write explain.json: the layout of each parameter, the memory of a rank and every collective.

    {"strategy": "fsdp@hand", "mesh": {"fsdp": 4},
     "layouts": {"norm.weight": {"shape": [128], "dtype": "float32",
                 "splits": [["fsdp", {"shard": 0, "copies": 1}]], "partial": [{"axis": "fsdp"}]}},
     "memory": {"peak": 1, "kinds": {"parameters": {"at_peak": 1, "own_peak": 1, "by_layout": 1}}},
     "calls": [{"step": 1, "phase": "forward", "op": "all_gather", "payload": 1, "sent": 1, ...}]}

All sizes are in bytes. "rank" is that of --rank, left out if it is 0. In step 1 a strategy may
learn the order of its buckets or units; step 2 is like all later steps. Nothing in the file depends
on the time, the machine or line numbers. Beside it, memory_predicted.json has the bytes over one
step: the report of a run in that folder draws it over what the run has measured.
"""

from pathlib import Path
from typing import Any

from dist_lab.comm.ledger import Call
from dist_lab.layout.layout import to_json
from dist_lab.observe import export, memory, memory_series
from dist_lab.programs.explain.dry_run import DryRunResult


def write(folder: Path, strategy: str, result: DryRunResult) -> Path:
    """Write the result of `observe` to the file, with the memory over time beside it."""
    path = folder / "explain.json"
    export.write_json(path, to_dict(strategy, result))
    over_time = memory_series.document("predicted", [result.series])
    export.write_json(folder / memory_series.PREDICTED, over_time)
    return path


def to_dict(strategy: str, result: DryRunResult) -> dict[str, Any]:
    """The contents of the file."""
    job = result.job
    by_layout = memory.by_layout(job, result.optimizer)
    kinds = {
        kind: {
            "at_peak": result.peak.at_peak[kind],
            "own_peak": result.peak.own[kind],
            "by_layout": by_layout.get(kind),
        }
        for kind in memory.KINDS
    }
    steps = enumerate((result.first, result.steady), start=1)
    rank = {"rank": job.mesh.rank} if job.mesh.rank else {}
    return {
        "strategy": strategy,
        "mesh": dict(job.mesh.axes),
        **rank,
        "layouts": {name: to_json(layout) for name, layout in job.layouts.items()},
        "memory": {"peak": result.peak.total, "kinds": kinds},
        "calls": [{"step": step} | call_to_dict(call) for step, calls in steps for call in calls],
    }


def call_to_dict(call: Call) -> dict[str, Any]:
    """One collective in the file."""
    return {
        "phase": call.phase,
        "op": call.op,
        "axis": call.axis,
        "ranks": call.size,
        "for": call.unit,
        "about": call.about,
        "payload": call.payload,
        "due": call.due,
        "sent": call.sent,
        "algorithm": call.algorithm,
    }
