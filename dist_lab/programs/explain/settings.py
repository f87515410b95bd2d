"""The settings of explain.py: those of a run, without the settings of training and launching."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_lab import data
from dist_lab.errors import UserError, shown
from dist_lab.programs.cli.checks import check_settings
from dist_lab.programs.cli.config import RESTARTS, RunSettings
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.settings import flag, setting
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.zoo.sizes import OwnSize

WITHOUT = [
    "oversubscribe", "timeout", "steps", "lr", "adamw_lr", "weight_decay", "warmup",
    "overwrite", "about", "val_every", "log_every", "log_samples", "sentinel", "log_collectives",
    "check_collectives", "reduce_order", *RESTARTS,
]  # fmt: skip
RANKS = 4  # the number of ranks unless --mesh, --stages or --nproc sets it
PICTURES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Explain(RunSettings):
    """The settings of the run to explain."""

    # fmt: off
    nproc: int | None = setting(None, "ranks to explain, along the strategy's own axis; default: "
        f"{RANKS}; no rank is started", low=1, heading="common settings")
    stages: int | None = setting(None, "pipeline stages: short for --mesh pp=N",
        heading="explain", low=1, high=1024)
    rank: int = setting(0, "the rank whose step is shown; under pp each stage has its own", low=0)
    all_ranks: bool = setting(False, "show every rank: ranks that do the same are one class, of "
        "which one is run")
    model_config: str = setting("", "explain the model of a Hugging Face config.json of the Llama "
        "kind instead of --size", metavar="FILE")
    values: bool = setting(False, "run the step in real memory and compute its numbers, as a run "
        "does; default: sizes only, which takes little memory and time")
    parameter: str = setting("", "show which part of this parameter each rank holds, such as "
        "lm_head.weight", metavar="NAME")
    svg: str = setting("", "plot the ranks of the mesh, the part of --parameter that each one "
        "holds, and the schedule of a pipeline to this file: .svg, .png or .pdf", metavar="FILE")
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns {}: explain itself runs in one process, whatever --mesh says."""
        if size > 1:
            raise UserError(
                f"explain runs in one process, {size} were started; type python "
                "launch/explain.py --mesh dp=4 ..."
            )
        return {}


def with_model(config: Explain) -> Explain:
    """Returns the settings with the size that --model-config describes, if it is given.

    Raises:
        UserError: the file is not of a Llama, or other settings choose a model, too.
        MachineError: the file cannot be read.
    """
    if not config.model_config:
        return config
    if (config.model, config.size, config.layers) != ("gpt", "tiny", None):
        raise UserError(
            "model_config describes the whole model (--model-config); leave out --model, --size "
            "and --layers"
        )
    from dist_lab.checkpoint.exchange import folders, llama  # here, because it imports torch

    path = Path(config.model_config).expanduser()
    contents = folders.read_json(path / "config.json" if path.is_dir() else path)
    # Rotary positions change no size, so they may be scaled in any way.
    sized = {name: v for name, v in contents.items() if not name.startswith("rope_")}
    numbers = asdict(llama.from_config(sized))
    return replace(config, size=OwnSize(f"of {config.model_config}", numbers))


def read(argv: Sequence[str] | None, description: str | None) -> Explain:
    """Read the command line of explain.py. Its mesh gives the number of ranks to explain.

    Raises:
        UserError: any mistake that can be found before the step is run.
    """
    config, where = read_settings(Explain, argv, "explain.py", description, {}, WITHOUT)
    check_settings(config.run(), where)
    config = with_model(config)
    if config.stages and "pp" not in config.run().strategies:
        raise UserError(
            f"strategy {config.strategy} has no stages (--stages); leave it out, or give "
            "--strategy pp"
        )
    if config.stages is not None and config.mesh:
        raise UserError(
            f"stages {config.stages} is short for --mesh pp={config.stages}, and there is --mesh "
            f"{mesh_in_words(config.mesh)} (--stages); give one of them"
        )
    if config.svg and Path(config.svg).suffix.lower() not in PICTURES:
        raise UserError(f"svg cannot be {shown(config.svg)} (--svg); name it .svg, .png or .pdf")
    axes = config.run().mesh_on(config.nproc or RANKS)
    if config.stages is not None:
        axes = {"pp": config.stages}
    run = replace(config, nproc=None, mesh=config.mesh or axes or None)
    ranks = math.prod((run.mesh or {}).values())
    if config.rank >= ranks:
        given = f"mesh {mesh_in_words(run.mesh)}" if run.mesh else "a single process"
        raise UserError(
            f"{given} has no rank {config.rank} ({where['rank']}); give 0"
            + (f" to {ranks - 1}" if ranks > 1 else ", or --mesh")
        )
    if config.all_ranks and (config.svg or config.parameter):
        name = "svg" if config.svg else "parameter"
        raise UserError(
            f"all_ranks draws nothing, so it has no use for {name} ({where[name]}); leave one out"
        )
    if ranks == 1 and (config.svg or config.parameter or config.all_ranks):
        name = next(n for n in ("svg", "parameter", "all_ranks") if getattr(config, n))
        raise UserError(
            f"a single process holds everything, so there is nothing to draw ({where[name]}); give "
            "--mesh, such as fsdp=2,tp=2"
        )
    if config.nproc and where["nproc"] == flag("nproc"):  # a file's nproc gives way to --mesh
        run.run().axes(config.nproc)
    data.check(**config.data_wanted())
    return run
