"""Folders as finished runs and comparisons leave them, made without training."""

import json
import math
import random
from pathlib import Path
from typing import Any

from dist_lab.layout.layout import Layout, OnlyOn, Shard, to_json
from dist_lab.observe import pipeline_plot
from dist_lab.observe.report.folder import FORMAT
from dist_lab.observe.theory import bubbles
from dist_lab.observe.timeline import perfetto
from dist_lab.observe.timeline.timeline import CallSpan, RankTimeline, Segment, StepSpan, Timeline
from dist_lab.parallel.schedules.library import make
from dist_lab.parallel.schedules.simulate import timeline
from dist_lab.programs.cli.config import Config

STEPS, LOG_EVERY = 200, 10
MESH = {"pp": 2, "fsdp": 2, "tp": 2}
KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "gathered",
    "buffers",
    "module_buffers",
    "activations",
)


def summary_of(name: str = "runs/001-mix", **changes: Any) -> dict[str, Any]:
    """The summary of 200 steps on 8 ranks, in which two steps were slow."""
    rng = random.Random(0)
    times = [round(rng.gauss(300, 6), 3) for _ in range(STEPS)]
    times[:2], times[60], times[150] = [700.0, 520.0], 900.0, 480.0
    peak = dict(zip(KINDS, (1e6, 1.2e6, 2e6, 5e5, 3e5, 0, 9e6), strict=True))
    peak = {kind: int(size) for kind, size in peak.items()}
    config = Config(mesh=MESH, steps=STEPS, microbatches=8, schedule="zb").to_dict()
    calls = [
        ("forward", "all_gather", "fsdp", 2, 16, 2_000_000, 1_000_000),
        ("backward", "all_gather", "fsdp", 2, 16, 2_000_000, 1_000_000),
        ("backward", "reduce_scatter", "fsdp", 2, 8, 1_000_000, 1_000_000),
        ("forward", "all_reduce", "tp", 2, 64, 8_000_000, 8_000_000),
        ("forward", "send", "pp", 2, 8, 500_000, 500_000),
    ]
    share = {"all_gather": 0.5, "reduce_scatter": 0.5, "all_reduce": 1.0, "send": 1.0}
    traffic = [
        {"phase": phase, "op": op, "axis": axis, "ranks": ranks, "calls": count, "payload": payload,
         "formula": share[op] * payload, "due": sent, "sent": sent, "blocked_ms": 3.25}
        for phase, op, axis, ranks, count, payload, sent in calls
    ]  # fmt: skip
    return {
        "config": config, "mesh": MESH, "world_size": 8, "threads": 1, "cores": 2,
        "parameters": 1_050_000,
        "data": {"name": "stdlib", "sha256": "e4266d7c2a78" * 5, "image": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "strategies": "pp x fsdp x tp@hand",
        "about": "", "layouts": layouts(), "out": name, "format": FORMAT, "steps": STEPS,
        "step_times_ms": {"first_step": 1, "warm_up": 2, "ms": times},
        "median": {"step_ms": 300.2, "samples_per_s": 106.6, "tokens_per_s": 13644.9,
                   "comm_ms": 60.4, "comm_payload_bytes": 13_500_000,
                   "comm_sent_bytes": 11_500_000},
        "peak_memory_bytes": sum(peak.values()), "peak_memory": {"at_peak": peak, "own_peak": peak},
        "by_layout": {"parameters": 1_000_000, "gradients": 1_000_000, "optimizer": 2_000_000},
        "traffic": traffic, "stage_work_ms": [200.0, 240.0],
        "ranks": {"work_ms": [200.0 + 5 * rank for rank in range(8)],
                  "wait_ms": [100.0 - 5 * rank for rank in range(8)]},
        "slow_ranks": [{"rank": 7, "first_step": 100, "last_step": 140, "work_ms": 400.0,
                        "others_work_ms": 200.0, "lost_s": 4.5}],
        "flops_per_step": 8e9, "model_flops_per_step": 8e9, "peak_flops_per_s": 7.5e10,
        "mfu": 0.355, "final_loss": 1.6233, "final_val_loss": 1.5973, "pipeline": None,
    } | changes  # fmt: skip


def layouts() -> dict[str, Any]:
    """Of a small pipeline of two stages with two blocks each."""
    import torch

    def layout(stage: int, *shape: int, dim: int | None = None) -> dict[str, Any]:
        tp = (("tp", Shard(dim)),) if dim is not None else ()
        splits = (("pp", OnlyOn((stage,))), *tp, ("fsdp", Shard(0)))
        return to_json(Layout(torch.Size(shape), torch.float32, splits, ()))

    found = {"model.embed_tokens.weight": layout(0, 256, 128, dim=0)}
    for block in range(4):
        stage, name = block // 2, f"model.layers.{block}"
        found[f"{name}.self_attn.q_proj.weight"] = layout(stage, 128, 128, dim=0)
        found[f"{name}.self_attn.o_proj.weight"] = layout(stage, 128, 128, dim=1)
        found[f"{name}.input_layernorm.weight"] = layout(stage, 128)
    return found | {"lm_head.weight": layout(1, 256, 128, dim=0)}


def write_run(folder: Path, **changes: Any) -> Path:
    """Writes the folder of a run. Returns it."""
    folder.mkdir(parents=True)
    schedule = make("zb", 2, 8)
    rows = timeline(schedule)
    data = pipeline_plot.to_json(rows, "zb") | {"ideal": pipeline_plot.ideal_to_json(schedule)}
    (folder / "pipeline.json").write_text(json.dumps(data))
    perfetto.write(timeline_of(), folder / "timeline.json")
    (folder / "memory.json").write_text(json.dumps(memory_over_time()))
    summary = summary_of(str(folder), **{"pipeline": bubbles(rows, schedule), **changes})
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in [1, *range(LOG_EVERY, STEPS + 1, LOG_EVERY)]:
            loss = 1.5 + 4.5 * math.exp(-step / 40)
            row = {"step": step, "loss": loss, "grad_norm": 0.8, "lr": 2e-3}
            file.write(
                json.dumps(row | ({"val_loss": loss + 0.1} if step % 50 == 0 else {})) + "\n"
            )
    return folder


LIBRARY = f"torch Library({80 * 'x'})"  # a long word


def write_comparison(folder: Path, strategies: int = 5, rounds: int = 24) -> Path:
    """Writes the folder of a comparison. Returns it."""
    from dist_lab.programs.compare import files
    from dist_lab.programs.compare.report import CompareReport, ContenderRow, Traffic

    folder.mkdir(parents=True)
    rng = random.Random(1)
    rows = []
    for i in range(strategies):
        peak = {kind: 10_000 * (i + j) for j, kind in enumerate(KINDS)}
        traffic = [
            Traffic(f"{op} fsdp", 8, 4e6, 3e6, 3e6) for op in ("all_gather", "reduce_scatter")
        ]
        rows.append(ContenderRow(
            label=f"strategy{i}", strategy="fsdp", impl="hand", mesh={"fsdp": 4}, mix="fsdp@hand",
            about=LIBRARY if i == 1 else "", processes=4,
            losses=[6.0 * math.exp(-n / 90) for n in range(4 + 3 * rounds)],
            rounds=[[abs(rng.gauss(0.3 + i / 20, 0.01)) for _ in range(3)] for _ in range(rounds)],
            blocked=[0.05] * 10, peak_memory_bytes=sum(peak.values()),
            peak_memory={"at_peak": peak, "own_peak": peak}, flops_per_step=8e9,
            model_flops_per_step=8e9, traffic=traffic, kernel_bytes=6.1e6,
        ))  # fmt: skip
    names = "config", "mesh", "world_size", "threads", "cores", "parameters", "data", "versions"
    setting = {name: summary_of()[name] for name in names}
    report = CompareReport(
        setting,
        "strategy0",
        "tokens/s",
        4096,
        7.5e10,
        rows,
        {"tp": "cannot run here, because of a < b"},
    )
    files.write(report, folder)
    return folder


def timeline_of(ranks: int = 8, steps: int = 3, units: int = 40) -> Timeline:
    """A timeline in which every rank computes some units, and waits a little for each."""
    rng, found = random.Random(2), []
    for rank in range(ranks):
        segments, calls, spans, now = [], [], [], 1000 * rank
        for step in range(10, 10 + steps):
            began = now
            for n in range(units):
                phase = "forward" if n < units // 2 else "backward"
                unit, work, wait = f"model.layers.{n % 4}", rng.randint(10**6, 10**7), 400_000
                op = "all_gather" if n < units // 2 else "reduce_scatter"
                calls.append(CallSpan(
                    len(calls), op, "fsdp", 2, "", 2_000_000, 1_000_000, phase, unit, "ring",
                    "fsdp.py:1", step, now, now + work + wait, wait, work, (rank + 1) % ranks,
                ))  # fmt: skip
                kind = "waiting" if n % 3 else "idle"
                segments.append(Segment(now, now + work, phase, phase, unit, None))
                segments.append(
                    Segment(now + work, now + work + wait, kind, phase, unit, len(calls) - 1)
                )
                now += work + wait
            spans.append(StepSpan(step, began, now))
        place = f"pp={rank // 4} fsdp={rank // 2 % 2} tp={rank % 2}"
        found.append(RankTimeline(rank, place, "here", tuple(spans), tuple(segments), tuple(calls)))
    about = {"tool": "dist_lab", "format": 1, "library": "", "mesh": MESH, "world_size": ranks}
    return Timeline(about, tuple(found))


def memory_over_time(ranks: int = 8, positions: int = 200) -> dict[str, Any]:
    """The memory.json of a step whose activations grow in forward and shrink in backward."""
    at = list(range(0, 10 * positions, 10))
    entries = []
    for rank in range(ranks):
        grows = [min(i, positions - i) * 90_000 for i in range(positions)]
        series = {k: [100_000 * j] * positions for j, k in enumerate(KINDS)} | {
            "activations": grows
        }
        peak = max(range(positions), key=lambda i, s=series: sum(row[i] for row in s.values()))
        by_kind = {kind: values[peak] for kind, values in series.items()}
        alive = [{"kind": "activations", "of": f"model.layers.{n}", "when": "forward",
                  "bytes": 2_000_000, "tensors": 3} for n in range(4)]  # fmt: skip
        entries.append({
            "rank": rank, "place": f"tp={rank % 2}", "step": 2, "changes": 10 * positions, "at": at,
            "bytes": series,
            "phases": [[0, "forward", "model.layers.0"], [900, "backward", "lm_head"]],
            "peak": {"at": at[peak], "total": sum(by_kind.values()), "by_kind": by_kind,
                     "alive": alive},
        })  # fmt: skip
    return {"tool": "dist_lab", "format": 1, "source": "measured", "kinds": list(KINDS),
            "ranks": entries}  # fmt: skip
