"""The settings of a program's ranks, which all programs share. Does not import torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from dist_lab.errors import UserError
from dist_lab.processes.ranks import cores
from dist_lab.programs.cli.settings import setting


@dataclass(frozen=True)
class RankSettings(ABC):
    """How many ranks a program has, and how they communicate."""

    # fmt: off
    nproc: int | None = setting(None, "start N ranks on this machine; default: run in this process "
        "alone, or in the ranks that torchrun started", low=1, heading="common settings")
    oversubscribe: bool = setting(False, "allow --nproc above 4 ranks per core",
        heading="ranks and communication")
    threads: int | None = setting(None, "CPU threads per rank; default: cores // ranks", low=1,
        high=1024)
    backend: str = setting("gloo", "torch.distributed backend: gloo (CPU) or nccl (GPU)",
        choices=("gloo", "nccl"))
    timeout: float = setting(60.0, "seconds until a collective that does not complete is an error",
        low=0.1, high=86400)
    debug: bool = setting(False, "show the traceback of an error", heading="logs and errors")
    # fmt: on

    # Settings in some programs.
    collectives = "auto"
    check_collectives = False
    restarts = 0
    out = ""

    @abstractmethod
    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns the mesh for `size` processes, axis -> size; {} for one process without ranks.

        Args:
            plain: this process was not started as a rank: no --nproc and no torchrun.

        Raises:
            UserError: the settings do not fit `size` processes.
        """

    def attempt(self, out: str, *, again: bool) -> Self:
        """Returns the settings of one attempt of the run; programs without restarts have one."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values, for the summary and to compare ranks."""
        return asdict(self)


def check_nproc(config: RankSettings, where: Mapping[str, str]) -> None:
    """Check that the machine has enough cores for --nproc ranks, and that the run fits --nproc."""
    if config.nproc is not None:
        most = 4 * cores()
        if config.nproc > most and not config.oversubscribe:
            raise UserError(
                f"nproc {config.nproc} is more than 4 ranks for each of {cores()} cores "
                f"({where['nproc']}); give {most} or less, or add --oversubscribe"
            )
        config.axes(config.nproc)


def needs_ranks(what: str, where: str, ranks: int) -> UserError:
    """The error of a program that was started as a single process. `ranks`: how many to suggest."""
    return UserError(
        f"{what} needs several processes, this is a single one ({where}); add --nproc {ranks}, or "
        f"start it with torchrun --nproc_per_node={ranks}"
    )
