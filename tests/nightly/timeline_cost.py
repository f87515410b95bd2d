"""The price of a recording: `python tests/nightly/timeline_cost.py [STRATEGY] [SIZE] [ROUNDS]`.

Four ranks train gpt in the same processes, in alternating rounds: with a recording, and without.
Prints the ratio of their steps, and what a recording writes of one step. Goal: at most 1.05.
"""

import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from check_cost import SHAPES, step

import dist_lab
from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.observe.timeline import perfetto
from dist_lab.observe.timeline.recorder import recorded
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD

AXIS = {"fsdp": "fsdp", "tp": "tp", "pp": "pp"}


def body(rank: int, strategy: str, size: str, rounds: int) -> tuple[dict[str, list[float]], Any]:
    """Returns the seconds of each step, and on rank 0 the size of a step in the file."""
    torch.set_num_threads(1)
    rows, tokens = SHAPES[size]
    mesh = dist_lab.init_mesh(**{AXIS.get(strategy, "dp"): 4})
    seed = torch.Generator().manual_seed(mesh.data.index)
    text = torch.randint(256, (rows, tokens + 1), generator=seed)
    batch = [(text[:, :-1].contiguous(), text[:, 1:].contiguous())]
    model = zoo.build("gpt", size, vocab=256, seed=0, dtype=torch.float32)
    options = {}
    if strategy == "pp":
        x, y = batch[0]
        batch = list(zip(x.split(1), y.split(1), strict=True))
        options = {"example_inputs": x[:1]}
    units = (*model.units, *model.ends)
    job = dist_lab.parallelize(model, mesh, strategy, units=units, **options)
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    last = None
    for turn in range(rounds + 2):
        for way in sorted(seconds, reverse=bool(turn % 2)):
            ops.all_reduce(torch.zeros(1), mesh.world)  # a barrier
            with recorded(job) if way == "with" else nullcontext() as recorder:
                began = time.perf_counter()
                step(job, optimizer, batch)
                elapsed = time.perf_counter() - began
            if turn > 1:  # the first rounds make buckets
                seconds[way].append(elapsed)
            last = recorder or last
    assert last is not None
    timeline = last.gather()
    return seconds, timeline and len(json.dumps(list(perfetto.events(timeline))))


def main(strategy: str = "ddp", size: str = "tiny", rounds: str = "40") -> None:
    pool = Pool(PRELOAD)
    results = pool.run(4, body, strategy, size, int(rounds), timeout=900.0)
    pool.close()
    # The slowest rank of each round: a step is as long as that.
    slowest = {
        way: [max(times) for times in zip(*(seconds[way] for seconds, _ in results), strict=True)]
        for way in ("without", "with")
    }
    ratios = [a / b for a, b in zip(slowest["with"], slowest["without"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{strategy}, gpt {size}, 4 ranks: {statistics.median(slowest['without']) * 1e3:.1f} ms a "
        f"step; recorded {middle:.3f} times (quartiles {low:.3f} to {high:.3f}, {rounds} rounds); "
        f"{results[0][1] / 1e3:.0f} kB of events a step"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
