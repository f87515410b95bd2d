"""The settings of serve.py. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lab.inference.policies import NAMES
from dist_lab.programs.cli.model_ranks import ModelRanks, check_model
from dist_lab.programs.cli.ranks import check_nproc
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.cli.settings import setting

BLOCK = 16  # tokens of a block of the cache
LINE = "line"  # the setting without a flag


@dataclass(frozen=True)
class Serve(ModelRanks):
    """Which model is served, where, and to how many."""

    # fmt: off
    host: str = setting("127.0.0.1", "listen at this address; 0.0.0.0: let other machines ask, "
        "which nothing then protects", metavar="ADDRESS", heading="common settings")
    port: int = setting(8000, "listen at this port; 0: any that is free", low=0, high=65535)
    name: str = setting("", "call the model so in answers; default: the name of the folder",
        metavar="TEXT")
    policy: str = setting("vllm", "which texts share a step: see dist_lab/inference/README.md",
        choices=NAMES, heading="scheduling")
    blocks: int = setting(1024, f"room for so many times {BLOCK} tokens in the cache", low=2)
    prefix_cache: bool | None = setting(None, "keep the cache of prompts, for others that begin "
        "alike; by default as the server whose policy it is")
    max_queue: int = setting(256, "so many texts may wait; others are told to come again", low=1)
    stop_seconds: float = setting(10.0, "when asked to stop, let texts go on for so long", low=0,
        high=3600)
    line: str = setting("", "the socket of the router")
    # fmt: on

    @property
    def model_name(self) -> str:
        """The name of the run, also where a folder in it was given."""
        folder = Path(self.checkpoint).expanduser().resolve()
        if folder.name.startswith("step-"):
            folder = folder.parent
        if folder.name == "checkpoints":
            folder = folder.parent
        return self.name or folder.name


def read(argv: Sequence[str] | None, description: str | None) -> Serve:
    """Read the command line of serve.py.

    Raises:
        UserError: any mistake that can be seen without reading the model.
    """
    config, where = read_settings(Serve, argv, "serve.py", description, {}, without=[LINE])
    check_model(config, where)
    check_nproc(config, where)
    config.axes(config.nproc or 1)
    return config
