"""The settings of generate.py. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lab.errors import UserError, shown
from dist_lab.programs.cli.model_ranks import ModelRanks, check_model
from dist_lab.programs.cli.ranks import check_nproc
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.cli.settings import setting


@dataclass(frozen=True)
class Generate(ModelRanks):
    """Which model continues which text, and how."""

    # fmt: off
    prompt: str = setting("", "the text to continue", metavar="TEXT", heading="common settings")
    prompt_file: str = setting("", "a file with the text to continue, all of it", metavar="FILE")
    tokens: int = setting(128, "generate so many at most", low=1)
    stop: str = setting("", "end before this text", metavar="TEXT")
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
    check_model(config, where)
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
