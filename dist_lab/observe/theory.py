"""A run measured against theory: bytes, memory, the pipeline's idle time, and the MFU.

Each number that a formula gives is put beside the measured one. Where they differ, one sentence
names the likely cause. All numbers are those of summary.json, so a finished run can be judged again
from its files (`against_theory`). The formulas:

    bytes sent      of each collective's algorithm: `Call.due`, comm/ledger.py
    least bytes     the published, bandwidth-optimal formula of the same payload: `formula_bytes`
    memory          local elements times bytes per element, from the layouts: `memory.by_layout`
    idle pipeline   the schedule, simulated with messages that take no time: schedules/simulate.py
    MFU             the measured peak of a matmul on all ranks at once: observe/flops.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dist_lab.mesh.topology import DATA_AXES
from dist_lab.observe.flops import in_percent, why_no_mfu
from dist_lab.observe.stragglers import UNBALANCED
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.simulate import TimedAction, bubble, idle_shares

Summary = Mapping[str, Any]
NEAR = 0.03  # of all time: a pipeline that is so much longer idle than its schedule is as computed
PADDING = 0.01  # of a kind of memory: shards are padded to equal lengths
MUCH_WAITING = 0.25  # of a step: above, it is the cause of a low MFU
UNKNOWN = "tensors beside the shards that the layouts know of, such as a copy in another dtype"
STATE = {"optimizer": "optimizer state"}


@dataclass(frozen=True)
class Check:
    """A measured number and the computed one, both as text with units.

    Attributes:
        exact: the two are equal, or as near as such a number can be.
        cause: why they differ; "" if they are equal to the last byte.
        as_expected: a difference that such a run always has, or can have; False: look into it.
    """

    name: str
    measured: str
    computed: str
    exact: bool
    cause: str = ""
    as_expected: bool = True

    @property
    def sentence(self) -> str:
        """How the two differ, and why."""
        return f"{self.name} {self.measured}, not {self.computed}: {self.cause}"


def bubbles(rows: Sequence[Sequence[TimedAction]], schedule: Schedule) -> dict[str, float]:
    """The idle share of a measured pipeline step, and that of its simulated schedule."""
    return {"idle_share": fmean(idle_shares(rows)), "schedule_idle_share": bubble(schedule)}


def against_theory(summary: Summary) -> list[Check]:
    """Returns a check of each number that theory gives for this run, in the order of the report."""
    return [*_bytes(summary), *_memory(summary), *_pipeline(summary), *_mfu(summary)]


def in_one_line(checks: Sequence[Check]) -> str:
    """What is as computed, and what is not and why.

    >>> in_one_line([Check("bytes sent", "2 B", "2 B", True), Check("MFU", "9%", "1", False, "x")])
    'against theory: as computed: bytes sent; MFU 9%, not 1: x'
    """
    exact = ", ".join(check.name for check in checks if check.exact)
    parts = [f"as computed: {exact}"] if exact else []
    parts += [check.sentence for check in checks if not check.exact]
    return f"against theory: {'; '.join(parts) or 'nothing to compare'}"


def _bytes(summary: Summary) -> list[Check]:
    rows = summary["traffic"]
    if not rows:  # one process, or a library's own collectives
        return []
    sent, due, least = (sum(row[name] for row in rows) for name in ("sent", "due", "formula"))
    checks = [
        Check(
            "bytes sent", in_mb(sent), in_mb(due), sent == due,
            "" if sent == due else "a collective sent more or less than its algorithm needs, which "
            "is a bug of the algorithm or of its count",
            as_expected=sent == due,
        )
    ]  # fmt: skip
    if sent > 1.01 * least:
        worst = max(rows, key=lambda row: row["sent"] - row["formula"])
        cause = _wasted(worst, summary["config"])
        name = "bytes against the optimum"
        checks.append(Check(name, in_mb(sent), in_mb(least), False, cause))
    return checks


def _wasted(row: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Why a collective sends more than the published formula."""
    call = f"{row['op']} over {row['axis']}"
    if row["op"] == "reduce_scatter" and config["backend"] != "nccl":
        return f"gloo's {call} runs an all_reduce inside, which sends everything twice"
    if row["op"] == "broadcast":
        return f"rank 0 is the root of the {call}, and sends more than the mean of the ranks"
    return f"{call} has an algorithm that is not optimal for bandwidth (--collectives)"


def _memory(summary: Summary) -> list[Check]:
    if summary["by_layout"] is None:
        return []
    checks = []
    for kind, computed in summary["by_layout"].items():
        measured = summary["peak_memory"]["own_peak"][kind]
        name, padding = STATE.get(kind, kind), measured - computed
        exact = 0 <= padding <= PADDING * computed
        cause = f"{padding:,} bytes of padding and flags" if padding else ""
        if not exact:
            cause = _other_memory(kind, padding > 0, summary)
        checks.append(
            Check(
                name, in_mb(measured), in_mb(computed), exact, cause, as_expected=cause != UNKNOWN
            )
        )
    return checks


def _other_memory(kind: str, more: bool, summary: Summary) -> str:
    """Why a kind of memory is not what the layouts say."""
    if summary["config"].get("offload") and not more:
        return "--offload keeps it outside of memory"
    if not more:
        return "not all of it is alive at the same time"
    if kind == "gradients":
        layouts = summary["layouts"].values()
        if any(axis in DATA_AXES for layout in layouts for axis, _ in layout["splits"]):
            return "backward holds whole gradients until they are reduced to shards"
        return "a micro-batch's gradient is alive beside the sum to which it is added"
    return UNKNOWN


def _pipeline(summary: Summary) -> list[Check]:
    if summary["pipeline"] is None:
        return []
    measured, ideal = (summary["pipeline"][n] for n in ("idle_share", "schedule_idle_share"))
    near = measured <= ideal + NEAR
    cause = "" if near else _idle(summary)
    return [Check("idle pipeline", f"{measured:.1%}", f"{ideal:.1%}", near, cause)]


def _idle(summary: Summary) -> str:
    """Why a pipeline is longer idle than its schedule."""
    stages = summary["stage_work_ms"] or [0.0]
    if max(stages) > UNBALANCED * fmean(stages):
        longest = stages.index(max(stages))
        times = max(stages) / fmean(stages)
        return f"stages are not balanced: pp={longest} works {times:.1f} times the mean"
    if summary["world_size"] * summary["threads"] > summary["cores"]:
        return (
            f"{summary['world_size']} ranks share {summary['cores']} cores, so an action takes "
            "longer while others compute"
        )
    return "messages take time, which the schedule does not count"


def _mfu(summary: Summary) -> list[Check]:
    """The MFU. 100% is a bound that no run reaches, so it is never as computed."""
    if summary["mfu"] is None:
        return [Check("MFU", "-", "100%", False, why_no_mfu(summary["about"]))]
    median, peak = summary["median"], f"{summary['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s"
    waiting = median["comm_ms"] / median["step_ms"]
    cause = "small matrices, and work that is no matmul: norms, softmax, optimizer, Python"
    if waiting > MUCH_WAITING:
        cause = f"{waiting:.0%} of a step is waiting for others"
    return [Check("MFU", f"{in_percent(summary['mfu'])} of {peak}", "100%", False, cause)]


def in_mb(number: float) -> str:
    """
    >>> in_mb(5_902_000), in_mb(1234.0)
    ('5.90 MB', '1.23 kB')
    """
    return f"{number / 1e6:,.2f} MB" if number >= 1e5 else f"{number / 1e3:,.2f} kB"
