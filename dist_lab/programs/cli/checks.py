"""Reading the settings of a program, and refusing what no setting shows alone: one line each."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.config import Config, RunSettings
from dist_lab.programs.cli.registry import MODELS, STRATEGIES, Strategy
from dist_lab.programs.cli.settings import read


def parse(
    argv: Sequence[str] | None = None,
    *,
    program: str = "train.py",
    description: str | None = None,
    defaults: Mapping[str, Any] = {},
    without: Sequence[str] = (),
) -> Config:
    """Read the command line and the file that its --config names.

    Args:
        argv: without the program's name; default this process's own.
        description: opens --help.
        defaults: this program's own, where they differ from the fields'.
        without: settings that mean nothing to this program and have no flag in it.

    Raises:
        UserError: anything wrong in either.
        SystemExit: 0, after --help or --version.
    """
    config, where = read(Config, argv, program, description, defaults, without)
    check_together(config, where)
    return config


def check_together(config: Config, where: Mapping[str, str]) -> None:
    """Check what no setting shows alone. `where` says who set each: a flag, a line of a file."""
    check_settings(config, where)
    check_nproc(config, where)


def check_settings(config: Config, where: Mapping[str, str]) -> None:
    """Check the settings against each other, but for the number of ranks."""
    check_strategy(config, where)
    check_model(config, where)
    if config.backend == "nccl" and config.collectives not in ("auto", "backend"):
        raise UserError(
            f"collectives {config.collectives} are by hand, for gloo alone, and the backend is "
            f"nccl ({where['collectives']}); give auto or backend"
        )


def check_strategy(config: Config, where: Mapping[str, str]) -> None:
    """Check the implementation, the mesh and the options of the strategy."""
    strategy = STRATEGIES[config.strategy]
    if config.impl not in strategy.impls:
        raise UserError(
            f"strategy {config.strategy} has no impl {shown(config.impl)} ({where['impl']}); "
            f"give {one_of(list(strategy.impls), config.impl)}"
        )
    for axis in config.mesh or {}:
        if axis not in strategy.axes:
            raise UserError(
                f"strategy {config.strategy} does not run along {shown(axis)} ({where['mesh']}); "
                + _axes_to_give(strategy, axis)
            )
    if config.regather and not config.sequence_parallel:
        raise UserError(
            f"regather gathers again what --sequence-parallel has cut ({where['regather']}); give "
            "both"
        )
    if config.emulate_compute is not None and config.impl != "hand":
        raise UserError(
            f"emulate_compute is of what is written here, {config.strategy}@{config.impl} is a "
            f"library's ({where['emulate_compute']}); leave it out, or give --impl hand"
        )
    for name in {option for other in STRATEGIES.values() for option in other.options}:
        if getattr(config, name) is not None and name not in strategy.options:
            takers = [f"--strategy {n}" for n, s in STRATEGIES.items() if name in s.options]
            raise UserError(
                f"strategy {config.strategy} has no {name} ({where[name]}); leave it out, or give "
                + " or ".join(takers)
            )


def check_model(config: Config, where: Mapping[str, str]) -> None:
    """Check the size of the model, and the settings that not every model can follow."""
    sizes = MODELS[config.model].sizes
    if config.size not in sizes:
        raise UserError(
            f"model {config.model} has no size {config.size} ({where['size']}); give "
            f"{one_of(sizes, config.size)}, its only one"
        )
    if config.layers is not None and config.model == "resnet18":
        raise UserError(
            f"model resnet18 has 8 blocks, no more and no fewer ({where['layers']}); leave it out"
        )
    if config.sync_batchnorm and config.strategy == "pp":
        raise UserError(
            f"pp shares out no rows, which BatchNorm could put together ({where['sync_batchnorm']}"
            "); leave it out"
        )
    if config.sync_batchnorm and config.model != "resnet18":
        raise UserError(
            f"model {config.model} has no BatchNorm to synchronize ({where['sync_batchnorm']}); "
            "leave it out, or give --model resnet18"
        )


def check_nproc(config: RunSettings, where: Mapping[str, str]) -> None:
    """Check the number of ranks that this program starts itself, and the run on them."""
    if config.nproc is not None:
        most = 4 * cores()
        if config.nproc > most and not config.oversubscribe:
            raise UserError(
                f"nproc {config.nproc} is more than 4 ranks for each of {cores()} cores "
                f"({where['nproc']}); give {most} or less, or add --oversubscribe"
            )
        config.axes(config.nproc)


def _axes_to_give(strategy: Strategy, axis: str) -> str:
    others = [f"--strategy {name}" for name, other in STRATEGIES.items() if axis in other.axes]
    own = f"its axes are {', '.join(strategy.axes)}" if strategy.axes else "it takes no mesh"
    return f"{own}, or give {' or '.join(others)}" if others else own
