"""From settings to a model, its data and a job, on one rank: where a name on the command line
becomes a thing in torch.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_lab import zoo
from dist_lab.comm.agree import check_settings_agree, together
from dist_lab.compose import parallelize
from dist_lab.data import Data, open_data
from dist_lab.data.cast import Cast
from dist_lab.job import Job
from dist_lab.mesh.mesh import Mesh
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.config import Config


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


def batch_in_words(config: Mapping[str, Any], image: Sequence[int] | None) -> str:
    if image is None:
        return f"{config['batch']} x {config['seq']}"
    return f"{config['batch']} images of {' x '.join(map(str, image))} (which have no --seq)"
