"""Read the settings of a program. Settings that contradict each other raise a one-line error."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.errors import UserError, nearest_degree, one_of, shown
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.low_precision import WHOLE_ROW, scheme_of
from dist_lab.programs.cli.mixes import AXES, IllegalMix, check_impl
from dist_lab.programs.cli.ranks import check_nproc
from dist_lab.programs.cli.registry import MODELS, STRATEGIES
from dist_lab.programs.cli.resume import is_auto
from dist_lab.programs.cli.settings import read
from dist_lab.programs.cli.steps import check_steps
from dist_lab.step.fixed_order.order import check_strategies


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
    check_restarts(config, where)
    for name in ("timeline", "profile"):
        check_steps(getattr(config, name), config.steps, where[name])
    check_nproc(config, where)


def check_settings(config: Config, where: Mapping[str, str]) -> None:
    """Check the settings against each other, apart from the number of ranks."""
    check_strategy(config, where)
    check_model(config, where)
    check_order(config, where)
    check_quantised(config, where)
    if config.adamw_lr is not None and config.optimizer not in ("muon", "shampoo"):
        raise UserError(
            f"optimizer {config.optimizer} has no part for adamw with a learning rate of its own "
            f"({where['adamw_lr']}); leave it out, or give --optimizer muon or shampoo"
        )
    if config.backend == "nccl" and config.collectives not in ("auto", "backend"):
        raise UserError(
            f"collectives {config.collectives} work on gloo only, and the backend is nccl "
            f"({where['collectives']}); give auto or backend"
        )


def check_strategy(config: Config, where: Mapping[str, str]) -> None:
    """Check that the mesh, the strategy and the implementation fit, and the strategies' options."""
    for axis in config.mesh or {}:
        if axis not in AXES:
            raise UserError(
                f"no mesh axis {shown(axis)} ({where['mesh']}); give {one_of(AXES, axis)}"
            )
    try:
        strategies = config.strategies
    except IllegalMix as error:
        raise UserError(f"{error.problem} ({where['mesh']}); {error.typed}") from None
    try:
        check_impl(strategies, config.impl)
    except IllegalMix as error:
        raise UserError(f"{error.problem} ({where['impl']}); {error.typed}") from None
    if config.regather and not config.sequence_parallel:
        raise UserError(
            f"regather needs inputs sharded by --sequence-parallel ({where['regather']}); give both"
        )
    if config.emulate_compute is not None and config.impl != "hand":
        raise UserError(
            f"emulate_compute works with impl hand only, and {strategies[0]}@{config.impl} is a "
            f"library's ({where['emulate_compute']}); leave it out, or give --impl hand"
        )
    for name in {option for other in STRATEGIES.values() for option in other.options}:
        if getattr(config, name) is not None and name not in config.options:
            fitting = [f"--strategy {n}" for n, s in STRATEGIES.items() if name in s.options]
            raise UserError(
                f"strategy {' x '.join(strategies)} has no {name} ({where[name]}); leave it out, "
                f"or give {' or '.join(fitting)}"
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
    if config.dropout and config.model == "resnet18":
        raise UserError(
            f"model resnet18 has no dropout ({where['dropout']}); leave it out, or give --model "
            "gpt, mlp or vit"
        )
    if config.sync_batchnorm and config.strategy in ("pp", "tp"):
        raise UserError(
            f"{config.strategy} does not split rows over ranks, so BatchNorm has nothing to "
            f"synchronize ({where['sync_batchnorm']}); leave it out, or give --mesh a data axis"
        )
    if config.sync_batchnorm and config.model != "resnet18":
        raise UserError(
            f"model {config.model} has no BatchNorm to synchronize ({where['sync_batchnorm']}); "
            "leave it out, or give --model resnet18"
        )


def check_quantised(config: Config, where: Mapping[str, str]) -> None:
    """Check that the Linears of the model can multiply what --qat or --recipe rounds."""
    if config.qat_inputs and not config.qat:
        raise UserError(
            f"qat_inputs {config.qat_inputs} rounds inputs together with weights "
            f"({where['qat_inputs']}); give --qat, too, such as --qat 8"
        )
    if config.qat and config.recipe:
        raise UserError(
            f"qat {config.qat} and recipe {config.recipe} both say what Linears multiply "
            f"({where['qat']}, {where['recipe']}); leave one out"
        )
    name = "qat" if config.qat else "recipe"
    if not getattr(config, name):
        return
    if config.model == "resnet18":
        raise UserError(
            f"model resnet18 has no Linear in its blocks to quantise ({where[name]}); leave it "
            "out, or give --model gpt, mlp or vit"
        )
    if config.impl != "hand":
        raise UserError(
            f"{' x '.join(config.strategies)}@{config.impl} keeps weights in tensors of its own, "
            f"and --{name} rounds those of our strategies ({where[name]}); leave it out, or give "
            "--impl hand"
        )
    bits, group = scheme_of(config.qat) if config.qat else (0, None)
    columns = MODELS[config.model].columns(config.size)
    for linear, number in columns.items():
        if group is not None and group != WHOLE_ROW and number % group:
            common = math.gcd(*columns.values())
            fitting = nearest_degree([n for n in range(1, common + 1) if common % n == 0], group)
            raise UserError(
                f"the {number} columns of {linear} in {config.model} {config.size} do not divide "
                f"into groups of {group} ({where['qat']} {config.qat}); give --qat "
                f"{bits}:{fitting}, which divides those of all layers, or --qat {bits}: one scale "
                "per row"
            )


def check_order(config: Config, where: Mapping[str, str]) -> None:
    """Check that the bits of a run with --reduce-order cannot depend on its layout."""
    if config.reduce_order is None:
        return
    options = {name: getattr(config, name) for name in config.options}
    options["sync_batchnorm"] = config.sync_batchnorm
    check_strategies(config.strategies, config.impl, options)
    if config.dtype != "float32":
        raise UserError(
            f"with reduce_order the dtype is float32, not {config.dtype} ({where['dtype']}); leave "
            "it out, or leave --reduce-order out"
        )
    if config.threads not in (None, 1):
        raise UserError(
            f"{config.threads} threads share the sums of a layer, so their number changes its bits "
            f"({where['threads']}); leave it out: with --reduce-order a rank has one"
        )


def check_restarts(config: Config, where: Mapping[str, str]) -> None:
    """Check that the settings of checkpoints and restarts have a meaning together."""
    if is_auto(config.resume) and not (config.out or config.restarts):
        raise UserError(
            f"resume auto looks for checkpoints in --out, which is not given ({where['resume']}); "
            "add --out DIR, or give --resume DIR"
        )
    if is_auto(config.resume) and config.overwrite:
        raise UserError(
            f"resume auto goes on with the run in --out, and overwrite removes it "
            f"({where['resume']}, {where['overwrite']}); leave one out"
        )
    if config.keep is not None and not config.save_every:
        raise UserError(
            f"keep {config.keep} says which checkpoints to delete, and this run saves none "
            f"({where['keep']}); add --save-every N, or leave it out"
        )
    if config.restarts and config.nproc is None:
        raise UserError(
            f"restarts {config.restarts} start new ranks, which only --nproc does "
            f"({where['restarts']}); add --nproc N, or give torchrun --max-restarts "
            f"{config.restarts}"
        )
