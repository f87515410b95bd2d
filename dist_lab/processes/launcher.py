"""Runs a program's body on every rank, from a command line to one exit status.

    sys.exit(launcher.main("own.py", parse, "own:run"))   # run(config, mesh) -> status

Such a program can be started in three ways:

    train.py --nproc 4                       the launcher starts 4 ranks on this machine
    torchrun --nproc_per_node=4 train.py     this process is one of 4 ranks, by its environment
    train.py                                 this process is the only rank

Every failure is reported once. A refusal (UserError, MachineError) is one line and an exit status.
Any other exception is a defect. Its report has the tracebacks of the ranks that failed, the cause
first, and one line for all ranks that only lost a peer; of a collective that failed, not the
traceback but what every rank was doing. All other ranks are ended. The launcher
does not import torch before a rank does, so that wrong flags are reported at once.

With `restarts`, a failed attempt is followed by another in the same output folder: see attempts.py.
"""

import faulthandler
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pkgutil import resolve_name

from rich.console import Console

from dist_lab.errors import MachineError, UserError
from dist_lab.processes import ranks
from dist_lab.processes.attempts import Launch, Place, agreed_attempt, can_restart, restart_line
from dist_lab.processes.failures import Failure, causes, collect, exit_in_words, heading
from dist_lab.processes.left import way_on, with_faults
from dist_lab.processes.meeting_place import meeting_place
from dist_lab.processes.ranks import cores
from dist_lab.processes.report import report

AFTER_TORCHRUN = 1.5  # seconds within which torchrun ends the other ranks after one has ended
AFTER_CAUSE = 0.1  # with restarts: seconds for a second failure, after the first has its cause
AT_EXIT = 5.0  # seconds for a rank to end after its body has returned


def main(
    program: str,
    parse: Callable[[Sequence[str] | None], Launch],
    body: str,
    argv: Sequence[str] | None = None,
    *,
    place: Place | None = None,
) -> int:
    """Run `body(config, mesh)` on every rank that the command line or torchrun asks for.

    Args:
        program: the start of the error line, `train.py: error: ...`.
        parse: command line -> configuration; raises UserError.
        body: "module:function". Only ranks import the module. If the launcher starts the ranks,
            it is imported once, before the fork.
        place: chooses the output folder, for a program that can be restarted. Called once for all
            attempts. If the run is stopped or fails, a line says how it goes on there.

    Returns:
        The exit status: the body's own (the largest of all ranks), 2 for a mistake of the user, 1
        for a refusal by the machine or a defect, 130 and 143 after SIGINT and SIGTERM. If a rank
        under torchrun fails, we end the process: destroying a broken process group may hang.
    """
    rank_and_size, debug, out, is_new = None, False, "", False
    try:
        rank_and_size = rank_in_environment()
        # torchrun's SIGTERM must end a rank that waits in a collective, where no handler can run.
        with ranks.interruptible(signal.SIGINT, *([] if rank_and_size else [signal.SIGTERM])):
            config = parse(argv)
            debug = config.debug
            check_interface(config.backend)
            if rank_and_size is not None:
                return on_this_rank(config, body, *rank_and_size, place)
            axes = config.axes(config.nproc or 1, plain=config.nproc is None)  # raises on a mistake
            if place is not None:
                is_new = not config.out
                if config.restarts or is_new:
                    config = config.attempt(place(config), again=False)
                out = config.out
            if config.nproc is not None:
                return on_new_ranks(program, config, body, config.nproc, out)
            tell(f"{program}: importing torch ...")
            return work(config, body, axes, config.threads)
    except ranks.Interrupted as stopped:
        status = 128 + stopped.signal
        is_rank_0 = rank_and_size is None or rank_and_size[0] == 0
        if stopped.signal == signal.SIGINT and sys.stderr.isatty() and is_rank_0:
            print(file=sys.stderr)  # after ^C, so that the prompt starts on a new line
        if out:
            name = signal.Signals(stopped.signal).name
            print(f"{program}: stopped by {name}, {way_on(out)}", file=sys.stderr)
    except Exception as error:
        rank, size = rank_and_size or (0, 1)
        failure = Failure.of(rank, error)
        if rank_and_size is None and not failure.refused:
            if out:
                print(f"{program}: {way_on(out)}", file=sys.stderr)
            raise
        waited = failure.distance and not failure.is_first
        if waited or (failure.refused and rank > 0):
            time.sleep(AFTER_TORCHRUN)  # a rank with a better report ends first; torchrun ends us
        status = report(program, [failure], size, debug)
    finally:
        if is_new:
            with suppress(OSError):  # a run that was refused has left its new folder empty
                os.rmdir(out)
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
    with mesh.comm.visible():
        status: int = resolve_name(body)(config, mesh)
    groups.disconnect()
    return status


def tell(line: str) -> None:
    """Print why nothing is shown yet, if anybody is watching: the import of torch takes seconds."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


# --- ranks that the launcher starts ---------------------------------------------------------------


def on_new_ranks(program: str, config: Launch, body: str, size: int, out: str = "") -> int:
    """Start the ranks until an attempt succeeds, or no restart is left. All have ended then.

    `out`: the output folder of a program that can be restarted; else "".
    """
    tell(f"{program}: starting {size} ranks, which import torch ...")
    status = None
    with meeting_place() as folder:
        for restart in range(1, config.restarts + 2):
            # Each attempt has its own store: in an old one are the addresses of dead ranks.
            rendezvous = f"{folder}/rendezvous-{restart}"
            status = run_ranks(program, config, body, size, rendezvous, restart, out)
            if status is not None:
                break
            config = config.attempt(config.out, again=True)
    assert status is not None, "the last attempt was not reported"
    return status


def run_ranks(
    program: str, config: Launch, body: str, size: int, rendezvous: str, restart: int, out: str
) -> int | None:
    """Run the body on new ranks, once. Returns the exit status; None if a restart is to follow."""
    began = time.time()
    preload = [*ranks.PRELOAD, body.split(":")[0]]
    started: list[ranks.Rank] = []
    try:
        for rank in range(size):
            arguments = size, rendezvous, config, body
            started.append(ranks.start(rank, new_rank, *arguments, preload=preload))
        soon = AFTER_CAUSE if config.restarts else math.inf
        statuses, failures, running = collect(started, after_cause=soon)
        failures = with_faults(failures, out, began) if out else failures
        if failures and restart <= config.restarts and can_restart(failures):
            print(restart_line(program, failures, size, restart, config), file=sys.stderr)
            if config.debug:
                report(program, failures, size, debug=True)
            if all(failure.distance for failure in failures):  # none failed by itself: one hangs
                show_stacks(running)
            return None
        if failures:
            status = report(program, failures, size, config.debug)
            if not causes(failures)[0].refused:
                show_stacks(running)
                if out:
                    print(f"{program}: {way_on(out)}", file=sys.stderr)
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


def on_this_rank(config: Launch, body: str, rank: int, size: int, place: Place | None) -> int:
    if config.nproc is not None:
        raise UserError(
            f"--nproc {config.nproc} starts ranks, but this is already rank {rank} of {size}; "
            "drop --nproc, or start it without torchrun"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) if place is not None else 0
    if not restarts:
        config.axes(size)  # raises on a mistake before the ranks meet
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
    if place is not None and restarts:
        config = agreed_attempt(config, place, rank, store, groups.store_of_all_attempts(store))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return work(config, body, config.axes(size), threads_per_rank(config, local))


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
