"""The clock, on every rank: each algorithm once a round, the order changing from round to round."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from dist_lab.bench.report import Row, report
from dist_lab.bench.settings import Bench
from dist_lab.comm import ops
from dist_lab.comm.agree import check_settings_agree, together
from dist_lab.comm.costs import ALGORITHMS, BACKEND
from dist_lab.comm.ledger import backend_bytes
from dist_lab.errors import UserError
from dist_lab.mesh import Axis, Mesh
from dist_lab.processes.ranks import cores

WARM_UP = 2  # rounds that connect ranks and touch memory, and do not count


def run(bench: Bench, mesh: Mesh) -> int:
    """Measure, and let rank 0 show and write what came of it."""
    check_settings_agree(bench.to_dict() | {"torch": torch.__version__}, mesh.world)
    folder = Path(bench.out)
    with together(mesh.world):
        if mesh.rank == 0:
            make_folder(folder)
    console = Console(file=sys.stderr)
    rows: list[Row] = []
    for op, names in bench.pairs():
        for size in bench.payloads():
            if mesh.rank == 0 and console.is_terminal:
                console.print(f"{op}, {size:,} B", highlight=False)
            rows += measure(op, names, size, bench.rounds, mesh.world)
    if mesh.rank == 0:
        setting = {
            "config": bench.to_dict(),
            "world_size": mesh.size,
            "threads": torch.get_num_threads(),
            "cores": cores(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        }
        report(rows, setting, folder)
    return 0


def measure(op: str, names: list[str], size: int, rounds: int, axis: Axis) -> list[Row]:
    """Seconds of each round, of the slowest rank, from the moment when all are ready."""
    unit = 4 * axis.size
    elements = -(-size // unit) * axis.size  # equal pieces of whole float32
    work = prepare(op, elements, axis)
    seconds = torch.zeros(len(names), WARM_UP + rounds, dtype=torch.float64)
    for turn in range(WARM_UP + rounds):
        for k in range(len(names)):
            which = (turn + k) % len(names)
            ops.all_reduce(torch.zeros(1), axis, algorithm="backend")  # all are here
            began = time.perf_counter()
            work(names[which])
            seconds[which, turn] = time.perf_counter() - began
    slowest = ops.all_reduce(seconds, axis, "max")[:, WARM_UP:].tolist()
    return [
        Row(op, name, 4 * elements, *cost(op, name, axis.size, 4 * elements), times)
        for name, times in zip(names, slowest, strict=True)
    ]


def prepare(op: str, elements: int, axis: Axis) -> Callable[[str], Tensor]:
    """The operation on memory that is there already, as a function of the algorithm's name."""
    whole, piece = torch.zeros(elements), torch.zeros(elements // axis.size)
    other = torch.zeros(elements if op == "all_to_all" else 0)
    calls: dict[str, Callable[[str], ops.Pending]] = {
        "all_reduce": lambda name: ops.all_reduce_into(whole, axis, algorithm=name),
        "all_gather": lambda name: ops.all_gather_into(whole, piece, axis, algorithm=name),
        "reduce_scatter": lambda name: ops.reduce_scatter_into(piece, whole, axis, algorithm=name),
        "all_to_all": lambda name: ops.all_to_all_into(other, whole, axis, algorithm=name),
        "broadcast": lambda name: ops.broadcast_into(whole, axis, algorithm=name),
    }
    return lambda name: calls[op](name).wait()


def cost(op: str, name: str, n: int, payload: int) -> tuple[int, int]:
    """(rounds, bytes that the busiest rank sends) by formula, of N ranks."""
    if name == "backend":
        return BACKEND[op](n), max(backend_bytes(op, n, i, payload) for i in range(n))
    algorithm = ALGORITHMS[op][name]
    return algorithm.rounds(n), max(algorithm.sent(n, i, payload // 4) * 4 for i in range(n))


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench_comm.json").write_text(json.dumps({}), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror} (--out); give a folder that you may "
            "write to"
        ) from None
