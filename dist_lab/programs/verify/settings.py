"""The settings of verify.py: those of a run, and of the matrix. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.checks import check_together
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.settings import AtLeast, setting
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.verify.matrix.cells import Cell, all_cells, matching

# A bug shows in the first steps, so a small run suffices; in float64 rounding cannot hide it.
DEFAULTS: Mapping[str, Any] = {"steps": 3, "batch": AtLeast(8), "seq": 32, "dtype": "float64"}
BITS = {**DEFAULTS, "steps": 20, "dtype": "float32"}  # with --reduce-order
WITHOUT = ["warmup", "overwrite", "about", "val_every", "log_every", "sentinel"]
OF_THE_MATRIX = ("matrix", "only", "out", "debug")


@dataclass(frozen=True)
class Verify(Config):
    """The settings of one comparison, or of the matrix."""

    # fmt: off
    matrix: bool = setting(False, "compare every mix of strategies instead, on tiny models and on "
        "2 to 32 ranks that it starts itself; given the same --out DIR again, it runs only what it "
        "has not found equal yet", heading="all mixes")
    only: str = setting("", "of --matrix, the cells whose names contain all of these words: "
        "'zero1:pp2xdp2 zb'", metavar="TEXT")
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns {} for the matrix: this process only starts ranks. Else see Config."""
        if not self.matrix:
            return super().axes(size, plain=plain)
        if size > 1:
            raise UserError(
                f"matrix starts its own ranks, {size} were started (--matrix); type python "
                "launch/verify.py --matrix"
            )
        return {}

    @property
    def cells(self) -> list[Cell]:
        """The cells of the matrix that --only selects."""
        return matching(self.only, all_cells())


def read(argv: Sequence[str] | None, description: str | None) -> Verify:
    """Reads the command line of verify.py. Raises UserError for every mistake visible in it."""
    config, where = read_settings(Verify, argv, "verify.py", description, DEFAULTS, WITHOUT)
    if config.reduce_order:
        config, where = read_settings(Verify, argv, "verify.py", description, BITS, WITHOUT)
    if not config.matrix:
        if config.only:
            problem = f"only selects cells of the matrix ({where['only']})"
            raise UserError(f"{problem}; give --matrix too, or leave it out")
        check_together(config, where)
        return config
    alone = Verify(**DEFAULTS)
    # The mesh first: it also determines the strategy.
    for name in sorted((option.name for option in fields(Verify)), key=lambda n: n != "mesh"):
        if name not in OF_THE_MATRIX and getattr(config, name) != getattr(alone, name):
            raise UserError(
                f"matrix has its own ranks, models and settings, and takes no {name} "
                f"({where[name]}); leave it out, or leave out --matrix"
            )
    if not config.cells:
        near = one_of(["dp:dp2 mlp m2", "zero1:pp2xdp2xtp2 gpt-tied zb"], config.only)
        raise UserError(
            f"no cell has all words of {shown(config.only)} in its name ({where['only']}); give "
            f"words such as {near}"
        )
    return config
