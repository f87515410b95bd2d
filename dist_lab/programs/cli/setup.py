"""Build the model, the data and the job of one rank from the settings. Here names on the command
line become torch objects.
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
from dist_lab.programs.cli.low_precision import scheme_of
from dist_lab.quantize.formula import Scheme
from dist_lab.quantize.lowp.recipe import LowPrecision
from dist_lab.quantize.qat import QAT
from dist_lab.transforms.recipe import Recipe


def open_run(config: RunSettings, mesh: Mesh) -> Data:
    """Start of every program: check that all ranks have equal settings, set up logs, open data."""
    check_settings_agree(config.to_dict() | versions(), mesh.world)
    if config.log_collectives:
        mesh.comm.log(sys.stderr.write)
    with together(mesh.world):
        data = open_data(batch=config.batch, seed=config.seed, **config.data_wanted())
    return Cast(data, parameter_dtype(config))


def draw_model(config: Config, data: Data, device: str = "cpu") -> zoo.Model:
    """Returns the model, with parameters that depend on the seed only."""
    return zoo.build(
        config.model, config.size, vocab=data.vocab, image=data.image, seed=config.seed,
        dtype=parameter_dtype(config), device=device,
        **({} if config.layers is None else {"layers": config.layers}),
        **({"dropout": config.dropout} if config.dropout else {}),
    )  # fmt: skip


def arguments(config: Config, data: Data) -> dict[str, Any]:
    """The keyword arguments of `parallelize` that the settings determine."""
    model = zoo.MODELS[config.model]
    options = {name: getattr(config, name) for name in config.options}
    options = {name: value for name, value in options.items() if value is not None}
    if "reduce_dtype" in options:
        options["reduce_dtype"] = getattr(torch, options["reduce_dtype"])
    if "pp_balance" in options:
        options["balance"] = options.pop("pp_balance")
    if "pp" in config.strategies:
        rows = config.batch // config.parts(config.mesh or {})
        options["example_inputs"] = data.batch(0, slice(0, rows))[0]
    return options | {
        "units": (*model.units, *model.ends),
        "param_dtype": torch.bfloat16 if config.dtype == "bfloat16" else None,
        "recompute": config.recompute,
        "sync_batchnorm": config.sync_batchnorm,
        "reduce_order": config.reduce_order,
        "dropout": "exact" if config.dropout else None,
        "recipe": recipe_of(config),
    }


def recipe_of(config: RunSettings) -> Recipe | None:
    """What the model's Linears multiply."""
    if config.recipe is not None:
        return LowPrecision(config.recipe)
    if config.qat is None:
        return None
    inputs = None if config.qat_inputs is None else Scheme(*scheme_of(config.qat_inputs))
    return QAT(Scheme(*scheme_of(config.qat)), inputs)


def parameter_dtype(config: RunSettings) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


def build(config: Config, mesh: Mesh, data: Data) -> Job:
    """Returns this rank's job. The model is on the meta device until its shards materialize."""
    model = draw_model(config, data, "meta")
    keywords = arguments(config, data)
    return parallelize(model, mesh, config.strategy, config.impl, seed=config.seed, **keywords)


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__}


def describe(config: Config, job: Job, data: Data) -> dict[str, Any]:
    """Returns the settings, mesh, machine and versions that a measured number depends on."""
    return {
        "config": config.to_dict(),
        "mesh": job.mesh.axes,
        "world_size": job.mesh.size,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "parameters": sum(math.prod(layout.shape) for layout in job.layouts.values()),
        "data": {
            "name": data.name, "sha256": data.sha256, "image": data.image,
            "tokenizer_sha256": data.tokenizer.sha256 if data.tokenizer is not None else "",
        },
        "versions": versions(),
    }  # fmt: skip


def batch_in_words(config: Mapping[str, Any], image: Sequence[int] | None) -> str:
    """The batch in a printed line: "32 x 128" for text."""
    if image is None:
        return f"{config['batch']} x {config['seq']}"
    return f"{config['batch']} images of {' x '.join(map(str, image))} (--seq is unused)"
