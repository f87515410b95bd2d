"""The folder a run writes into: one run at a time, and no file is ever removed that is not ours.

A run holds a lock on its folder, which the kernel drops when the process ends, however it ends: a
killed run blocks nobody and leaves no file that says who it was. The kernel knows whose lock it is.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dist_lab.errors import UserError
from dist_lab.programs.cli.config import RunSettings

RUNS = Path("runs")
OURS = (  # what a run leaves: globs
    "metrics.jsonl", "summary.json", "events.out.tfevents.*",
    "compare.json", "compare.csv", "compare.png",
)  # fmt: skip


@contextmanager
def claimed(config: RunSettings, what: str = "") -> Iterator[Path]:
    """The folder `config.out`, or a fresh one in runs/, this process's own meanwhile. Rank 0 only.

    `what` stands for the strategy in the name of a fresh one.

    Raises:
        UserError: another run is at work in it, it is not empty and `config.overwrite` is not set,
            it is a file, or it cannot be written to.
    """
    with ExitStack() as held:
        with as_user_error(config.out or RUNS):
            folder = Path(config.out).expanduser() if config.out else fresh(config, what)
            reserve(folder, held, overwrite=config.overwrite)
            for pattern in OURS:
                for path in folder.glob(pattern):
                    path.unlink()
        yield folder


def make_folder(out: str, file: str) -> Path:
    """The folder `out`, in which `file` can be written; what it holds is left there. Rank 0 only.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    with as_user_error(out):
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def look(config: RunSettings) -> None:
    """Raise what `claimed` would raise of a folder that is there, and change nothing in it.

    For the parent of ranks, so that a mistake is answered before they are started.
    """
    with as_user_error(config.out), ExitStack() as held:
        folder = Path(config.out).expanduser()
        if config.out and folder.exists():
            reserve(folder, held, overwrite=config.overwrite)


def fresh(config: RunSettings, what: str) -> Path:
    """Make a folder with the next number: runs/003-dp-gpt-tiny."""
    RUNS.mkdir(exist_ok=True)
    name = f"{what or config.strategy}-{config.model}-{config.size}"
    while True:
        numbers = [int(at[0]) for path in RUNS.iterdir() if (at := re.match(r"\d+", path.name))]
        folder = RUNS / f"{max(numbers, default=0) + 1:03}-{name}"
        with suppress(FileExistsError):  # a run that was started at the same time has it
            folder.mkdir()
            return folder


def reserve(folder: Path, held: ExitStack, *, overwrite: bool) -> None:
    """Make and lock the folder until `held` ends; refuse one that holds anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    held.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"folder {str(folder)!r} is in use by {holder(lock)} (--out); wait for it, or "
            "give another"
        ) from None
    except OSError:
        pass  # some network file systems cannot lock a folder; then nothing guards it
    there = sorted(path.name for path in folder.iterdir())
    if there and not overwrite:
        raise UserError(
            f"folder {str(folder)!r} is not empty: {len(there)} entries, first {there[0]!r} "
            "(--out); give another, or add --overwrite to replace the logs in it"
        )


def holder(lock: int) -> str:
    """Who holds the lock of an open folder, where the system tells: Linux does.

    A line of /proc/locks: 1: FLOCK  ADVISORY  WRITE 4711 08:01:260072 0 EOF
    """
    number = os.fstat(lock).st_ino
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{number}"):
                return f"process {words[4]}"
    return "another run"


@contextmanager
def as_user_error(out: str | Path) -> Iterator[None]:
    """What the system refuses inside the block, in one line."""
    try:
        yield
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"cannot write to folder {str(out)!r}: {why} (--out); give another"
        ) from None
