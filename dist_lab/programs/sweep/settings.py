"""The settings of sweep.py: those of compare.py, for several sizes and numbers of ranks.

Does not import torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dist_lab.errors import UserError, shown
from dist_lab.programs.cli.registry import ALL_SIZES
from dist_lab.programs.cli.settings import AtLeast, setting, split_names
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.compare import settings as compare
from dist_lab.programs.compare.entries import entries

DEFAULTS: Mapping[str, Any] = {
    "steps": 3, "rounds": 8, "strategies": "ddp,fsdp,tp,pp", "out": "runs/sweep", "threads": 1,
}  # fmt: skip
WITHOUT = [*compare.WITHOUT, "nproc", "size", "reference", "smoke", "overwrite"]
SINGLE = "single"  # the reference: one process trains the whole batch


@dataclass(frozen=True)
class Cell:
    """The comparison of all strategies on one model and one number of ranks."""

    settings: compare.Settings

    @property
    def ranks(self) -> int:
        assert self.settings.nproc is not None
        return self.settings.nproc

    def __str__(self) -> str:
        return f"{self.settings.model}-{self.settings.size}-{self.ranks}"


@dataclass(frozen=True)
class Sweep(compare.Settings):
    """The settings of a sweep."""

    # fmt: off
    worlds: str = setting("2,4", "numbers of ranks, separated by commas; a mesh in --strategies "
        "runs on its own number of ranks only", heading="the sweep", metavar="LIST")
    sizes: str = setting("tiny", "sizes of the model, separated by commas", metavar="LIST")
    scaling: str = setting("strong", "strong: --batch samples a step, on any number of ranks; "
        "weak: --batch samples for each rank", choices=("strong", "weak"))
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns {}: this process only starts the ranks of each cell."""
        if size > 1:
            raise UserError(
                f"a sweep starts its own ranks, {size} were started; type python launch/sweep.py "
                f"--worlds {self.worlds}"
            )
        return {}

    def cells(self) -> list[Cell]:
        """All comparisons. They have one batch (weak: one for each rank) and one depth of a size.

        Raises:
            UserError: a word of --worlds, --sizes or --strategies has no meaning.
        """
        cells = []
        for size in split_names(self.sizes, ALL_SIZES, "--sizes", "size"):
            of_size = [self._cell(size, ranks) for ranks in read_worlds(self.worlds)]
            fitted = [cell.fitted(cell.nproc or 1) for cell in of_size]
            layers = max((run.layers or 0 for run in fitted), default=0) or None
            batch = self.batch
            while self.scaling == "strong" and isinstance(batch, AtLeast):
                found = {replace(c, batch=batch).fitted(c.nproc or 1).batch for c in of_size}
                batch = AtLeast(max(found)) if len(found) > 1 else int(max(found))
            for cell in of_size:
                if self.scaling == "strong":
                    cell = replace(cell, batch=batch)
                cells.append(Cell(replace(cell, layers=layers)))
        return cells

    def _cell(self, size: str, ranks: int) -> compare.Settings:
        values = {f.name: getattr(self, f.name) for f in fields(compare.Settings)}
        batch = type(self.batch)(self.batch * (ranks if self.scaling == "weak" else 1))
        values |= {"size": size, "nproc": ranks, "batch": batch, "reference": SINGLE}
        values["strategies"] = self._strategies_on(ranks)
        return compare.Settings(**values)

    def _strategies_on(self, ranks: int) -> str:
        """The words of --strategies that can run on so many ranks, after the reference."""
        if self.strategies == compare.ALL:
            return compare.ALL
        words = [word.strip() for word in self.strategies.split(",")]
        meshes = {word: entries([word])[0].mesh for word in words}
        on_these = [
            w
            for w in words
            if w != SINGLE and math.prod((meshes[w] or {"": ranks}).values()) == ranks
        ]
        if not on_these:
            raise UserError(
                f"none of {shown(self.strategies)} runs on {ranks} ranks (--strategies, --worlds); "
                "leave that number out, or name a strategy without a mesh of its own"
            )
        return ",".join([SINGLE, *on_these])


def read_worlds(text: str) -> list[int]:
    """The numbers of --worlds, from small to large.

    >>> read_worlds("4,2")
    [2, 4]
    """
    worlds = set()
    for word in text.split(","):
        if not (word.strip().isascii() and word.strip().isdecimal()) or not int(word[:6]):
            raise UserError(
                f"no number of ranks {shown(word)} (--worlds); give numbers from 1, separated by "
                "commas, such as 2,4,8"
            )
        worlds.add(int(word))
    return sorted(worlds)


def read(argv: Sequence[str] | None, description: str | None = None) -> Sweep:
    """Read the command line of sweep.py. Raises UserError for every mistake visible in it."""
    sweep, where = read_settings(Sweep, argv, "sweep.py", description, DEFAULTS, WITHOUT)
    where |= {"nproc": "--worlds", "size": "--sizes"}
    for cell in sweep.cells():
        try:
            compare.check(cell.settings, where)
        except UserError as error:
            raise as_typed_here(error, cell) from None
    return sweep


def as_typed_here(error: UserError, cell: Cell) -> UserError:
    """The error of a cell, which names --mesh where the numbers of ranks are those of --worlds."""
    cause, found, _ = str(error).partition(" (--mesh)")
    if not found or any(entry.mesh for entry in cell.settings.entries()):
        return error
    return UserError(f"{cause} (--worlds); leave {cell.ranks} out, or name other --strategies")
