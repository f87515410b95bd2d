"""explain.json: where each parameter lies, what rank 0 keeps, and every collective, as plain data.

    {"strategy": "fsdp@hand", "mesh": {"fsdp": 4},
     "layouts": {"norm.weight": {"shape": [128], "dtype": "float32",
                 "splits": [["fsdp", {"shard": 0, "copies": 1}]], "partial": [{"axis": "fsdp"}]}},
     "memory": {"peak": 1, "kinds": {"parameters": {"at_peak": 1, "own_peak": 1, "by_layout": 1}}},
     "calls": [{"step": 1, "phase": "forward", "op": "all_gather", "payload": 1, "sent": 1, ...}]}

Bytes everywhere. Step 1 is the first, in which a strategy may learn; step 2 is like all others.
Nothing in it depends on the moment, the machine or the place in the code.
"""

from pathlib import Path
from typing import Any

from dist_lab.comm.ledger import Call
from dist_lab.layout.layout import to_json
from dist_lab.observe import export, memory
from dist_lab.programs.explain.dry_run import Seen


def write(folder: Path, strategy: str, seen: Seen) -> Path:
    """Write the file for two steps that `observe` has seen. Returns its path."""
    path = folder / "explain.json"
    export.write_json(path, described(strategy, seen))
    return path


def described(strategy: str, seen: Seen) -> dict[str, Any]:
    """The contents of the file."""
    job = seen.job
    by_layout = memory.by_layout(job, seen.optimizer)
    kinds = {
        kind: {
            "at_peak": seen.peak.at_peak[kind],
            "own_peak": seen.peak.own[kind],
            "by_layout": by_layout.get(kind),
        }
        for kind in memory.KINDS
    }
    steps = enumerate((seen.first, seen.steady), start=1)
    return {
        "strategy": strategy,
        "mesh": dict(job.mesh.axes),
        "layouts": {name: to_json(layout) for name, layout in job.layouts.items()},
        "memory": {"peak": seen.peak.total, "kinds": kinds},
        "calls": [{"step": step} | call(each) for step, calls in steps for each in calls],
    }


def call(call: Call) -> dict[str, Any]:
    """One collective."""
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
