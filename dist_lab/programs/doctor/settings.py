"""The settings of doctor.py: the model, the ranks and the strategies. Does not import torch."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from dist_lab.data.custom import is_custom
from dist_lab.data.user_code import importable_from
from dist_lab.errors import UserError, shown
from dist_lab.programs.cli.ranks import RankSettings, check_nproc, needs_ranks
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.cli.settings import flag, kind, setting, split_names
from dist_lab.programs.cli.settings import read as read_settings


@dataclass(frozen=True)
class Doctor(RankSettings):
    """The settings of one examination."""

    # fmt: off
    function: str = setting("", "the function that builds the model; it may come first on the "
        "command line, without the flag", heading="the model", metavar="MODULE:FUNCTION")
    strategies: str = setting("", "separated by commas; default: all that the number of ranks "
        "allows", metavar="LIST")
    units: str = setting("", "fsdp, hsdp: modules that are gathered as one unit: classes or module "
        "names, separated by commas", metavar="LIST")
    microbatches: int = setting(1, "micro-batches of each rank; pp raises it to two per stage if "
        "each keeps four rows", low=1)
    steps: int = setting(3, "steps to compare with one process", low=1)
    out: str = setting("", "write doctor.json to this folder", metavar="DIR")
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """The axes of the mesh of all ranks. Each strategy also builds its own mesh."""
        if plain and self.strategy_list != ("single",):
            raise needs_ranks("doctor", "--strategies", 2)
        return {"dp": size}

    @property
    def strategy_list(self) -> tuple[str, ...]:
        """The strategies named in --strategies; () means all."""
        return tuple(word.strip() for word in self.strategies.split(",")) if self.strategies else ()

    @property
    def unit_list(self) -> list[str]:
        return [word.strip() for word in self.units.split(",")] if self.units else []


def read(argv: Sequence[str] | None, description: str | None) -> Doctor:
    """Reads the command line of doctor.py. Raises UserError for every mistake visible in it."""
    words = add_function_flag(list(sys.argv[1:] if argv is None else argv))
    config, sources = read_settings(Doctor, words, "doctor.py", description, {})
    if not is_custom(config.function):
        problem = f"cannot be {shown(config.function)}" if config.function else "is missing"
        raise UserError(
            f"the function that builds the model {problem} ({sources['function']}); give "
            "module:function, such as mymodels:build, first on the command line"
        )
    split_names(config.strategies, STRATEGIES, "--strategies", "strategy")
    module = config.function.partition(":")[0].partition(".")[0]
    with importable_from(os.getcwd()):
        spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(
            f"no module {module!r} in {os.getcwd()!r} or among the installed modules "
            f"({sources['function']}); run doctor.py in the folder that contains it"
        )
    check_nproc(config, sources)
    return config


def add_function_flag(argv: list[str]) -> list[str]:
    """Puts --function= in front of the first word that belongs to no flag.

    >>> add_function_flag(["--nproc", "2", "mymodels:build"])
    ['--nproc', '2', '--function=mymodels:build']
    """
    wants_value = {flag(option.name) for option in fields(Doctor) if kind(option) is not bool}
    for place, word in enumerate(argv):
        if not word.startswith("-") and (place == 0 or argv[place - 1] not in wants_value):
            return [*argv[:place], f"{flag('function')}={word}", *argv[place + 1 :]]
    return argv
