"""The folder a run writes into: one run at a time, and no file is ever removed that is not ours.

A run holds a lock on its folder, which the kernel drops when the process ends, however it ends: a
killed run blocks nobody. The file .pid inside only tells the next one whose lock it is.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_lab.config import Config
from dist_lab.errors import UserError

RUNS = Path("runs")
PID = ".pid"
OURS = ("metrics.jsonl", "summary.json", "events.out.tfevents.*", PID)  # what a run leaves: globs


@contextmanager
def claimed(config: Config) -> Iterator[Path]:
    """The folder `config.out`, or a fresh one in runs/, this process's own meanwhile. Rank 0 only.

    Raises:
        UserError: another run is at work in it, it is not empty and `config.overwrite` is not set,
            it is a file, or it cannot be written to.
    """
    with ExitStack() as held:
        try:
            folder = Path(config.out).expanduser() if config.out else fresh(RUNS, config)
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            held.callback(os.close, lock)
            take(lock, folder)
            make_room(folder, overwrite=config.overwrite)
            (folder / PID).write_text(f"{os.getpid()}\n", encoding="ascii")
        except OSError as error:
            why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
            raise UserError(
                f"cannot write to folder {str(config.out or RUNS)!r}: {why} (--out); give another"
            ) from None
        held.callback((folder / PID).unlink, missing_ok=True)
        yield folder


def fresh(runs: Path, config: Config) -> Path:
    """A new folder with the next number: runs/003-dp-gpt-tiny."""
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(at[0]) for path in runs.iterdir() if (at := re.match(r"\d+", path.name))]
        name = f"{config.strategy}-{config.model}-{config.size}"
        folder = runs / f"{max(numbers, default=0) + 1:03}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:  # a run that was started at the same time has it
            continue
        return folder


def take(lock: int, folder: Path) -> None:
    """Lock the open folder for as long as its descriptor is open, or say who has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = folder / PID
        holder = f"process {pid.read_text().strip()}" if pid.exists() else "another run"
        raise UserError(
            f"folder {str(folder)!r} is in use by {holder} (--out); wait for it, or give another"
        ) from None
    except OSError:
        return  # some network file systems cannot lock a folder; then nothing guards it


def make_room(folder: Path, *, overwrite: bool) -> None:
    """Remove what an earlier run of ours has left, or refuse to write beside anything at all."""
    there = sorted(path.name for path in folder.iterdir() if path.name != PID)
    if there and not overwrite:
        raise UserError(
            f"folder {str(folder)!r} is not empty: {len(there)} entries, first {there[0]!r} "
            "(--out); give another, or add --overwrite to replace the logs in it"
        )
    for pattern in OURS:
        for path in folder.glob(pattern):
            path.unlink()
