"""explain.json: where each parameter lies, what rank 0 keeps, and every collective, as plain data.

    {"strategy": "fsdp@hand", "mesh": {"fsdp": 4},
     "layouts": {"norm.weight": {"shape": [128], "dtype": "float32",
                 "splits": [["fsdp", {"shard": 0, "copies": 1}]], "partial": [{"axis": "fsdp"}]}},
     "memory": {"peak": 1, "kinds": {"parameters": {"at_peak": 1, "own_peak": 1, "by_layout": 1}}},
     "calls": [{"step": 1, "phase": "forward", "op": "all_gather", "payload": 1, "sent": 1, ...}]}

Bytes everywhere. Step 1 is the first, in which a strategy may learn; step 2 is like all others.
Nothing in it depends on the moment, the machine or the place in the code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lab.comm.ledger import Call
from dist_lab.job import Job
from dist_lab.layout import Flat, Laid, On, Placement, Shard
from dist_lab.mesh import Axis, Mesh
from dist_lab.observe import memory


def write(folder: Path, strategy: str, seen: Any) -> Path:
    """Write the file for two steps that `explain.observe` has seen. Returns its path."""
    path = folder / "explain.json"
    path.write_text(json.dumps(described(strategy, seen), indent=1) + "\n", encoding="utf-8")
    return path


def described(strategy: str, seen: Any) -> dict[str, Any]:
    """The contents of the file."""
    job: Job = seen.job
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
        "layouts": {name: layout(laid, job.mesh) for name, laid in job.laid.items()},
        "memory": {"peak": seen.peak.total, "kinds": kinds},
        "calls": [{"step": step} | call(each) for step, calls in steps for each in calls],
    }


def call(call: Call) -> Mapping[str, Any]:
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


def layout(laid: Laid, mesh: Mesh) -> dict[str, Any]:
    """How one parameter lies, by axis name."""
    together = [_owed(axis, mesh) for axis in laid.sum_over]
    tied = next((each["positions"] for each in together if "positions" in each), None)
    return {
        "shape": list(laid.shape),
        "dtype": str(laid.dtype).removeprefix("torch."),
        "splits": [[_base(axis), _placement(axis, how, mesh, tied)] for axis, how in laid.splits],
        "partial": together,
    }


def _base(axis: Axis) -> str:
    return axis.name.partition("[")[0]


def _placement(axis: Axis, how: Placement, mesh: Mesh, tied: Any) -> dict[str, Any]:
    if isinstance(how, Shard):
        return {"shard": how.dim, "copies": mesh[_base(axis)].size // axis.size}
    if isinstance(how, Flat):
        return {"flat_shard": [how.offset, how.piece]}
    assert isinstance(how, On)
    return {"only_on": tied or [how.index]}


def _owed(axis: Axis, mesh: Mesh) -> dict[str, Any]:
    """The axis of a sum; which positions of it take part, or that so many neighbours do."""
    base = mesh[_base(axis)]
    if axis.size == base.size:
        return {"axis": base.name}
    positions = [base.ranks.index(rank) for rank in axis.ranks]
    if base.name == "tp":
        return {"axis": base.name, "neighbours": axis.size}
    return {"axis": base.name, "positions": positions}
