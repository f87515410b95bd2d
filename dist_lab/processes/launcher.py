"""Runs a program's body on every rank, from a command line to one exit status.

    sys.exit(launcher.main("own.py", parse, "own:run"))   # run(config, mesh) -> status

Such a program can be started in three ways:

    train.py --nproc 4                       the launcher starts 4 ranks on this machine
    torchrun --nproc_per_node=4 train.py     this process is one of 4 ranks, by its environment
    train.py                                 this process is the only rank

Every failure is reported once. A refusal (UserError, MachineError) is one line and an exit status.
Any other exception is a defect. Its report has the tracebacks of the ranks that failed, the cause
first, and one line for all ranks that only lost a peer. All other ranks are ended. The launcher
does not import torch before a rank does, so that wrong flags are reported at once.
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

from dist_lab.comm.board.stack import answering
from dist_lab.errors import MachineError, UserError
from dist_lab.processes import ranks
from dist_lab.processes.failures import (
    Failure,
    by_cause,
    causes,
    collect,
    describe,
    exit_in_words,
    heading,
    one_of_many,
    ranks_in_words,
)
from dist_lab.processes.ranks import cores

AFTER_TORCHRUN = 1.5  # seconds within which torchrun ends the other ranks after one has ended
AT_EXIT = 5.0  # seconds for a rank to end after its body has returned


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
    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]: ...


def main(
    program: str,
    parse: Callable[[Sequence[str] | None], Launch],
    body: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run `body(config, mesh)` on every rank that the command line or torchrun asks for.

    Args:
        program: the start of the error line, `train.py: error: ...`.
        parse: command line -> configuration; raises UserError.
        body: "module:function". Only ranks import the module. If the launcher starts the ranks,
            it is imported once, before the fork.

    Returns:
        The exit status: the body's own (the largest of all ranks), 2 for a mistake of the user, 1
        for a refusal by the machine or a defect, 130 and 143 after SIGINT and SIGTERM. If a rank
        under torchrun fails, we end the process: destroying a broken process group may hang.
    """
    rank_and_size, debug = None, False
    try:
        rank_and_size = rank_in_environment()
        # torchrun's SIGTERM must end a rank that waits in a collective, where no handler can run.
        with ranks.interruptible(signal.SIGINT, *([] if rank_and_size else [signal.SIGTERM])):
            config = parse(argv)
            debug = config.debug
            check_interface(config.backend)
            if rank_and_size is not None:
                return on_this_rank(config, body, *rank_and_size)
            if config.nproc is not None:
                return on_new_ranks(program, config, body, config.nproc)
            axes = config.axes(1, plain=True)
            tell(f"{program}: importing torch ...")
            return work(config, body, axes, config.threads)
    except ranks.Interrupted as stopped:
        status = 128 + stopped.signal
        is_rank_0 = rank_and_size is None or rank_and_size[0] == 0
        if stopped.signal == signal.SIGINT and sys.stderr.isatty() and is_rank_0:
            print(file=sys.stderr)  # after ^C, so that the prompt starts on a new line
    except Exception as error:
        rank, size = rank_and_size or (0, 1)
        failure = Failure.of(rank, error)
        if rank_and_size is None and not failure.refused:
            raise
        waited = failure.distance and not failure.is_first
        if waited or (failure.refused and rank > 0):
            time.sleep(AFTER_TORCHRUN)  # a rank with a better report ends first; torchrun ends us
        status = report(program, [failure], size, debug)
    if rank_and_size is not None:
        ranks.end_process(status)
    return status


def work(config: Launch, body: str, axes: dict[str, int], threads: int | None) -> int:
    """Run the body on this rank, which has joined the others. threads=None: torch's default."""
    import torch

    from dist_lab.mesh import groups
    from dist_lab.mesh.mesh import init_mesh

    if threads is not None:
        torch.set_num_threads(threads)
    mesh = init_mesh(
        timeout=config.timeout, backend=config.backend, check=config.check_collectives,
        collectives=config.collectives, **axes,
    )  # fmt: skip
    with answering(mesh.comm.board):
        status: int = resolve_name(body)(config, mesh)
    groups.disconnect()
    return status


