"""Read the settings of a program. Settings that contradict each other raise a one-line error."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.ranks import check_nproc
from dist_lab.programs.cli.registry import MODELS, STRATEGIES, Strategy, shards_nothing
from dist_lab.programs.cli.settings import read


def parse(
    argv: Sequence[str] | None = None,
    *,
    program: str = "train.py",
    description: str | None = None,
    defaults: Mapping[str, Any] = {},
    without: Sequence[str] = (),
) -> Config:
    """Read the command line and the file that --config names.

    Args:
        argv: the arguments without the program's name; default: sys.argv[1:].
        description: the text at the top of --help.
        defaults: this program's defaults, where they differ from the fields' defaults.
        without: settings that this program does not use; it has no flags for them.

    Raises:
        UserError: a mistake in the command line or the file.
        SystemExit: 0, after --help or --version.
    """
    config, where = read(Config, argv, program, description, defaults, without)
    check_together(config, where)
    return config


def check_together(config: Config, where: Mapping[str, str]) -> None:
    """Check the settings against each other. `where`: the flag or file line that set each."""
    check_settings(config, where)
    check_nproc(config, where)


def check_settings(config: Config, where: Mapping[str, str]) -> None:
    """Check the settings against each other, apart from the number of ranks."""
    check_strategy(config, where)
    check_model(config, where)
    if config.backend == "nccl" and config.collectives not in ("auto", "backend"):
        raise UserError(
            f"collectives {config.collectives} work on gloo only, and the backend is nccl "
            f"({where['collectives']}); give auto or backend"
        )


def check_strategy(config: Config, where: Mapping[str, str]) -> None:
    """Check that the strategy has this implementation, these mesh axes and these options."""
    strategy = STRATEGIES[config.strategy]
    if config.impl not in strategy.impls:
        raise UserError(
            f"strategy {config.strategy} has no impl {shown(config.impl)} ({where['impl']}); "
            f"give {one_of(list(strategy.impls), config.impl)}"
        )
    for axis in config.mesh or {}:
        if axis not in strategy.axes:
            raise UserError(
                f"strategy {config.strategy} has no mesh axis {shown(axis)} ({where['mesh']}); "
                + _axes_to_give(strategy, axis)
            )
    if config.mesh and shards_nothing(config.strategy, config.mesh):
        raise UserError(
            f"along mesh {mesh_in_words(config.mesh)} fsdp shards nothing ({where['mesh']}); give "
            f"--mesh fsdp={math.prod(config.mesh.values())}, or --strategy ddp"
        )
    if config.regather and not config.sequence_parallel:
        raise UserError(
            f"regather needs inputs sharded by --sequence-parallel ({where['regather']}); give both"
        )
    if config.emulate_compute is not None and config.impl != "hand":
        raise UserError(
            f"emulate_compute works with impl hand only, and {config.strategy}@{config.impl} is a "
            f"library's ({where['emulate_compute']}); leave it out, or give --impl hand"
        )
    for name in {option for other in STRATEGIES.values() for option in other.options}:
        if getattr(config, name) is not None and name not in strategy.options:
            fitting = [f"--strategy {n}" for n, s in STRATEGIES.items() if name in s.options]
            raise UserError(
                f"strategy {config.strategy} has no {name} ({where[name]}); leave it out, or give "
                + " or ".join(fitting)
            )


def check_model(config: Config, where: Mapping[str, str]) -> None:
    """Check the size of the model, and the settings that only some models have."""
    sizes = MODELS[config.model].sizes
    if config.size not in sizes:
        raise UserError(
            f"model {config.model} has no size {config.size} ({where['size']}); give "
            f"{one_of(sizes, config.size)}, its only size"
        )
    if config.layers is not None and config.model == "resnet18":
        raise UserError(f"model resnet18 always has 8 blocks ({where['layers']}); leave it out")
    if config.sync_batchnorm and config.strategy == "pp":
        raise UserError(
            "under pp each BatchNorm is on one rank, with nothing to synchronize "
            f"({where['sync_batchnorm']}); leave it out"
        )
    if config.sync_batchnorm and config.model != "resnet18":
        raise UserError(
            f"model {config.model} has no BatchNorm to synchronize ({where['sync_batchnorm']}); "
            "leave it out, or give --model resnet18"
        )


def _axes_to_give(strategy: Strategy, axis: str) -> str:
    others = [f"--strategy {name}" for name, other in STRATEGIES.items() if axis in other.axes]
    possible = f"its axes are {', '.join(strategy.axes)}" if strategy.axes else "it takes no mesh"
    return f"{possible}, or give {' or '.join(others)}" if others else possible
