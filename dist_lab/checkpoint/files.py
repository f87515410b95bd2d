"""The file operations of a checkpoint. All of them go through one object.

A save is a sequence of operations, and the machine may stop between any two. With all of them in
one place a test can stop at operation k, for every k, and look at what is left. Data is on disk
only after `sync`; a new name is there only after `sync_folder` of the folder that has it.

[Note: past the kernel's memory] Usually a write copies data into the kernel's memory, and `sync`
sends it from there to the disk. Large data is handed to the disk directly (O_DIRECT), which saves
the copy, half of a core's time in a save. The file system demands that such data begins at a page
and has whole blocks, so the last piece of a file goes the usual way; so does all of it where the
file system cannot do this.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dist_lab.checkpoint.pace import Pace
from dist_lab.errors import MachineError

PART = 8 * 2**20  # bytes of one write: a progress line, a fault and a rest can come in between


class Files:
    """The operations, one method for each."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def create(self, path: Path) -> BinaryIO:
        """Open a new file, unbuffered. It must not exist."""
        return open(path, "xb", buffering=0)

    def write(self, file: BinaryIO, data: memoryview) -> int:
        """Write some of the data, and return how many bytes: [Note: past the kernel's memory]."""
        directly = len(data) == PART and _set_direct(file, True)
        try:
            return file.write(data)
        except OSError as error:
            if not (directly and error.errno == errno.EINVAL):  # the data is not aligned
                raise
        finally:
            if directly:
                _set_direct(file, False)
        return file.write(data)

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder a new name, which must be free."""
        os.rename(old, new)  # a folder replaces an empty one only

    def sync_folder(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove_folder(self, path: Path) -> None:
        shutil.rmtree(path)


def _set_direct(file: BinaryIO, on: bool) -> bool:
    """Switch O_DIRECT on or off. Returns False if the file system has none."""
    if sys.platform != "linux":
        return False
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True


def write_file(
    files: Files,
    path: Path,
    data: memoryview,
    pace: Pace,
    wrote: Callable[[int], None] = lambda size: None,
) -> dict[str, object]:
    """Write a new file and bring it to disk. Returns its `bytes` and `sha256`.

    Another thread computes the hash meanwhile: here most of the time is spent waiting for the disk.

    Args:
        pace: of the work, which rests after each piece.
        wrote: called with the number of bytes after each write.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hashing:
        file = files.create(path)
        try:
            rest = data
            while len(rest):
                written = files.write(file, rest[:PART])
                hashed = hashing.submit(digest.update, rest[:written])
                rest = rest[written:]
                wrote(written)
                if not pace.is_waited_for:
                    hashed.result()  # the rest is for all of the work
                    pace.rest()
            files.sync(file)
        finally:
            file.close()
    return {"bytes": len(data), "sha256": digest.hexdigest()}


def sha256_of(path: Path, pace: Pace | None = None) -> str:
    """The SHA-256 of a file's bytes.

    Args:
        pace: of the work, which rests after each piece; None: it does not rest.
    """
    digest, memory = hashlib.sha256(), memoryview(bytearray(PART))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(memory):
            digest.update(memory[:size])
            if pace is not None:
                pace.rest()
    return digest.hexdigest()


@contextmanager
def as_machine_error(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError inside the block into a MachineError of one line.

    Args:
        needed: the bytes that the block writes, for the message.
    """
    free = 0
    try:
        free = shutil.disk_usage(_existing(folder)).free  # before the block takes some of it
        yield
    except OSError as error:
        where = error.filename or folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MachineError(
                f"no space left for a checkpoint in {str(folder)!r}: this rank's part has "
                f"{needed:,} bytes, {free:,} were free before; make room, or give another folder. "
                "What was saved before is whole"
            ) from error
        raise MachineError(
            f"cannot write a checkpoint to {str(where)!r}: {error.strerror}; what was saved before "
            "is whole"
        ) from error


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