def tell(line: str) -> None:
    """Print why nothing is shown yet, if anybody is watching: the import of torch takes seconds."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


# --- ranks that the launcher starts ---------------------------------------------------------------


def on_new_ranks(program: str, config: Launch, body: str, size: int) -> int:
    """Start the ranks, wait for their results, report failures. All have ended when it returns."""
    config.axes(size)  # raises on a mistake before a rank is started
    tell(f"{program}: starting {size} ranks, which import torch ...")
    preload = [*ranks.PRELOAD, body.split(":")[0]]
    started: list[ranks.Rank] = []
    with tempfile.TemporaryDirectory(prefix="dist_lab-") as folder:
        try:
            for rank in range(size):
                arguments = size, f"{folder}/rendezvous", config, body
                started.append(ranks.start(rank, new_rank, *arguments, preload=preload))
            statuses, failures, running = collect(started)
            if failures:
                status = report(program, failures, size, config.debug)
                if not causes(failures)[0].refused:
                    show_stacks(running)
                return status
            ranks.join(started, AT_EXIT)
            show_stacks([r for r in started if r.process.is_alive()])
        finally:
            codes = ranks.stop(started)
            Console().show_cursor()  # a rank that was ended may have left it hidden
    if any(codes):
        failures = [Failure(n, exit_in_words(code), "") for n, code in enumerate(codes) if code]
        return report(program, failures, size, config.debug)
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
        pipe.send(work(config, body, config.axes(size), threads_per_rank(config, size)))
    except BaseException as error:
        pipe.send(Failure.of(rank, error))
        ranks.end_process(1)


def threads_per_rank(config: Launch, size: int) -> int:
    return config.threads or max(1, cores() // size)


def show_stacks(running: Sequence[ranks.Rank]) -> None:
    """Make ranks that have neither failed nor finished print their stacks."""
    for rank in running:
        line = heading(f"rank {rank.number}: still running")
        print(line, end="", file=sys.stderr, flush=True)
        ranks.ask_for_stack(rank)
        ranks.join([rank], 0.2)  # time to print; a suspended rank (SIGSTOP) prints nothing


# --- a rank that torchrun started -----------------------------------------------------------------


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
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MachineError(
            f"rank {rank} cannot reach the other ranks at {address} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0]}"
        ) from error
    groups.connect(store, rank, size, timeout=config.timeout, backend=config.backend)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return work(config, body, axes, threads_per_rank(config, local))


def rank_in_environment() -> tuple[int, int] | None:
    """Returns (rank, size) if torchrun, or a user in several shells, started this rank; else None.

    Raises:
        UserError, MachineError: the variables of the environment are incomplete or wrong.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set, but RANK or WORLD_SIZE is (environment); start with torchrun, "
                "or unset both"
            )
    rank, size, port = (integer(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise UserError(
            f"RANK={rank} is not a rank of WORLD_SIZE={size} (environment); ranks are numbered "
            "from 0 to WORLD_SIZE - 1, start with torchrun"
        )
    if not 0 < port < 1 << 16:
        raise MachineError(f"MASTER_PORT={port} is not a port (environment); give one in 1..65535")
    return rank, size


def integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(
            f"{name}={os.environ[name]} is not an integer (environment); start with torchrun"
        ) from None


def check_interface(backend: str) -> None:
    """Raises MachineError if GLOO_SOCKET_IFNAME names a network interface that does not exist."""
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if backend == "gloo" and name and name not in interfaces:
            raise MachineError(
                f"GLOO_SOCKET_IFNAME={name} is not a network interface (environment); give one "
                f"of {', '.join(interfaces)}, or unset it"
            )


# A Python parameter in an error message of dist_lab: `name=`, maybe with a value. After a comma it
# belongs to a call that the message quotes, and is not replaced.
PARAMETER = re.compile(
    r"""(?<!, )\b(impl|schedule|chunks|microbatches|backend|data|seq|cache|download|strategy|"""
    r"""threads|reduce_order|reduce_dtype|defer_reduce|sync_batchnorm|offload)="""
    r"""(?:True|"([^"]*)"|('[^']*'|\w+)|(?=[),;]))"""
)


def in_flags(line: str) -> str:
    """Returns an error message of dist_lab with flags in place of Python parameters.

    >>> in_flags('not in 3 (microbatches=); give microbatches=4, or impl="hand"')
    'not in 3 (--microbatches); give --microbatches 4, or --impl hand'
    >>> in_flags("data='a b': words(batch=4, seq=6) raised ValueError")
    "--data 'a b': words(batch=4, seq=6) raised ValueError"
    """

    def flag(match: re.Match[str]) -> str:
        return " ".join(filter(None, ("--" + match[1].replace("_", "-"), match[2], match[3])))

    return PARAMETER.sub(flag, line)


# --- reports of failures --------------------------------------------------------------------------


def report(program: str, failures: Sequence[Failure], size: int, debug: bool) -> int:
    """Print the failures to stderr, each once. Returns the exit status."""
    nearest = one_of_many(causes(failures))
    refusals = [failure for failure in nearest if failure.refused]
    text = describe([failure for failure in nearest if debug or not failure.refused], size)
    others = [failure.rank for failure in failures if failure not in nearest]
    if text and others:
        text += heading(f"{ranks_in_words(others)} of {size}: timed out, or lost the connection")
    if not any(failure.board or failure.details for failure in nearest):  # it died silently
        text += next((f"{f.board}\n" for f in by_cause(failures) if f.board), "")
    if refusals:
        text += f"{program}: error: {in_flags(refusals[0].summary)}\n"
    print(text, end="", file=sys.stderr, flush=True)
    return max(failure.status for failure in nearest)
