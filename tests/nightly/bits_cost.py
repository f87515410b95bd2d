"""The price of one order of additions: `python tests/nightly/bits_cost.py [STRATEGY] [SIZE]`.

Four ranks train gpt twice in the same processes, in alternating rounds and with two micro-batches:
in any order, with a fused AdamW, and with `reduce_order="fixed"`. Prints the ratio of their steps.
"""

import statistics
import sys
import time

import torch

import dist_lab
from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD

SHAPES = {"tiny": (8, 128, 24), "small": (4, 128, 12), "25m": (4, 64, 8)}  # rows, tokens, rounds
OPTIONS = {None: {"fused": True}, "fixed": {}}  # reduce_order -> options of AdamW


def body(rank: int, strategy: str, size: str) -> dict[str | None, list[float]]:
    """Returns the seconds of each step."""
    torch.set_num_threads(1)
    rows, tokens, rounds = SHAPES[size]
    mesh = dist_lab.init_mesh(**{"fsdp" if strategy == "fsdp" else "dp": 4})
    jobs = {}
    for order, options in OPTIONS.items():
        model = zoo.build("gpt", size, vocab=256, seed=0, dtype=torch.float32)
        units = (*model.units, *model.ends)
        job = dist_lab.parallelize(model, mesh, strategy, units=units, reduce_order=order)
        jobs[order] = job, job.optimizer(torch.optim.AdamW, lr=1e-3, **options)
    text = torch.randint(256, (rows, tokens + 1), generator=torch.Generator().manual_seed(rank))
    chunks = (t.contiguous().chunk(2) for t in (text[:, :-1], text[:, 1:]))
    microbatches = list(zip(*chunks, strict=True))
    seconds: dict[str | None, list[float]] = {order: [] for order in OPTIONS}
    for turn in range(rounds + 1):
        for order in list(OPTIONS)[:: -1 if turn % 2 else 1]:
            ops.all_reduce(torch.zeros(1), mesh.world)  # a barrier
            began = time.perf_counter()
            step(*jobs[order], microbatches)
            if turn:  # the first round makes buckets
                seconds[order].append(time.perf_counter() - began)
    return seconds


def step(job: dist_lab.Job, optimizer: torch.optim.Optimizer, microbatches: list) -> None:
    total = job.count(sum(y.numel() for _, y in microbatches))
    job.run(microbatches, lambda output, y: dist_lab.cross_entropy_sum(output, y) / total)
    job.finish()
    job.clip_grad_norm(1.0)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


def main(strategy: str = "ddp", size: str = "tiny") -> None:
    pool = Pool(PRELOAD)
    seconds = pool.run(4, body, strategy, size, timeout=600.0)[0]
    pool.close()
    ratios = [fixed / any_ for any_, fixed in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    any_order, fixed = (statistics.median(each) * 1e3 for each in seconds.values())
    print(
        f"{strategy}, gpt {size}: {any_order:.0f} ms a step in any order, {fixed:.0f} ms in a "
        f"fixed one: {middle:.2f} times (quartiles {low:.2f} to {high:.2f}, {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
