"""The price of a checkpoint: a save beside plain files, and a step beside one with a save.

    torchrun --nproc_per_node=4 tests/nightly/save_cost.py [--size 124m] [--rounds 6]

The same ranks take turns, so that all meet the same machine and disk. Prints medians over the
rounds, each of the slowest rank:

    save / plain    job.save, beside each rank writing the same tensors with safetensors and fsync;
                    to be 1.3 or less
    step / plain    the step in which a save in the background begins, beside one without; to be 1.1
                    or less. And all that a save costs: how much longer that step and two more take
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import evidence
import torch
from safetensors.torch import save_file

from dist_lab.checkpoint.saver import entries_of
from dist_lab.comm import ops
from dist_lab.comm.agree import first_says
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.programs.cli import setup
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.train import loop


def timed(mesh: Mesh, work: Callable[[], object]) -> float:
    """The seconds of the slowest rank."""
    ops.all_reduce(torch.zeros(1), mesh.world)
    began = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - began)
    return float(ops.all_reduce(seconds, mesh.world, "max"))


def plain_files(mesh: Mesh, folder: Path, entries: list) -> None:
    """Each rank's tensors as one safetensors file, brought to disk."""
    own = {e.name: e.local.contiguous() for e in entries if e.is_first and e.local.numel()}
    path = folder / f"plain-{mesh.rank}.safetensors"
    save_file(own, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def remove_checkpoints(mesh: Mesh, folder: Path) -> None:
    if mesh.rank == 0:
        for path in folder.glob("step-*"):
            shutil.rmtree(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="124m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    evidence.add_out(parser)
    known, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    mesh = init_mesh(fsdp=int(os.environ["WORLD_SIZE"]))
    argv = ["--mesh", f"fsdp={mesh.size}", "--size", known.size, "--batch", str(known.batch)]
    config = parse([*argv, "--seq", str(known.seq), *flags]).fitted(mesh.size)
    data = setup.open_run(config, mesh)
    job = setup.build(config, mesh, data)
    optimizer = loop.make_optimizer(job, config)
    folder = Path(first_says(lambda: tempfile.mkdtemp(dir=known.folder), mesh.world))
    rows = data.batch(0, loop.own_rows(config.batch, job))
    counter = iter(range(1, 10**6))

    def step() -> None:
        loop.take_step(job, optimizer, *rows, 1, config)

    step()
    entries = [*entries_of(job, optimizer, None)]
    sync = job.saver(folder, in_background=False)
    background = job.saver(folder / "background", keep=1)
    measured = "plain", "save", "step", "with", "after"
    times: dict[str, list[float]] = {name: [] for name in measured}

    def step_with_save() -> None:
        background.save(optimizer, step=next(counter))
        step()

    def two_steps() -> None:
        step()
        step()

    for _ in range(known.rounds + 1):
        times["plain"].append(timed(mesh, lambda: plain_files(mesh, folder, entries)))
        times["save"].append(timed(mesh, lambda: sync.save(optimizer, step=next(counter))))
        remove_checkpoints(mesh, folder)
        times["step"].append(timed(mesh, step))
        times["with"].append(timed(mesh, step_with_save))
        times["after"].append(timed(mesh, two_steps))
        background.finish()
    if mesh.rank == 0:
        shutil.rmtree(folder)
        median = {name: statistics.median(values[1:]) * 1e3 for name, values in times.items()}
        print(", ".join(f"{name} {value:.0f} ms" for name, value in median.items()))
        whole = f"{median['save'] / median['plain']:.2f} times"
        print(f"save: {whole} plain files (1.30 allowed)")
        ratio = f"{median['with'] / median['step']:.2f} times"
        print(f"step with a save: {ratio} a step (1.10 allowed)")
        more = median["with"] + median["after"] - 3 * median["step"]
        print(f"a save in the background takes {more:.0f} ms from training")
        took = f"{median['save']:,.0f} ms to {median['plain']:,.0f} ms, {whole}"
        evidence.note(known.out, "save", f"gpt {known.size}", took)
        about = f"gpt {known.size}, {known.batch} x {known.seq} tokens a step"
        evidence.note(known.out, "background", about, f"{ratio}, {more:,.0f} ms in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
