"""Which checkpoint a path on the command line means, and the settings of its run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint.manifest import Damaged, of_others
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.data.custom import is_custom
from dist_lab.errors import UserError, shown
from dist_lab.observe.run_dir import CHECKPOINTS
from dist_lab.programs.cli.saved_settings import checked_settings
from dist_lab.programs.cli.settings import as_typed


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
            f"there is no checkpoint in {path!r}: no folder step-... and no manifest.json"
            f"{of_others(inner) or '; give another folder'}"
        )
    return found


def settings_of(source: Checkpoint) -> dict[str, Any]:
    """The settings of the run that has saved a checkpoint, each within the limits of its flag.

    Raises:
        UserError: a script has saved it, or it was imported: its model cannot be built here.
    """
    saved = source.manifest["settings"]
    if saved is None:
        raise UserError(
            f"checkpoint {str(source.folder)!r} was saved by a script, or imported: its model "
            "cannot be built here; job.load reads it in any layout"
        )
    known = checked_settings(saved, source.folder)
    if not known.get("model"):
        raise Damaged(
            f"the settings of {str(source.folder)!r} name no model; give another checkpoint"
        )
    return known


def check_data(source: str, data: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError if the data is code that the checkpoint names, and the user does not."""
    spec = settings.get("data", "")
    if data not in ("", spec):
        raise UserError(
            f"the run's data is {shown(spec)}, not {shown(data)} (--data); leave it out"
        )
    if is_custom(spec) and not data:
        raise UserError(
            f"{source!r} was trained on data {spec!r}, whose code would run here; if you "
            f"trust it, give {as_typed('data', spec)}"
        )
