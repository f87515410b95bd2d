"""Measure collectives on every rank: each algorithm once per round, in a balanced order."""

import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.agree import check_settings_agree, together
from dist_lab.comm.by_hand.costs import ALGORITHMS, BACKEND
from dist_lab.comm.ledger import backend_bytes
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.observe.console import Progress
from dist_lab.observe.run_dir import make_folder
from dist_lab.processes.ranks import cores
from dist_lab.programs.bench.report import BenchRow, report
from dist_lab.programs.bench.settings import Bench
from dist_lab.programs.compare.ratios import orders
from dist_lab.programs.compare.rounds import block

WARM_UP = 2  # rounds that only connect the ranks and touch the memory; they are not counted


def run(bench: Bench, mesh: Mesh) -> int:
    """Measure every case; rank 0 prints and writes the results."""
    check_settings_agree(bench.to_dict() | {"torch": torch.__version__}, mesh.world)
    with together(mesh.world):
        if mesh.rank == 0:
            folder = make_folder(bench.out, "bench_comm.json")
    rows: list[BenchRow] = []
    cases = [
        (op, algorithms, size) for op, algorithms in bench.pairs() for size in bench.payloads()
    ]
    progress = Progress("measured", len(cases), quiet=mesh.rank > 0, auto_refresh=False)
    with closing(progress):
        for done, (op, algorithms, size) in enumerate(cases, start=1):
            progress.say(f"{op}, {size:,} B")
            rows += measure(op, algorithms, size, bench.rounds, mesh.world)
            progress.reach(done)
    if mesh.rank == 0:
        run_info = {
            "config": bench.to_dict(),
            "world_size": mesh.size,
            "threads": torch.get_num_threads(),
            "cores": cores(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        }
        report(rows, run_info, folder)
    return 0


def measure(op: str, algorithms: list[str], size: int, rounds: int, axis: Axis) -> list[BenchRow]:
    """Times each algorithm in every round: seconds of the slowest rank, after a barrier."""
    unit = 4 * axis.size
    elements = -(-size // unit) * axis.size  # so that all shards have the same number of float32
    run_algorithm = prepare(op, elements, axis)
    seconds: dict[str, list[float]] = {name: [] for name in algorithms}
    for order in orders(len(algorithms), WARM_UP + rounds, seed=0):
        for name in (algorithms[place] for place in order):
            seconds[name] += block(partial(run_algorithm, name), 1, axis)
    return [
        BenchRow(op, name, 4 * elements, *cost(op, name, axis.size, 4 * elements), times[WARM_UP:])
        for name, times in seconds.items()
    ]


def prepare(op: str, elements: int, axis: Axis) -> Callable[[str], Tensor]:
    """Allocates an operation's buffers. Returns a function that runs an algorithm by its name."""
    full, shard = torch.zeros(elements), torch.zeros(elements // axis.size)
    received = torch.zeros(elements if op == "all_to_all" else 0)
    calls: dict[str, Callable[[str], ops.Pending]] = {
        "all_reduce": lambda name: ops.all_reduce_into(full, axis, algorithm=name),
        "all_gather": lambda name: ops.all_gather_into(full, shard, axis, algorithm=name),
        "reduce_scatter": lambda name: ops.reduce_scatter_into(shard, full, axis, algorithm=name),
        "all_to_all": lambda name: ops.all_to_all_into(received, full, axis, algorithm=name),
        "broadcast": lambda name: ops.broadcast_into(full, axis, algorithm=name),
    }
    return lambda name: calls[op](name).wait()


def cost(op: str, name: str, n: int, payload: int) -> tuple[int, int]:
    """The formula's (rounds, bytes sent by the busiest rank) for n ranks."""
    if name == "backend":
        return BACKEND[op](n), max(backend_bytes(op, n, i, payload) for i in range(n))
    algorithm = ALGORITHMS[op][name]
    return algorithm.rounds(n), max(algorithm.sent(n, i, payload // 4) * 4 for i in range(n))
