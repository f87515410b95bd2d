"""Which checkpoint a path on the command line means."""

from pathlib import Path

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import UserError
from dist_lab.observe.run_dir import CHECKPOINTS


def newest(path: str) -> Checkpoint:
    """Open the checkpoint at `path`, or the newest one of a folder of checkpoints or of a run.

    Raises:
        UserError: there is none.
        MachineError: it is damaged.
    """
    return Checkpoint.open(all_in(path)[0])


def check_target(path: str) -> None:
    """Raise UserError if a checkpoint that is written to `path` would not be found there."""
    inner = Path(path).expanduser() / CHECKPOINTS
    if inner.is_dir():
        raise UserError(
            f"{path!r} is the folder of a run, whose checkpoints are in {str(inner)!r}; give that "
            "one, or a new folder"
        )


def all_in(path: str) -> list[Path]:
    """The checkpoint at `path`, or all of a folder of checkpoints or of a run, the newest first.

    Raises:
        UserError: there is none.
    """
    folder = Path(path).expanduser()
    if folders.is_checkpoint(folder) or not folder.is_dir():
        return [folder]  # opening it says what is wrong with it
    inner = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    found = [place for _, place in folders.steps(inner)]
    if not found:
        if any(inner.glob("rank-*.safetensors")):
            return [inner]
        raise UserError(
            f"there is no checkpoint in {path!r}: no folder step-... and no manifest.json; give "
            "another folder"
        )
    return found
