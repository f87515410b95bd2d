"""The folder of a run's checkpoints: their names, the newest one, and which to delete.

    checkpoints/step-00000100                whole
    checkpoints/step-00000120.tmp-3f9a51c2   being written, or left by a run that was killed
    checkpoints/step-00000080.del-90b1d7e4   being deleted

A name says everything. No file points to the latest checkpoint: it would have to be changed after
each save, and a run may be killed in between. The latest is the one with the highest step that is
whole.
"""

import re
import secrets
from pathlib import Path

from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.files import Files
from dist_lab.errors import MachineError, UserError

WHOLE = re.compile(r"step-(\d{8,})")
LEFT_OVER = re.compile(r"step-(\d{8,})\.(tmp|del)-[0-9a-f]{8}")


def name_of(step: int) -> str:
    """
    >>> name_of(120)
    'step-00000120'
    """
    return f"step-{step:08}"


def beside(path: Path, kind: str) -> Path:
    """A new name for a folder that is not to be read: `kind` is tmp, del or damaged."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by their names, the newest first. They may be damaged."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[1]), path) for path in paths if (match := WHOLE.fullmatch(path.name))]
    return sorted(found, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a path names one checkpoint, and not a folder of several."""
    return WHOLE.fullmatch(path.name) is not None or (path / manifest.NAME).is_file()


def check_free(path: Path) -> None:
    """Raise UserError if there is something under the name of a new checkpoint, or no folder."""
    if path.parent.is_file():
        raise UserError(
            f"{str(path.parent)!r} is a file, and a checkpoint is a folder; give a folder"
        )
    if path.exists():
        raise UserError(
            f"checkpoint {str(path)!r} is there already, and is never overwritten; give another "
            "folder, or move it away"
        )


def set_aside_damaged(folder: Path, first: int, files: Files) -> list[Path]:
    """Rename the damaged checkpoints of step `first` and later. Returns the others.

    A run that went on after an earlier one needs their names, and may not count them as whole.

    Raises:
        UserError: one was saved by a newer version of this library.
        MachineError: one cannot be read now.
    """
    whole = []
    for path in (path for step, path in steps(folder) if step >= first):
        try:
            manifest.verify(path)
            whole.append(path)
        except manifest.Damaged:
            files.rename(path, beside(path, "damaged"))
    return whole


def prune(newest: Path, keep: int, files: Files) -> None:
    """Delete the whole checkpoints before `newest`, which was just saved; with it `keep` are left.

    Damaged ones are left alone, and so are those of later steps, which another run has saved. A
    checkpoint gets another name first. So one that is half deleted is never read.
    """
    folder, whole = newest.parent, []
    paths = [path for _, path in steps(folder)]
    for path in paths[paths.index(newest) + 1 :]:
        try:
            manifest.read(path)
        except (UserError, MachineError):
            continue
        whole.append(path)
    for path in whole[keep - 1 :]:
        leaving = beside(path, "del")
        files.rename(path, leaving)
        files.sync_folder(folder)
        files.remove_folder(leaving)


def sweep(folder: Path, files: Files) -> list[int]:
    """Delete what a killed run has left. Only for the run that owns the folder.

    Returns:
        The steps of the saves that were not whole.
    """
    lost = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := LEFT_OVER.fullmatch(path.name):
            files.remove_folder(path)
            lost += [int(match[1])] if match[2] == "tmp" else []
    return sorted(lost)
