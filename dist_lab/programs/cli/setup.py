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
from dist_lab.programs.cli.config import Config, RunSettings
from dist_lab.programs.cli.registry import STRATEGIES


def open_run(config: RunSettings, mesh: Mesh) -> Data:
    """Start of every command: compare the ranks' settings, log collectives if asked, open data."""
    check_settings_agree(config.to_dict() | versions(), mesh.world)
    if config.log_collectives:
        mesh.comm.log(sys.stderr.write)
    with together(mesh.world):
        data = open_data(batch=config.batch, seed=config.seed, **config.data_wanted())
    return Cast(data, parameter_dtype(config))


def draw_model(config: Config, data: Data, device: str = "cpu") -> zoo.Model:
    """The model of the zoo in the dtype of its parameters, drawn from the seed alone."""
    return zoo.build(
        config.model, config.size, vocab=data.vocab, image=data.image, seed=config.seed,
        dtype=parameter_dtype(config), device=device,
        **({} if config.layers is None else {"layers": config.layers}),
    )  # fmt: skip


def arguments(config: Config, data: Data) -> dict[str, Any]:
    """The arguments of `parallelize` besides the model, the mesh and the name of the strategy."""
    model = zoo.MODELS[config.model]
    own = {name: getattr(config, name) for name in STRATEGIES[config.strategy].options}
    own = {name: value for name, value in own.items() if value is not None}
    if "reduce_dtype" in own:
        own["reduce_dtype"] = getattr(torch, own["reduce_dtype"])
    if "pp_balance" in own:
        own["balance"] = own.pop("pp_balance")
    if config.strategy == "pp":
        own["example_inputs"] = data.batch(0, slice(0, config.batch // config.microbatches))[0]
    return own | {
        "units": (*model.units, *model.ends),
        "param_dtype": torch.bfloat16 if config.dtype == "bfloat16" else None,
        "recompute": config.recompute,
        "sync_batchnorm": config.sync_batchnorm,
    }


def parameter_dtype(config: RunSettings) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def build(config: Config, mesh: Mesh, data: Data) -> Job:
    """The job of this rank, from a model on the meta device: parameters are made one by one."""
    model = draw_model(config, data, "meta")
    told = arguments(config, data)
    return parallelize(model, mesh, config.strategy, config.impl, seed=config.seed, **told)


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__}


def describe(config: Config, job: Job, data: Data) -> dict[str, Any]:
    """The settings, mesh, machine and versions that a measured number depends on."""
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
