"""The folder in which the ranks of one machine meet: it has the file of their store.

It is removed when the launcher ends. A launcher that is killed (SIGKILL) leaves it behind, so the
next launcher removes it. A launcher holds a lock on its folder, which the kernel releases when the
process ends for any reason: a folder without a lock is nobody's.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "dist_lab-ranks-"
YOUNG = 60.0  # seconds: the lock of a new folder may be still to come


@contextmanager
def meeting_place() -> Iterator[str]:
    """Make and lock a new folder, and remove those that killed launchers have left."""
    sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(lock)


def sweep(parent: Path) -> None:
    """Remove the folders in `parent` whose launchers are dead."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is another user's, or another launcher removes it
            if time.time() - path.stat().st_mtime < YOUNG:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)
