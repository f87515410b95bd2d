"""Attempts of one run: when a rank fails, all are ended, and new ranks resume the run.

    train.py --nproc 4 --restarts 3                   the launcher starts the new ranks
    torchrun --max-restarts 3 ... train.py            torchrun starts them

All attempts write to one output folder, and each attempt after the first resumes from the newest
valid checkpoint in it, as with `--resume auto`. Our launcher chooses the folder before it starts a
rank. Under torchrun rank 0 chooses it and writes it to torchrun's store, which lives as long as the
run; rank 0 of a later attempt finds it there.

A refusal (UserError, MachineError) ends the run at once, because a new attempt would meet it again:
a wrong request, a full disk, a loss that is not finite. Everything else costs one restart: a rank
that was killed, that exited, that raised any other exception, or that hung until the timeout.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from dist_lab.errors import MachineError, UserError
from dist_lab.processes.failures import Failure, causes, ranks_in_words

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

FOLDER = "output folder"  # a key in the store of all attempts
ATTEMPT = "attempt"  # a key in the store of one attempt


class Launch(Protocol):
    """The part of a program's configuration that the launcher reads."""

    @property
    def nproc(self) -> int | None: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def backend(self) -> str: ...
    @property
    def timeout(self) -> float: ...
    @property
    def collectives(self) -> str: ...
    @property
    def check_collectives(self) -> bool: ...
    @property
    def debug(self) -> bool: ...
    @property
    def out(self) -> str: ...
    @property
    def restarts(self) -> int: ...
    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]: ...
    def attempt(self, out: str, *, again: bool) -> Self:
        """Returns the settings of an attempt that writes to `out`; `again`: it resumes there."""


Place = Callable[[Any], str]  # the program's own configuration -> the output folder


def can_restart(failures: Sequence[Failure]) -> bool:
    """Whether an attempt that ended so may be followed by another."""
    return not causes(failures)[0].refused


def restart_line(
    program: str, failures: Sequence[Failure], size: int, restart: int, config: Launch
) -> str:
    """Says in one line which rank failed first, how, and which restart follows.

    If a rank hangs, no rank has failed by itself: the first to give up says for whom it waited.
    """
    first = causes(failures)[0]
    ranks = [failure.rank for failure in causes(failures) if failure.summary == first.summary]
    hint = "" if config.debug or not first.details else " (--debug shows the traceback)"
    did = "gave up first" if first.distance else "failed first"
    return (
        f"{program}: {ranks_in_words(ranks)} of {size} {did}: {first.summary}{hint}; "
        f"restart {restart} of {config.restarts}, in {config.out}"
    )


def agreed_attempt(
    config: Launch, place: Place, rank: int, of_this: "Store", of_all: "Store"
) -> Launch:
    """Returns the settings of this attempt under torchrun, with the same folder on every rank.

    Args:
        of_this, of_all: the store of this attempt, and the one that all attempts share.
    """
    if rank == 0:
        again, problem, by_user = of_all.check([FOLDER]), "", True
        try:
            out = of_all.get(FOLDER).decode() if again else place(config)
            of_all.set(FOLDER, out)
        except (UserError, MachineError) as error:  # the other ranks wait for this answer
            out, problem, by_user = "", str(error), isinstance(error, UserError)
        of_this.set(ATTEMPT, json.dumps([out, again, problem, by_user]))
    out, again, problem, by_user = json.loads(of_this.get(ATTEMPT))
    if problem:
        raise (UserError if by_user else MachineError)(problem)
    return config.attempt(out, again=again)
