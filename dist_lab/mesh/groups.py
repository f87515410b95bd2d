"""Where processes meet, and how they join and leave the process group.

Ranks find each other in a store: a file, for those that are started here, or torchrun's. This file
knows the environment that torchrun leaves, and the network interface.

[Note: who holds a group] A gloo group that is still held when the interpreter ends has its threads
running, and the process aborts after having done all it should. torch.distributed holds all groups
until destroy_process_group. We hold them weakly, so that they go with that, whatever else lives on.
But the functions of torch.distributed.nn.functional hold the world's group, as the default of an
argument, if they are first imported once there is one; any optimizer imports them. Hence the import
here, without which no group is made.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: see [Note: who holds a group]
from torch.distributed import (  # type: ignore[attr-defined]
    FileStore,
    PrefixStore,
    Store,
    rendezvous,
)

from dist_lab.errors import MachineError


def connect(store: Store, rank: int, size: int, *, timeout: float, backend: str = "gloo") -> None:
    """Join the process group that meets in `store`.

    Raises:
        MachineError: no GPU for nccl, or a transport that cannot be set up.
    """
    if backend == "nccl":
        if not torch.cuda.is_available():
            raise MachineError('backend nccl needs a GPU and torch sees none; use backend="gloo"')
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    elif isinstance(store, FileStore):
        # We have started this process to be a rank. Libraries in it make groups, too.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    with _over_loopback():
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )


def new_group(ranks: Sequence[int], timeout: float, *, alone: bool = False) -> dist.ProcessGroup:
    """A group of these ranks. Collective over all of the world, unless it is of this rank alone."""
    limit = timedelta(seconds=timeout)
    with _over_loopback():
        return dist.new_group(list(ranks), timeout=limit, use_local_synchronization=alone)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def file_store(path: str, size: int) -> Store:
    """A meeting place in a file: no port, so none to clash and nothing that listens."""
    return FileStore(path, size)


def environment_store(rank: int, size: int, timeout: float) -> Store:
    """torchrun's store, under a prefix of its own for each restart.

    After a rank dies, torchrun starts all again on the same store, where the addresses of the dead
    still stand; without the prefix the new ranks try to reach them.
    """
    limit = timedelta(seconds=timeout)
    store, _, _ = next(rendezvous("env://", rank=rank, world_size=size, timeout=limit))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt-{attempt}", store)


def as_under_torchrun(rank: int, size: int) -> AbstractContextManager[None]:
    """Set the environment that torchrun gives its processes, for libraries that read it.

    Ranks may have been started in other ways, which leave nothing there.
    """
    return _where_unset({
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",  # not used: the processes have met
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    })  # fmt: skip


def default_backend() -> str:
    """nccl where every process of this machine can have a GPU of its own, else gloo."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "nccl" if dist.is_nccl_available() and torch.cuda.device_count() >= local else "gloo"


def loopback() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _over_loopback() -> AbstractContextManager[None]:
    """Groups made inside the block talk over loopback, if torchrun has all ranks on one machine.

    gloo would resolve the host's name instead, which binds a public address on one machine and an
    unreachable one on the next. It reads the environment whenever a group is made.
    """
    ranks = os.environ.get("WORLD_SIZE")
    one_machine = ranks is not None and os.environ.get("LOCAL_WORLD_SIZE") == ranks
    return _where_unset({"GLOO_SOCKET_IFNAME": loopback()} if one_machine else {})


@contextmanager
def _where_unset(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables inside the block. One that is set already stays as it is."""
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]
