"""The commands, on one rank: from settings to a model, its data and the work.

`launch/train.py` runs `train` here, and `launch/verify.py` runs `verify`. This is where a name on
the command line becomes a thing in torch.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from dist_lab import parity, zoo
from dist_lab import train as loop
from dist_lab.comm.agree import check_settings_agree, together
from dist_lab.compose import parallelize
from dist_lab.config import Config
from dist_lab.data import Data, open_data
from dist_lab.data.cast import Cast
from dist_lab.job import Job
from dist_lab.mesh import Mesh
from dist_lab.observe import run_dir
from dist_lab.observe.console import wide_console
from dist_lab.observe.sinks import Sink, open_sinks
from dist_lab.processes.ranks import cores


def train(config: Config, mesh: Mesh) -> int:
    """Train a model of the zoo; rank 0 writes what README describes."""
    with ExitStack() as held:
        data = meet(config, mesh)
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
    return 0


def verify(config: Config, mesh: Mesh) -> int:
    """Compare a model of the zoo with one process. Exit status 0 only if equal."""
    data = meet(config, mesh)
    with together(mesh.world):
        if mesh.rank == 0 and config.out:
            folder = run_dir.make_folder(config.out, "verify.json")
    report = parity.verify(
        lambda: draw(config, data),
        lambda step: data.batch(step, slice(0, config.batch)),
        mesh,
        config.strategy,
        config.impl,
        steps=config.steps,
        microbatches=config.microbatches,
        clip=config.clip or None,
        optimizer=loop.OPTIMIZERS[config.optimizer],
        options={"lr": config.lr, "weight_decay": config.weight_decay},
        units=units(config),
        param_dtype=compute_dtype(config),
        recompute=config.recompute,
        sync_batchnorm=config.sync_batchnorm,
        **options(config, data),
    )
    if mesh.rank == 0:
        console = wide_console()
        if data.image is not None:
            what = batch_in_words(config.to_dict(), data.image)
            console.print(f"{data.name}, {what} a step", highlight=False, soft_wrap=True)
        console.print(report.table())
        console.print(report.sentence(), soft_wrap=True)
        if config.out:
            text = json.dumps(report.to_dict(), indent=1) + "\n"
            (folder / "verify.json").write_text(text, encoding="utf-8")
    return 0 if report.equal else 1


def meet(config: Config, mesh: Mesh) -> Data:
    """What every command begins with: ranks of one mind, told or not of the wire, with data."""
    check_settings_agree(config.to_dict() | versions(), mesh.world)
    if config.log_collectives:
        mesh.wire.log(sys.stderr.write)
    with together(mesh.world):
        data = open_data(batch=config.batch, seed=config.seed, **config.data_wanted())
    return Cast(data, parameter_dtype(config))


def draw(config: Config, data: Data, device: str = "cpu") -> zoo.Model:
    """The model of the zoo in the dtype of its parameters, drawn from the seed alone."""
    return zoo.build(
        config.model, config.size, vocab=data.vocab, image=data.image, seed=config.seed,
        dtype=parameter_dtype(config), device=device,
        **({} if config.layers is None else {"layers": config.layers}),
    )  # fmt: skip


def units(config: Config) -> Sequence[type[torch.nn.Module] | str]:
    model = zoo.MODELS[config.model]
    return (*model.units, *model.ends)


def options(config: Config, data: Data) -> dict[str, Any]:
    """The strategy's own settings, as `parallelize` takes them."""
    own = config.options()
    own = {n: getattr(torch, v) if n.endswith("dtype") else v for n, v in own.items()}
    if config.strategy == "pp":
        own = {("balance" if n == "pp_balance" else n): v for n, v in own.items()}
        own["example_inputs"] = data.batch(0, slice(0, config.batch // config.microbatches))[0]
    return own


def parameter_dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def compute_dtype(config: Config) -> torch.dtype | None:
    """The dtype of compute, where it is not that of the parameters."""
    return torch.bfloat16 if config.dtype == "bfloat16" else None


def build(config: Config, mesh: Mesh, data: Data) -> Job:
    """From the meta device: a rank makes what it keeps of a parameter, one after another."""
    return parallelize(
        draw(config, data, "meta"),
        mesh,
        config.strategy,
        config.impl,
        units=units(config),
        param_dtype=compute_dtype(config),
        recompute=config.recompute,
        seed=config.seed,
        sync_batchnorm=config.sync_batchnorm,
        **options(config, data),
    )


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__}


def describe(config: Config, job: Job, data: Data) -> dict[str, Any]:
    """What a number needs beside it to mean something."""
    return {
        "config": config.to_dict(),
        "mesh": job.mesh.axes,
        "world_size": job.mesh.size,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "parameters": sum(math.prod(layout.shape) for layout in job.layouts.values()),
        "data": {"name": data.name, "sha256": data.sha256, "image": data.image},
        "versions": versions(),
    }


def opening_line(setting: Mapping[str, Any]) -> str:
    config, data = setting["config"], setting["data"]
    return (
        f"{config['strategy']}@{config['impl']} on {setting['world_size']} ranks x "
        f"{setting['threads']} threads ({setting['cores']} cores): {config['model']} "
        f"{setting['parameters'] / 1e6:.1f}M in {config['dtype']}, {data['name']}"
        + (f" sha256 {data['sha256'][:12]}" if data["sha256"] else "")
        + f", {batch_in_words(config, data['image'])} a step"
    )


def batch_in_words(config: Mapping[str, Any], image: Sequence[int] | None) -> str:
    if image is None:
        return f"{config['batch']} x {config['seq']}"
    return f"{config['batch']} images of {' x '.join(map(str, image))} (which have no --seq)"
