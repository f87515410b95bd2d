"""`launch/train.py`, on one rank."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from dist_lab.comm.agree import together
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import run_dir
from dist_lab.observe.sinks import Sink, open_sinks
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.cli.settings import as_typed
from dist_lab.programs.cli.setup import batch_in_words, build, describe, open_run
from dist_lab.programs.train import loop


def train(config: Config, mesh: Mesh) -> int:
    """Train a model of the zoo; rank 0 writes what README describes."""
    config = config.fitted(mesh.size)
    with ExitStack() as held:
        data = open_run(config, mesh)
        with together(mesh.world):
            if mesh.rank == 0:
                folder = held.enter_context(run_dir.claimed(config))
        job = build(config, mesh, data)
        setting = describe(config, job, data)
        sinks: list[Sink] = []
        if mesh.rank == 0:
            print(opening_line(setting), flush=True)
            sinks = open_sinks(folder, config.steps, plain=config.log_collectives)
            setting["out"] = str(folder)
        summary: Mapping[str, Any] | None = None
        try:
            summary = setting | loop.train(job, data, config, sinks)
            rows = job.timeline()  # of the last step
            if any(rows):
                for sink in sinks:
                    sink.pipeline(rows, config.pipeline(mesh["pp"].size))
        finally:
            for sink in sinks:
                sink.close(summary)
        if mesh.rank == 0:
            print(next_line(config, mesh.size), flush=True)
    return 0


def next_line(config: Config, ranks: int) -> str:
    """The command that is worth typing now: what verifies this run, or shares it out."""
    if config.strategy == "single":
        return "next: the same on 4 ranks: python launch/train.py --strategy ddp --nproc 4"
    usual = Config(strategy=config.strategy)
    names = ["impl", "mesh", "model", "layers", *STRATEGIES[config.strategy].options]
    names += ["size"] if config.strategy in ("tp", "pp") else []  # which can depend on it
    words = [f"--strategy {config.strategy} --nproc {ranks}"]
    for name in names:
        value = getattr(config, name)
        if value != getattr(usual, name) and name != "emulate_compute":
            words.append(as_typed(name, mesh_in_words(value) if name == "mesh" else value))
    return f"next: is it equal to one process? python launch/verify.py {' '.join(words)}"


def opening_line(setting: Mapping[str, Any]) -> str:
    config, data = setting["config"], setting["data"]
    return (
        f"{config['strategy']}@{config['impl']} on {setting['world_size']} ranks x "
        f"{setting['threads']} threads ({setting['cores']} cores): {config['model']} "
        f"{setting['parameters'] / 1e6:.1f}M in {config['dtype']}, {data['name']}"
        + (f" sha256 {data['sha256'][:12]}" if data["sha256"] else "")
        + f", {batch_in_words(config, data['image'])} a step"
    )
