"""The settings of generate.py. Does not import torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.mesh_text import mesh_in_words, read_mesh
from dist_lab.programs.cli.ranks import RankSettings, check_nproc, needs_ranks
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.cli.settings import setting

AXES = ("pp", "tp")


@dataclass(frozen=True)
class Generate(RankSettings):
    """Which model continues which text, and how."""

    # fmt: off
    checkpoint: str = setting("", "the model: a checkpoint, a folder of them or of a run, or a "
        "Hugging Face folder", metavar="DIR", heading="common settings")
    prompt: str = setting("", "the text to continue", metavar="TEXT")
    prompt_file: str = setting("", "a file with the text to continue, all of it", metavar="FILE")
    tokens: int = setting(128, "generate so many at most", low=1)
    stop: str = setting("", "end before this text", metavar="TEXT")
    mesh: Mapping[str, int] | None = setting(None, "split the model over ranks: tp=2, pp=2 or "
        "pp=2,tp=2; default: tp along all ranks", metavar="AXIS=N,...", read=read_mesh)
    temperature: float | None = setting(None, "sample, from the model's probabilities at 1, from "
        "sharper ones below; 0: take the most likely token", low=0, heading="sampling")
    top_k: int | None = setting(None, "sample from the K most likely tokens", low=1)
    top_p: float | None = setting(None, "sample from the most likely tokens that have this "
        "probability together", above=0, high=1)
    seed: int | None = setting(None, "another seed samples another text; default: 0", low=0)
    # fmt: on

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled; if not, the most likely one is taken."""
        given = (self.temperature, self.top_k, self.top_p, self.seed)
        return any(value is not None for value in given) and self.temperature != 0

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


def read(argv: Sequence[str] | None, description: str | None) -> Generate:
    """Read the command line of generate.py.

    Raises:
        UserError: any mistake that can be seen without reading the model.
    """
    config, where = read_settings(Generate, argv, "generate.py", description, {})
    check(config, where)
    check_nproc(config, where)
    return config


def check(config: Generate, where: Mapping[str, str]) -> None:
    """Check the settings against each other."""
    for axis in config.mesh or {}:
        if axis not in AXES:
            raise UserError(
                f"mesh axis {shown(axis)} does not split a model that generates text "
                f"({where['mesh']}); give {one_of(AXES, axis)}: --mesh pp=2,tp=2"
            )
    if not config.checkpoint:
        raise UserError("no model is given; add --checkpoint DIR, such as runs/003-fsdp-gpt-tiny")
    if not Path(config.checkpoint).expanduser().is_dir():
        raise UserError(
            f"there is no folder {shown(config.checkpoint)} ({where['checkpoint']}); give that of "
            "a run, such as runs/003-fsdp-gpt-tiny"
        )
    if config.prompt and config.prompt_file:
        raise UserError(
            "prompt and prompt_file are two texts (--prompt, --prompt-file); give one of them"
        )
    if not config.prompt and not config.prompt_file:
        raise UserError(
            'the prompt is empty, and a model continues a text (--prompt); give --prompt "def "'
        )
    if config.prompt_file:
        path = Path(config.prompt_file).expanduser()
        if not path.is_file():
            raise UserError(f"there is no file {shown(config.prompt_file)} (--prompt-file)")
        if not path.stat().st_size:
            raise UserError(
                f"file {shown(config.prompt_file)} is empty, and a model continues a text "
                "(--prompt-file)"
            )
