"""The settings of doctor.py: whose model, on how many ranks, by which strategies. No torch here."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from dist_lab.data.custom import importable_from, is_custom
from dist_lab.errors import UserError, one_of, shown
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.cli.settings import flag, kind, setting
from dist_lab.programs.cli.settings import read as read_settings


@dataclass(frozen=True)
class Doctor:
    """The settings of one examination."""

    # fmt: off
    function: str = setting("", "the function that builds the model: what stands first on the "
        "command line, without a flag", heading="what is looked at", metavar="MODULE:FUNCTION")
    strategies: str = setting("", "by commas; default: all that so many ranks allow",
        metavar="LIST")
    units: str = setting("", "fsdp, hsdp: what is gathered as one: classes or names of modules, by "
        "commas", metavar="LIST")
    microbatches: int = setting(1, "in so many pieces a rank takes its rows; pp: two a rank, "
        "as far as each has four rows, unless there are more", low=1)
    steps: int = setting(3, "that are compared with one process", low=1)
    out: str = setting("", "folder in which doctor.json is written", metavar="DIR")

    nproc: int | None = setting(None, "start so many ranks on this machine; default: those that "
        "torchrun started", heading="where", low=1)
    oversubscribe: bool = setting(False, "allow --nproc above 4 ranks a core")
    threads: int | None = setting(None, "of each rank; default: cores // ranks", low=1, high=1024)
    backend: str = setting("gloo", "who carries the bytes: gloo (CPU) or nccl (GPU)",
        choices=("gloo", "nccl"))
    timeout: float = setting(60.0, "seconds that any collective may take", low=0.1, high=86400)
    debug: bool = setting(False, "show the traceback of an error")
    # fmt: on

    collectives = "auto"
    check_collectives = False

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Where all ranks meet. Each strategy has a mesh of its own besides."""
        if plain and self.listed != ("single",):
            raise UserError(
                "strategies are tried on several ranks, this is one process alone (--nproc); add "
                "--nproc 2, or start it by torchrun --nproc_per_node=2"
            )
        return {"dp": size}

    @property
    def listed(self) -> tuple[str, ...]:
        """The strategies that were asked for; (): all."""
        return tuple(word.strip() for word in self.strategies.split(",")) if self.strategies else ()

    @property
    def unit_list(self) -> list[str]:
        return [word.strip() for word in self.units.split(",")] if self.units else []

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(argv: Sequence[str] | None, description: str | None) -> Doctor:
    """The command line of doctor.py. Raises UserError for all that it alone shows to be wrong."""
    words = with_flag(list(sys.argv[1:] if argv is None else argv))
    config, where = read_settings(Doctor, words, "doctor.py", description, {})
    if not is_custom(config.function):
        what = f"cannot be {shown(config.function)}" if config.function else "is missing"
        raise UserError(
            f"the function that builds the model {what} ({where['function']}); give module:function"
            ", such as mymodels:build, first on the command line"
        )
    for name in config.listed:
        if name not in STRATEGIES:
            raise UserError(
                f"no strategy {shown(name)} (--strategies); give, by commas, "
                f"{one_of(list(STRATEGIES), name)}"
            )
    module = config.function.partition(":")[0].partition(".")[0]
    with importable_from(os.getcwd()):
        found = importlib.util.find_spec(module)
    if found is None:
        raise UserError(
            f"no module {module!r} in {os.getcwd()!r} nor among the installed ones "
            f"({where['function']}); run in the folder it lies in"
        )
    if config.nproc is not None and config.nproc > 4 * cores() and not config.oversubscribe:
        raise UserError(
            f"nproc {config.nproc} is more than 4 ranks for each of {cores()} cores (--nproc); "
            f"give {4 * cores()} or less, or add --oversubscribe"
        )
    return config


def with_flag(words: list[str]) -> list[str]:
    """The one word that belongs to no flag is the function's; here it gets its flag.

    >>> with_flag(["--nproc", "2", "mymodels:build"])
    ['--nproc', '2', '--function=mymodels:build']
    """
    wants_value = {flag(option.name) for option in fields(Doctor) if kind(option) is not bool}
    for place, word in enumerate(words):
        if not word.startswith("-") and (place == 0 or words[place - 1] not in wants_value):
            return [*words[:place], f"{flag('function')}={word}", *words[place + 1 :]]
    return words
