"""The price of owner mode: Muon's Newton-Schulz on fsdp, and its step beside adamw's.

    torchrun --nproc_per_node=4 tests/nightly/owner_mode.py [--size 25m] [--rounds 8]

The same ranks take turns with three things, so that all meet the same machine: a step of muon, a
step of adamw, and Newton-Schulz of all matrices on every rank at once, which is what a rank would
compute without owners. Prints medians over the rounds, each of the slowest rank:

    Newton-Schulz in owner mode / on every rank        to be 0.4 or less with 4 ranks
    step of muon                                       to be at most 1.2 step of adamw
                                                       + a quarter of Newton-Schulz on every rank
"""

import argparse
import os
import statistics
import sys
import time

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.optim import muon
from dist_lab.programs.cli import setup
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.train import loop


class Stopwatch:
    """Adds up the seconds that a function takes."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments):
        began = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - began
        return result


def slowest(seconds: float, mesh: Mesh) -> float:
    return float(ops.all_reduce(torch.tensor(seconds), mesh.world, "max"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--size", default="25m")
    known, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    mesh = init_mesh(fsdp=int(os.environ["WORLD_SIZE"]))
    newton_schulz = Stopwatch(muon.orthogonalize)
    muon.orthogonalize = newton_schulz
    runs = {}
    for name in ("adamw", "muon"):
        argv = ["--mesh", f"fsdp={mesh.size}", "--optimizer", name, "--size", known.size, *flags]
        config = parse(argv).fitted(mesh.size)
        data = setup.open_run(config, mesh)
        job = setup.build(config, mesh, data)
        runs[name] = config, data, job, loop.make_optimizer(job, config)
    matrices = [
        torch.randn(layout.shape)
        for name, layout in runs["muon"][2].layouts.items()
        if len(layout.shape) == 2 and "layers" in name
    ]
    times: dict[str, list[float]] = {n: [] for n in ("adamw", "muon", "owners", "everywhere")}
    for number in range(1, known.rounds + 2):
        for name, (config, data, job, optimizer) in runs.items():
            rows = data.batch(number, loop.own_rows(config.batch, job))
            newton_schulz.seconds = 0.0
            ops.all_reduce(torch.zeros(1), mesh.world)  # start together
            began = time.perf_counter()
            loop.take_step(job, optimizer, *rows, number, config)
            times[name].append(slowest(time.perf_counter() - began, mesh))
            if name == "muon":
                times["owners"].append(slowest(newton_schulz.seconds, mesh))
        ops.all_reduce(torch.zeros(1), mesh.world)
        began = time.perf_counter()
        newton_schulz.function(matrices, [None] * len(matrices), list)
        times["everywhere"].append(slowest(time.perf_counter() - began, mesh))
    if mesh.rank == 0:
        median = {name: statistics.median(values[1:]) * 1e3 for name, values in times.items()}
        allowed = 1.2 * median["adamw"] + median["everywhere"] / 4
        print(", ".join(f"{name} {value:.0f} ms" for name, value in median.items()))
        print(f"Newton-Schulz: {median['owners'] / median['everywhere']:.2f} (0.40 allowed)")
        print(f"step of muon: {median['muon']:.0f} ms ({allowed:.0f} allowed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
