"""The settings of verify.py: of a run, the matrix, the museum. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.checks import check_together
from dist_lab.programs.cli.config import RESTARTS, Config
from dist_lab.programs.cli.settings import AtLeast, as_typed, setting
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.verify.matrix.cells import Cell, all_cells, matching

# A bug shows in the first steps, so a small run suffices; in float64 rounding cannot hide it.
DEFAULTS: Mapping[str, Any] = {"steps": 3, "batch": AtLeast(8), "seq": 32, "dtype": "float64"}
BITS = {**DEFAULTS, "steps": 20, "dtype": "float32"}  # with --reduce-order
WITHOUT = [
    "warmup", "overwrite", "about", "val_every", "log_every", "log_samples", "sentinel", *RESTARTS,
]  # fmt: skip
# Flag of a program that starts its own ranks -> the settings that it takes.
OWN_RANKS: Mapping[str, tuple[str, ...]] = {
    "matrix": ("matrix", "only", "out", "debug"),
    "museum": ("museum", "out", "debug"),
    "bug": ("bug", "out", "debug"),
}


@dataclass(frozen=True)
class Verify(Config):
    """The settings of one comparison, of the matrix, or of the museum."""

    # fmt: off
    matrix: bool = setting(False, "compare every mix of strategies instead, on tiny models and on "
        "2 to 32 ranks that it starts itself; given the same --out DIR again, it runs only what it "
        "has not found equal yet", heading="all mixes")
    only: str = setting("", "of --matrix, the cells whose names contain all of these words: "
        "'zero1:pp2xdp2 zb'", metavar="TEXT")
    museum: bool = setting(False, "make each of some fifty bugs of public trainers once more, on "
        "ranks that it starts itself, and show what detects it", heading="bugs")
    bug: str = setting("", "show one of these bugs: its story, the function that it replaces, and "
        "what detects it; 'list' shows their names", metavar="NAME")
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns {} if this process only starts ranks, as for the matrix. Else see Config."""
        if self.own_ranks is None:
            return super().axes(size, plain=plain)
        if size > 1:
            typed = as_typed(self.own_ranks, getattr(self, self.own_ranks))
            raise UserError(
                f"{self.own_ranks} starts its own ranks, {size} were started (--{self.own_ranks}); "
                f"type python launch/verify.py {typed}"
            )
        return {}

    @property
    def own_ranks(self) -> str | None:
        """The flag in OWN_RANKS that is set, the first if there are several."""
        return next((name for name in OWN_RANKS if getattr(self, name)), None)

    @property
    def cells(self) -> list[Cell]:
        """The cells of the matrix that --only selects."""
        return matching(self.only, all_cells())


def read(argv: Sequence[str] | None, description: str | None) -> Verify:
    """Reads the command line of verify.py. Raises UserError for every mistake visible in it."""
    config, where = read_settings(Verify, argv, "verify.py", description, DEFAULTS, WITHOUT)
    if config.reduce_order:
        config, where = read_settings(Verify, argv, "verify.py", description, BITS, WITHOUT)
    if config.own_ranks is None:
        if config.only:
            problem = f"only selects cells of the matrix ({where['only']})"
            raise UserError(f"{problem}; give --matrix too, or leave it out")
        check_together(config, where)
        return config
    alone = Verify(**DEFAULTS)
    # These first, because they determine others: --reduce-order the threads, the mesh the strategy.
    names = dict.fromkeys(["reduce_order", "mesh", *(option.name for option in fields(Verify))])
    for name in names:
        if name not in OWN_RANKS[config.own_ranks] and getattr(config, name) != getattr(
            alone, name
        ):
            raise UserError(
                f"{config.own_ranks} has its own ranks, models and settings, and takes no {name} "
                f"({where[name]}); leave it out, or leave out --{config.own_ranks}"
            )
    if config.matrix and not config.cells:
        near = one_of(["dp:dp2 mlp m2", "zero1:pp2xdp2xtp2 gpt-tied zb"], config.only)
        raise UserError(
            f"no cell has all words of {shown(config.only)} in its name ({where['only']}); give "
            f"words such as {near}"
        )
    return config
