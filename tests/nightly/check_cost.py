"""The price of the board: `python tests/nightly/check_cost.py [--strategy ddp] [--size tiny]`.

Four ranks train gpt in the same processes, in alternating rounds: without a board, with it, as
every run has it, and with `--check-collectives`. Prints the ratios of their steps to those without,
and what a single call costs. Goal: with the check at most 1.05 at gpt tiny.
"""

import argparse
import statistics
import time
import timeit

import evidence
import torch

import dist_lab
from dist_lab import zoo
from dist_lab.comm import ops
from dist_lab.comm.check import order_check
from dist_lab.mesh.mesh import Mesh
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD

SHAPES = {"tiny": (8, 128), "small": (4, 128), "25m": (4, 64)}  # rows and tokens of a rank
WAYS = ("without", "board", "check")


def body(
    rank: int, strategy: str, size: str, rounds: int
) -> tuple[dict[str, list[float]], float, int]:
    """Returns the seconds of each step, those of a call on the board, and the calls of a step."""
    torch.set_num_threads(1)
    rows, tokens = SHAPES[size]
    jobs = {way: build(strategy, size, way) for way in WAYS}
    text = torch.randint(256, (rows, tokens + 1), generator=torch.Generator().manual_seed(rank))
    batch = [(text[:, :-1].contiguous(), text[:, 1:].contiguous())]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 2):
        order = [WAYS[(turn + i) % len(WAYS)] for i in range(len(WAYS))]
        for way in order:
            job, optimizer = jobs[way]
            ops.all_reduce(torch.zeros(1), job.mesh.world)  # a barrier
            began = time.perf_counter()
            with job.mesh.comm.ledger.recording() as calls:
                step(job, optimizer, batch)
            if turn > 1:  # the first rounds make buckets
                seconds[way].append(time.perf_counter() - began)
    return seconds, cost_of_a_call(jobs["board"][0].mesh), len(calls)


def build(strategy: str, size: str, way: str) -> tuple[dist_lab.Job, torch.optim.Optimizer]:
    axis = "fsdp" if strategy == "fsdp" else "dp"
    mesh = dist_lab.init_mesh(**{axis: 4}, check=way == "check")
    if way == "without":
        mesh.comm.board = None
    model = zoo.build("gpt", size, vocab=256, seed=0, dtype=torch.float32)
    job = dist_lab.parallelize(model, mesh, strategy, units=(*model.units, *model.ends))
    return job, job.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)


def step(job: dist_lab.Job, optimizer: torch.optim.Optimizer, batch: list) -> None:
    total = job.count(batch[0][1].numel())
    job.run(batch, lambda output, y: dist_lab.cross_entropy_sum(output, y) / total)
    job.finish()
    job.clip_grad_norm(1.0)
    optimizer.step()
    job.after_step()
    optimizer.zero_grad()


def cost_of_a_call(mesh: Mesh, repeats: int = 20) -> float:
    """The seconds of this thread that the board takes from one call, on all ranks at once."""
    comm, axis = mesh.comm, mesh.world
    call = comm.call("all_reduce", axis.name, axis.size, "float32[1000], sum", 4000, 4000)

    def on_the_board() -> None:
        order_check(call, axis)
        assert comm.board is not None
        comm.board.wait_begins(call.number)
        comm.board.wait_ends(call.number)

    times = timeit.repeat(on_the_board, number=500, repeat=repeats, timer=time.thread_time)
    return min(times) / 500


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--size", default="tiny", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=40)
    evidence.add_out(parser)
    known = parser.parse_args()
    strategy, size, rounds = known.strategy, known.size, known.rounds
    pool = Pool(PRELOAD)
    seconds, call, calls = pool.run(4, body, strategy, size, rounds, timeout=900.0)[0]
    pool.close()
    base = seconds["without"]
    print(
        f"{strategy}, gpt {size}, 4 ranks: {statistics.median(base) * 1e3:.1f} ms a step of "
        f"{calls} collectives without a board; the board takes {call * 1e6:.1f} us a call"
    )
    for way in WAYS[1:]:
        ratios = [each / plain for each, plain in zip(seconds[way], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        times = f"{middle:.3f} times (quartiles {low:.3f} to {high:.3f}, {rounds} rounds)"
        print(f"  {way:<6} {times}")
        if way == "check":
            evidence.note(known.out, "R9", f"{strategy}, gpt {size}", times)


if __name__ == "__main__":
    main()
