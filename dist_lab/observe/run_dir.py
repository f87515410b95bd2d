"""The folder that a run writes to: one run at a time, and only files of a run are ever removed.

A run holds a lock on its folder. The kernel releases it when the process ends for any reason, so a
killed run blocks no other and leaves no lock file. The kernel also knows which process holds it.
A run that resumes in the folder keeps its files.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lab.errors import UserError
from dist_lab.programs.cli.resume import is_auto

if TYPE_CHECKING:  # a program that only looks at a run needs no settings
    from dist_lab.programs.cli.config import RunSettings

RUNS = Path("runs")
FILES_OF_A_RUN = (  # globs
    "metrics.jsonl", "samples-rank*.jsonl", "summary.json", "events.out.tfevents.*",
    "faults.jsonl", "timeline.json", "memory.json", "profile/*.json",
    "pipeline.json", "pipeline.svg", "report.html", "memory_predicted.json", "explain.json",
    "compare.json", "compare.csv", "compare.png", "tensorboard/**/events.out.tfevents.*",
)  # fmt: skip
CHECKPOINTS = "checkpoints"
# Also those that were being written or deleted, or were found damaged: see checkpoint/folder.py.
CHECKPOINT = re.compile(r"step-\d{8,}(\.(tmp|del|damaged)-[0-9a-f]{8})?")


@contextmanager
def claimed(config: "RunSettings", what: str = "run") -> Iterator[Path]:
    """Locks and yields the folder `config.out`, or a new one in runs/. Rank 0 only.

    `what` starts the name of a new folder: see `new_folder`.

    Raises:
        UserError: another run uses the folder, it is not empty and neither `config.overwrite` nor
            `config.resume` allows that, it is a file, or it cannot be written to.
    """
    with ExitStack() as stack:
        with as_user_error(config.out or RUNS):
            folder = Path(config.out).expanduser() if config.out else new_folder(config, what)
            reserve(folder, stack, config)
            if not resumes_in(folder, config):
                remove_run(folder)
        yield folder


def placed(config: "RunSettings", what: str = "run") -> str:
    """Returns the folder of all attempts of a run: `config.out`, or a new one in runs/.

    What an earlier run has left there is removed before the first attempt. An attempt that ends
    before it has claimed the folder is followed by one that resumes in it.
    """
    with claimed(config, what) as folder:
        return str(folder)


def remove_run(folder: Path) -> None:
    """Remove the logs and checkpoints of a run, and nothing else."""
    for pattern in FILES_OF_A_RUN:
        for path in folder.glob(pattern):
            path.unlink()
    inner = folder / CHECKPOINTS
    for path in inner.iterdir() if inner.is_dir() else ():
        if CHECKPOINT.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def resumes_in(folder: Path, config: "RunSettings") -> bool:
    """Whether the run goes on in the folder of the checkpoint from which it resumes."""
    source = config.resume
    if is_auto(source):
        return True
    return bool(source) and Path(source).expanduser().resolve().is_relative_to(folder.resolve())


def make_folder(out: str, file: str) -> Path:
    """Makes the folder `out` and checks that `file` can be written there. Rank 0 only.

    Files in it are kept.

    Raises:
        UserError: the folder cannot be made, or cannot be written to.
    """
    with as_user_error(out):
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def look(config: "RunSettings") -> None:
    """Raise what `claimed` would raise for an existing folder, without changing anything in it.

    The parent of the ranks calls it to report a mistake before they are started.
    """
    with as_user_error(config.out), ExitStack() as stack:
        folder = Path(config.out).expanduser()
        if config.out and folder.exists():
            reserve(folder, stack, config)


def new_folder(config: "RunSettings", what: str) -> Path:
    """Make a folder with the next free number: runs/003-dp-gpt-tiny if `what` is dp."""
    RUNS.mkdir(exist_ok=True)
    name = f"{what}-{config.model}-{config.size}"
    while True:
        numbers = [
            int(match[0]) for path in RUNS.iterdir() if (match := re.match(r"\d+", path.name))
        ]
        folder = RUNS / f"{max(numbers, default=0) + 1:03}-{name}"
        with suppress(FileExistsError):  # a run that started at the same time took this number
            folder.mkdir()
            return folder


def reserve(folder: Path, stack: ExitStack, config: "RunSettings") -> None:
    """Make the folder and lock it until `stack` exits. Refuse one that is in use or not empty."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"folder {str(folder)!r} is in use by {holder(lock)} (--out); wait for it, or "
            "give another"
        ) from None
    except OSError:
        pass  # some network file systems cannot lock a folder; then runs are not kept apart
    names = sorted(path.name for path in folder.iterdir())
    if resumes_in(folder, config):
        if names and not any(any(folder.glob(p)) for p in (*FILES_OF_A_RUN, CHECKPOINTS)):
            raise UserError(
                f"folder {str(folder)!r} has no run to resume: {len(names)} entries, first "
                f"{names[0]!r} (--out, --resume); give the folder of a run, or an empty one"
            )
    elif names and not config.overwrite:
        has_checkpoints = (folder / CHECKPOINTS).exists()
        raise UserError(
            f"folder {str(folder)!r} is not empty: {len(names)} entries, first {names[0]!r} "
            "(--out); give another, or add --overwrite to replace the logs"
            + (" and checkpoints in it, or --resume auto to go on" if has_checkpoints else " in it")
        )


def holder(lock: int) -> str:
    """Returns which process holds the lock of an open folder, in words; only Linux knows."""
    process = process_with(os.fstat(lock))
    return "another run" if process is None else f"process {process}"


def process_with(folder: os.stat_result) -> int | None:
    """Returns the process that holds the lock of a folder.

    A line of /proc/locks: 1: FLOCK  ADVISORY  WRITE 4711 08:01:260072 0 EOF

    Its device is not always that of `stat`, and a folder of another disk may have the same inode
    number. So the process must also have this folder open.
    """
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            is_lock = words[1] == "FLOCK" and words[5].endswith(f":{folder.st_ino}")
            if is_lock and has_open(words[4], folder):
                return int(words[4])
    return None


def has_open(process: str, folder: os.stat_result) -> bool:
    """Whether a process has a folder open; True also if it is another user's and may not be asked.

    `folder`: as from `os.stat`.
    """
    try:
        files = list(Path(f"/proc/{process}/fd").iterdir())
    except PermissionError:
        return True
    except OSError:  # it has ended
        return False
    for file in files:
        with suppress(OSError):  # it was closed in the meantime
            if os.path.samestat(file.stat(), folder):
                return True
    return False


@contextmanager
def as_user_error(out: str | Path) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError of one line."""
    try:
        yield
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"cannot write to folder {str(out)!r}: {why} (--out); give another"
        ) from None
