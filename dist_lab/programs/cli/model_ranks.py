"""The settings of programs that load a trained model on ranks of pp and tp. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.mesh_text import mesh_in_words, read_mesh
from dist_lab.programs.cli.ranks import RankSettings, needs_ranks
from dist_lab.programs.cli.settings import setting

AXES = ("pp", "tp")


@dataclass(frozen=True)
class ModelRanks(RankSettings):
    """Which model, and how it is split over the ranks."""

    # fmt: off
    checkpoint: str = setting("", "the model: a checkpoint, a folder of them or of a run, or a "
        "Hugging Face folder", metavar="DIR", heading="common settings")
    mesh: Mapping[str, int] | None = setting(None, "split the model over ranks: tp=2, pp=2 or "
        "pp=2,tp=2; default: tp along all ranks", metavar="AXIS=N,...", read=read_mesh,
        heading="common settings")
    # fmt: on

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns the mesh for `size` processes: tp along all of them unless --mesh says."""
        axes = dict(self.mesh or {"tp": size})
        needed = math.prod(axes.values())
        if plain and needed > 1:
            raise needs_ranks(f"mesh {mesh_in_words(axes)}", "--mesh", needed)
        if needed != size:
            raise UserError(
                f"mesh {mesh_in_words(axes)} needs {needed} processes, {size} were started "
                f"(--mesh); give --nproc {needed}"
            )
        return axes


def check_model(config: ModelRanks, where: Mapping[str, str], *, needed: bool = True) -> None:
    """Raise UserError for a wrong mesh, and where there is no folder.

    Args:
        needed: a folder has to be given.
    """
    for axis in config.mesh or {}:
        if axis not in AXES:
            raise UserError(
                f"mesh axis {shown(axis)} does not split a model that generates text "
                f"({where['mesh']}); give {one_of(AXES, axis)}: --mesh pp=2,tp=2"
            )
    if not config.checkpoint and not needed:
        return
    if not config.checkpoint:
        raise UserError("no model is given; add --checkpoint DIR, such as runs/003-fsdp-gpt-tiny")
    if not Path(config.checkpoint).expanduser().is_dir():
        raise UserError(
            f"there is no folder {shown(config.checkpoint)} ({where['checkpoint']}); give that of "
            "a run, such as runs/003-fsdp-gpt-tiny"
        )
