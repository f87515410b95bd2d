"""From a command line to a body that runs on every rank, and back to one exit status.

    sys.exit(launcher.main("own.py", parse, "own:run"))   # run(config, mesh) -> status

starts in one of three ways:

    train.py --nproc 4                       ranks of our own, on this machine
    torchrun --nproc_per_node=4 train.py     this process is one of 4, its environment says
    train.py                                 this process alone

Whatever goes wrong is said once. A refusal (UserError, MachineError) is one line and an exit
status. Anything else is a defect: the tracebacks of the ranks that failed, the cause first, with
those that merely lost a peer folded into one line; every other rank is ended. Nothing here imports
torch before a rank does, so that a mistake is answered at once.
"""

import faulthandler
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pkgutil import resolve_name
from typing import Protocol

from rich.console import Console

from dist_lab.errors import MachineError, UserError
from dist_lab.processes import ranks
from dist_lab.processes.failures import Failure, causes, gather, heading, how_it_ended, named, tell
from dist_lab.processes.ranks import cores

AFTER_TORCHRUN = 1.5  # seconds in which torchrun, once a rank has ended, ends the others
AT_EXIT = 5.0  # seconds for a rank to end once its body has returned


class Launch(Protocol):
    """What the launcher reads of a program's configuration."""

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
    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]: ...


