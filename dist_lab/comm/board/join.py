"""How ranks find the board: one small all_gather when a mesh is made."""

import os
import secrets
import sys
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from struct import Struct

import torch
import torch.distributed as dist

from dist_lab.comm.board.board import Board, new_file
from dist_lab.comm.board.page import MAGIC
from dist_lab.errors import UserError

ROW = Struct("<16s16sqqq8x")  # machine, token, process, file, check


def join(
    rank: int, size: int, device: torch.device, *, check: bool, place: str, mesh: str
) -> Board | None:
    """Returns the board of this machine's ranks. None where there is no /proc. Collective.

    Raises UserError if `check` is not the same on all ranks: they would then wait for each other.
    """
    if sys.platform != "linux" or (size > 1 and dist.get_backend() == "fake"):
        return None
    file, token = new_file(size), secrets.token_bytes(16)
    os.pwrite(file, MAGIC + token, 0)  # so that another rank knows that it has found this file
    rows = [(machine(), token, os.getpid(), file, int(check))]
    if size > 1:
        rows = [ROW.unpack(row) for row in _gather(ROW.pack(*rows[0]), size, device)]
    if len({row[-1] for row in rows}) > 1:
        on = ", ".join(str(r) for r, row in enumerate(rows) if row[-1])
        raise UserError(
            f"only on ranks {on} of {size} collectives are checked (check=True); start every rank "
            "with the same settings"
        )
    ranks = [r for r, row in enumerate(rows) if row[0] == rows[rank][0]]
    board = _open(rows[ranks[0]], file, ranks, rank)
    if board is not None:
        board.claim(size, place, mesh)
    if check and size > 1 and b"\0" in _gather(bytes([board is not None]), size, device):
        return None  # so that all ranks check their calls in the same way
    return board


def _open(row: tuple[bytes, bytes, int, int, int], own_file: int, ranks: list[int], rank: int
          ) -> Board | None:  # fmt: skip
    """Opens the file of this machine's first rank. None if it cannot be opened."""
    _, token, process, number, _ = row
    if rank == ranks[0]:
        return Board(own_file, token, ranks, rank)
    os.close(own_file)
    with suppress(OSError):  # another user's process, or one that has left already
        file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        with suppress(OSError):  # another file: its number was used again
            if os.pread(file, len(MAGIC + token), 0) == MAGIC + token:
                return Board(file, token, ranks, rank)
        os.close(file)
    return None


def machine() -> bytes:
    """The same for processes that see each other in /proc, and different for all others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    ours = f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    return blake2b(ours.encode(), digest_size=16).digest()


def _gather(own: bytes, size: int, device: torch.device) -> list[bytes]:
    row = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    rows = row.new_empty(size, len(own))
    dist.all_gather_single(rows.view(-1), row)
    return [bytes(r) for r in rows.tolist()]
