"""What one rank of `launch/serve_compare.py` runs."""

import sys
from contextlib import closing
from pathlib import Path

import torch

from dist_lab.comm.agree import check_settings_agree, together
from dist_lab.inference.clock import Clock, Cost, Virtual, Wall
from dist_lab.inference.engine import Engine
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.stage import Stage, load_stage
from dist_lab.inference.text import Tokenizer
from dist_lab.inference.weights import Weights, tokenizer_of
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe.console import Progress
from dist_lab.observe.run_dir import make_folder
from dist_lab.processes.ranks import cores
from dist_lab.programs.generate.command import open_weights
from dist_lab.programs.generate.memory import check_blocks
from dist_lab.programs.serve_compare.calibrate import calibrate
from dist_lab.programs.serve_compare.random_weights import random_weights
from dist_lab.programs.serve_compare.replay import Replay, replay
from dist_lab.programs.serve_compare.report import report
from dist_lab.programs.serve_compare.results import Result, result
from dist_lab.programs.serve_compare.settings import ServeCompare


def serve_compare(config: ServeCompare, mesh: Mesh) -> int:
    """Race the policies, and show the numbers on rank 0. Returns 0."""
    check_settings_agree(config.to_dict(), mesh.world)
    folder: Path | None = None
    with together(mesh.world):
        if mesh.rank == 0 and config.out:
            folder = make_folder(config.out, "serve_compare.json")
    weights, tokenizer = model_of(config, mesh)
    with together(mesh.world):
        check_blocks(weights, mesh, config.blocks, config.block_size)
    stage = load_stage(weights, mesh)
    if config.cost is None:
        cost, error = calibrate(stage, tokenizer)
    else:
        a, b = config.cost
        cost, error = Cost(a / 1e3, b / 1e3), None
    results, replays = race(config, stage, tokenizer, cost)
    if mesh.rank == 0:
        run_info = {
            "config": config.to_dict(),
            "a_seconds": cost.a,
            "b_seconds": cost.b,
            "fit_error": error,
            "parameters": sum(p.numel() for p in weights.shape.build().parameters()),
            "mesh": dict(mesh.axes),
            "threads": torch.get_num_threads(),
            "cores": cores(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        }
        report(results, replays, run_info, folder)
    return 0


def race(
    config: ServeCompare, stage: Stage, tokenizer: Tokenizer, cost: Cost
) -> tuple[list[Result], dict[str, Replay]]:
    """Run each policy on each clock. Returns the numbers, and the replays on the virtual clock."""
    trace = config.trace(tokenizer.vocab)
    results: list[Result] = []
    replays: dict[str, Replay] = {}
    runs = [(c, name) for c in ["virtual", *["wall"] * config.wall] for name in config.names()]
    progress = Progress("raced", len(runs), quiet=stage.mesh.rank > 0, transient=True)
    with closing(progress):
        for done, (kind, name) in enumerate(runs, start=1):
            progress.say(f"{name}, {kind} clock")
            engine = engine_of(config, name, stage, tokenizer)
            clock: Clock = Virtual(cost) if kind == "virtual" else Wall(stage.mesh)
            seen = replay(engine, trace, cost(1), clock)
            if kind == "virtual":
                replays[name] = seen
            reference = replays[runs[0][1]] if done > 1 else None
            results.append(result(name, kind, seen, config.block_size, reference))
            progress.reach(done)
    return results, replays


def engine_of(config: ServeCompare, name: str, stage: Stage, tokenizer: Tokenizer) -> Engine:
    row = POLICIES[name]
    prefix_cache = row.prefix_cache if config.prefix_cache == "own" else config.prefix_cache == "on"
    policy = row.build(config.sequences, config.budget)
    return Engine(stage, tokenizer, policy, config.blocks, config.block_size, prefix_cache)


def model_of(config: ServeCompare, mesh: Mesh) -> tuple[Weights, Tokenizer]:
    """The model and its tokenizer. Collective."""
    if not config.checkpoint:
        weights: Weights = random_weights(config.size or "tiny")
    else:
        weights, _ = open_weights(config.checkpoint, mesh)
    with together(mesh.world):
        return weights, tokenizer_of(weights)