def main(
    program: str,
    parse: Callable[[Sequence[str] | None], Launch],
    body: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run `body(config, mesh)` on every rank that the command line or torchrun asks for.

    Args:
        program: opens the error line, `train.py: error: ...`.
        parse: command line -> configuration; raises UserError.
        body: "module:function"; the module is imported by ranks alone, and once for all that are
            started here.

    Returns:
        The exit status: the body's own (the largest of all ranks'), 2 for the user's mistake, 1 for
        a refusal by the machine or a defect, 130 and 143 after SIGINT and SIGTERM. A rank of
        torchrun's ends its process instead when it fails: leaving a broken group may hang.
    """
    place, debug = None, False
    try:
        place = place_in_environment()
        # torchrun's SIGTERM must end a rank that waits in a collective, where no handler can run.
        with ranks.interruptible(signal.SIGINT, *([] if place else [signal.SIGTERM])):
            config = parse(argv)
            debug = config.debug
            check_interface(config.backend)
            if place is not None:
                return on_this_rank(config, body, *place)
            if config.nproc is not None:
                return on_new_ranks(program, config, body, config.nproc)
            return work(config, body, config.axes(1, plain=True), config.threads)
    except ranks.Interrupted as stopped:
        status = 128 + stopped.signal
        if stopped.signal == signal.SIGINT and sys.stderr.isatty() and (place or (0, 1))[0] == 0:
            print(file=sys.stderr)  # after ^C, so that the prompt has a line of its own
    except Exception as error:
        rank, size = place or (0, 1)
        failure = Failure.of(rank, error)
        if place is None and not failure.refused:
            raise
        if failure.second_hand or (failure.refused and rank > 0):
            time.sleep(AFTER_TORCHRUN)  # the rank that says it better has ended, and so will this
        status = say(program, [failure], size, debug)
    if place is not None:
        ranks.end_process(status)
    return status


def work(config: Launch, body: str, axes: dict[str, int], threads: int | None) -> int:
    """Run the body on this rank, once it has joined the others. None threads: as torch has it."""
    import torch

    from dist_lab.mesh import groups, mesh

    if threads is not None:
        torch.set_num_threads(threads)
    made = mesh.init_mesh(
        timeout=config.timeout, backend=config.backend, check=config.check_collectives,
        collectives=config.collectives, **axes,
    )  # fmt: skip
    status: int = resolve_name(body)(config, made)
    groups.disconnect()
    return status


# --- ranks of our own -----------------------------------------------------------------------------


def on_new_ranks(program: str, config: Launch, body: str, size: int) -> int:
    """Start the ranks, hear how each fared, say what went wrong. None is left when this returns."""
    config.axes(size)  # a mistake is answered before a rank is started
    preload = [*ranks.PRELOAD, body.split(":")[0]]
    started: list[ranks.Rank] = []
    with tempfile.TemporaryDirectory(prefix="dist_lab-") as folder:
        try:
            for rank in range(size):
                given = rank, new_rank, size, f"{folder}/rendezvous", config, body
                started.append(ranks.start(*given, preload=preload))
            statuses, failures, running = gather(started)
            if failures:
                status = say(program, failures, size, config.debug)
                if not causes(failures)[0].refused:
                    show_stacks(running)
                return status
            ranks.join(started, AT_EXIT)
            show_stacks([r for r in started if r.process.is_alive()])
        finally:
            codes = ranks.stop(started)
            Console().show_cursor()  # a rank with a progress bar may have been ended before it did
    if any(codes):
        failures = [Failure(n, how_it_ended(code), "") for n, code in enumerate(codes) if code]
        return say(program, failures, size, config.debug)
    return max(statuses.values())


def new_rank(
    pipe: Connection, rank: int, size: int, rendezvous: str, config: Launch, body: str
) -> None:
    """Join the other ranks, run the body, and send its status or a Failure."""
    from dist_lab.mesh import groups

    faulthandler.register(signal.SIGUSR1)
    try:
        store = groups.file_store(rendezvous, size)
        groups.connect(store, rank, size, timeout=config.timeout, backend=config.backend)
        pipe.send(work(config, body, config.axes(size), threads_of_each(config, size)))
    except BaseException as error:
        pipe.send(Failure.of(rank, error))
        ranks.end_process(1)


def threads_of_each(config: Launch, size: int) -> int:
    return config.threads or max(1, cores() // size)


def show_stacks(silent: Sequence[ranks.Rank]) -> None:
    """Make ranks that have neither failed nor finished print their stacks."""
    for rank in silent:
        here = heading(f"rank {rank.number}: still running")
        print(here, end="", file=sys.stderr, flush=True)
        ranks.ask_for_stack(rank)
        ranks.join([rank], 0.2)  # until it has written, or for good if it is stopped


# --- one of torchrun's ranks ----------------------------------------------------------------------


def on_this_rank(config: Launch, body: str, rank: int, size: int) -> int:
    if config.nproc is not None:
        raise UserError(
            f"--nproc {config.nproc} starts ranks, but this is already rank {rank} of {size}; "
            "drop --nproc, or start it without torchrun"
        )
    axes = config.axes(size)
    import torch.distributed as dist

    from dist_lab.mesh import groups

    try:
        store = groups.environment_store(rank, size, config.timeout)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = str(error).splitlines()[0]
        raise MachineError(f"rank {rank} cannot meet the others at {where}: {said}") from error
    groups.connect(store, rank, size, timeout=config.timeout, backend=config.backend)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return work(config, body, axes, threads_of_each(config, local))


def place_in_environment() -> tuple[int, int] | None:
    """(rank, size) if torchrun, or a person with several shells, started this process as a rank.

    Raises:
        UserError, MachineError: the environment says so, but makes no sense.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set, but RANK or WORLD_SIZE is (environment); start by torchrun, "
                "or unset both"
            )
    rank, size, port = (whole(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise UserError(
            f"RANK={rank} is no rank of WORLD_SIZE={size} (environment); ranks are numbered from 0 "
            "to WORLD_SIZE - 1, start by torchrun"
        )
    if not 0 < port < 1 << 16:
        raise MachineError(f"MASTER_PORT={port} is no port (environment); give one in 1..65535")
    return rank, size


def whole(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(
            f"{name}={os.environ[name]} is no whole number (environment); start by torchrun"
        ) from None


def check_interface(backend: str) -> None:
    """Raises MachineError for a network interface that gloo would not find."""
    known = [name for _, name in socket.if_nameindex()]
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if backend == "gloo" and name and name not in known:
            raise MachineError(
                f"GLOO_SOCKET_IFNAME={name} is no network interface (environment); name one of "
                f"{', '.join(known)}, or unset it"
            )


# What the library takes as a parameter, and names so in what it refuses. After a comma it is one of
# the arguments of a call that is shown.
PARAMETER = re.compile(
    r"""(?<!, )\b(impl|schedule|chunks|microbatches|backend|data|seq|cache|download)="""
    r"""(?:True|"([^"]*)"|('[^']*'|\w+)|(?=[),;]))"""
)


def in_flags(line: str) -> str:
    """A refusal of the library in the words of a command line.

    >>> in_flags('not in 3 (microbatches=); give microbatches=4, or impl="hand"')
    'not in 3 (--microbatches); give --microbatches 4, or --impl hand'
    >>> in_flags("data='a b': words(batch=4, seq=6) raised ValueError")
    "--data 'a b': words(batch=4, seq=6) raised ValueError"
    """
    return PARAMETER.sub(
        lambda found: " ".join(filter(None, (f"--{found[1]}", found[2], found[3]))), line
    )


# --- what went wrong ------------------------------------------------------------------------------


def say(program: str, failures: Sequence[Failure], size: int, debug: bool) -> int:
    """Tell stderr what went wrong, once. Returns the exit status."""
    nearest = causes(failures)
    refusals = [failure for failure in nearest if failure.refused]
    told = tell([failure for failure in nearest if debug or not failure.refused], size)
    others = [failure.rank for failure in failures if failure not in nearest]
    if told and others:
        told += heading(f"{named(others)} of {size}: waited in vain, or lost the connection")
    if refusals:
        told += f"{program}: error: {in_flags(refusals[0].what)}\n"
    print(told, end="", file=sys.stderr, flush=True)
    return max(failure.status for failure in nearest)
