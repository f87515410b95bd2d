"""What one rank of `launch/train.py` runs."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_lab.comm.agree import first_says, together
from dist_lab.errors import MachineError, UserError
from dist_lab.faults.inject import injected
from dist_lab.layout.layout import to_json
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import run_dir
from dist_lab.observe.export import write_json, writing
from dist_lab.observe.sample_log import SampleLog, refuse_unnumbered
from dist_lab.observe.sinks import SUMMARY, Sink, open_sinks
from dist_lab.observe.theory import bubbles
from dist_lab.observe.timeline.profile import Profile
from dist_lab.observe.timeline.sink import Recording
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.mixes import strategies_on
from dist_lab.programs.cli.settings import as_typed
from dist_lab.programs.cli.setup import batch_in_words, build, describe, open_run
from dist_lab.programs.cli.steps import steps_in
from dist_lab.programs.train import loop
from dist_lab.programs.train.checkpoints import Checkpoints, with_saved_batch


def train(config: Config, mesh: Mesh) -> int:
    """Train a model of the zoo, and write the files that README describes."""
    config = with_saved_batch(config, mesh)
    with ExitStack() as resources:
        data = open_run(config, mesh)
        if config.log_samples:
            refuse_unnumbered(data)
        folder = claim_folder(config, mesh, resources)
        job = build(config, mesh, data)
        run_info = describe(config, job, data) | {
            "strategies": job.strategies,
            "about": job.about,
            "layouts": {name: to_json(layout) for name, layout in job.layouts.items()},
        }
        if mesh.rank == 0:
            print(opening_line(run_info), flush=True)
        optimizer = loop.make_optimizer(job, config)
        sinks: list[Sink] = []
        files = None
        if faults := config.faults(mesh.size):
            injector = resources.enter_context(injected(faults, job, folder))
            sinks, files = [injector], injector.files
        checkpoints = Checkpoints(
            job, optimizer, config, data, folder, files=files, tell=print_line
        )
        if checkpoints.first >= config.steps:
            if mesh.rank == 0:
                print_line(
                    f"step {checkpoints.first} of {config.steps}: give more --steps to train on"
                )
                complete(folder, checkpoints.summary)
            return 0
        if mesh.rank == 0:
            sinks += open_sinks(
                folder, config.steps, plain=config.log_collectives, first=checkpoints.first
            )
            run_info["out"] = str(folder)
        if config.log_samples:
            own = loop.own_rows(config.batch, job)
            with together(mesh.world):
                sinks.append(SampleLog(folder, mesh, data, own, checkpoints.first))
        recorded = steps_in(config.timeline)
        if recorded:
            sinks.append(Recording(job, folder, recorded, print_line))
        if profiled := steps_in(config.profile):
            sinks.append(Profile(job, folder, profiled, print_line, recorded=recorded))
        for sink in sinks:
            sink.begin(checkpoints.first)
        summary: dict[str, Any] | None = None
        try:
            measured = loop.train(job, optimizer, data, config, checkpoints, sinks)
            measured = run_info | measured | {"pipeline": None}
            rows = job.timeline()  # of the last step; empty rows unless it is a pipeline
            if any(rows):
                schedule = config.pipeline(mesh["pp"].size)
                measured |= {"pipeline": bubbles(rows, schedule)}
                for sink in sinks:
                    sink.pipeline(rows, schedule)
            checkpoints.finish(measured)
            summary = measured
        except (UserError, MachineError):  # raised on every rank, such as a loss that is NaN
            checkpoints.wait()
            raise
        finally:
            for sink in sinks:
                sink.close(summary)
        if mesh.rank == 0 and config.reduce_order:
            digest = summary["weights_sha256"][:16]
            print(f"sha256 of the weights {digest}, the same in every layout", flush=True)
        if mesh.rank == 0:
            print(next_line(config, mesh.size), flush=True)
    return 0


def claim_folder(config: Config, mesh: Mesh, resources: ExitStack) -> Path:
    """Returns the output folder, the same on every rank; rank 0 holds its lock. Collective."""
    what = "-".join(config.strategies)

    def claim() -> str:
        return str(resources.enter_context(run_dir.claimed(config, what)))

    return Path(first_says(claim, mesh.world))


def complete(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of a run that was killed after its last step, before it could."""
    if summary and not (folder / SUMMARY).exists():
        with writing(folder):
            write_json(folder / SUMMARY, {**summary, "out": str(folder)})


def print_line(line: str) -> None:
    print(line, flush=True)


def next_line(config: Config, ranks: int) -> str:
    """Suggests the next command: verify this run, or run it on several ranks."""
    if config.strategy == "single":
        order = f" {as_typed('reduce_order', config.reduce_order)}" if config.reduce_order else ""
        return f"next: the same on 4 ranks: python launch/train.py --strategy ddp --nproc 4{order}"
    default = Config(strategy=config.strategy)
    names = ["impl", "mesh", "model", "layers", "tokenizer", "dropout", "optimizer", "reduce_order"]
    names += ["qat", "qat_inputs", "recipe"]
    names += config.options
    # The size decides whether tp or pp can split the model.
    if {"tp", "pp"} & set(config.strategies):
        names.append("size")
    implied = config.mesh is not None and strategies_on(config.mesh) == config.strategies
    flags = ["" if implied else f"--strategy {config.strategy}", f"--nproc {ranks}"]
    for name in names:
        value = getattr(config, name)
        if value != getattr(default, name) and name != "emulate_compute":
            flags.append(as_typed(name, mesh_in_words(value) if name == "mesh" else value))
    if ranks > 4 * cores():
        flags.append("--oversubscribe")
    return (
        f"next: is it equal to one process? python launch/verify.py {' '.join(filter(None, flags))}"
    )


def opening_line(run_info: Mapping[str, Any]) -> str:
    """Describes the run in one line: strategies, mesh, ranks, model, dtype, data and batch."""
    config, data = run_info["config"], run_info["data"]
    return (
        f"{run_info['strategies']} on {mesh_in_words(run_info['mesh'])}: "
        f"{run_info['world_size']} ranks x {run_info['threads']} threads "
        f"({run_info['cores']} cores), {config['model']} "
        f"{run_info['parameters'] / 1e6:.1f}M in {config['dtype']}, {data['name']}"
        + (f" sha256 {data['sha256'][:12]}" if data["sha256"] else "")
        + (
            f" in {config['tokenizer']} sha256 {data['tokenizer_sha256'][:12]}"
            if data["tokenizer_sha256"]
            else ""
        )
        + f", {batch_in_words(config, data['image'])} a step"
    )
