"""The settings of serve_compare.py. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any

from dist_lab.errors import UserError, shown
from dist_lab.inference.policies import NAMES
from dist_lab.inference.trace import Arrival, built_in
from dist_lab.programs.cli.model_ranks import ModelRanks, check_model
from dist_lab.programs.cli.ranks import check_nproc
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.cli.settings import setting, split_names

SIZES = ("tiny", "small", "25m", "124m")


def read_cost(value: object, where: str) -> tuple[float, float]:
    """Read the value of --cost.

    >>> read_cost("20,0.05", "--cost")
    (20.0, 0.05)
    """
    words = value.split(",") if isinstance(value, str) else []
    try:
        a, b = map(float, words)
    except ValueError:
        a = b = nan
    if not (0 < a < inf and 0 <= b < inf):
        raise UserError(
            f"no cost {shown(value)} ({where}); give the milliseconds of a step and of a token, "
            "such as 20,0.05"
        )
    return a, b


@dataclass(frozen=True)
class ServeCompare(ModelRanks):
    """Which policies race, on which model, memory and trace."""

    # fmt: off
    policy: str = setting(",".join(NAMES), "policies, separated by commas", metavar="LIST",
        heading="common settings")
    size: str | None = setting(None, "without --checkpoint: random weights of a gpt of this size; "
        "default: tiny", choices=SIZES)
    wall: bool = setting(False, "race on the wall's clock, too, not on the virtual one alone")
    out: str = setting("", "write serve_compare.json, .csv and .png to this folder", metavar="DIR")
    blocks: int = setting(80, "blocks of the cache", low=1, heading="the engine")
    block_size: int = setting(16, "tokens in a block", low=1, high=1024)
    sequences: int = setting(16, "sequences that run at once at most", low=1)
    budget: int = setting(64, "tokens of a step, for policies with a budget: vllm, splitfuse",
        low=1)
    prefix_cache: str = setting("own", "find beginnings of prompts in the cache: own, where the "
        "policy's server does; on; off", choices=("own", "on", "off"))
    requests: int = setting(48, "number of requests", low=1, heading="the trace")
    gap: float = setting(6.0, "mean time between two arrivals; 1 is the time of a step of one "
        "token; 0: all come at once", low=0)
    seed: int = setting(0, "another seed draws another trace", low=0)
    cost: tuple[float, float] | None = setting(None, "milliseconds on the virtual clock: a step of "
        "n tokens takes A + B n; default: measured", metavar="A,B", read=read_cost)
    # fmt: on

    def names(self) -> list[str]:
        """The policies. Raises UserError for an unknown one."""
        return split_names(self.policy, NAMES, "--policy", "policy")

    def trace(self, vocab: int) -> list[Arrival]:
        return built_in(self.requests, self.gap, vocab, self.seed)


def read(argv: Sequence[str] | None, description: str | None) -> ServeCompare:
    """Read the command line of serve_compare.py.

    Raises:
        UserError: any mistake that can be seen without reading the model.
    """
    defaults: Mapping[str, Any] = {"threads": 1}
    config, where = read_settings(ServeCompare, argv, "serve_compare.py", description, defaults)
    check(config, where)
    check_nproc(config, where)
    return config


def check(config: ServeCompare, where: Mapping[str, str]) -> None:
    """Check the settings against each other."""
    check_model(config, where, needed=False)
    if config.checkpoint and config.size:
        raise UserError(
            f"checkpoint and size {config.size} are two models (--checkpoint, --size); give one "
            "of them"
        )
    if not config.names():
        raise UserError(f"no policy is given (--policy); give one of {', '.join(NAMES)}")
    longest = max(arrival.longest for arrival in config.trace(vocab=1))
    room = config.blocks * config.block_size
    if longest > room:
        least = -(-longest // config.block_size)
        raise UserError(
            f"the longest text of the trace has {longest} tokens, and the cache has room for "
            f"{room:,}: {config.blocks} blocks of {config.block_size} ({where['blocks']}); give "
            f"--blocks {least} or more"
        )
