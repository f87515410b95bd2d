"""Folders that an export makes and an import reads: nothing is overwritten, and no name in a file
leads out of its folder.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_lab.errors import MachineError, UserError, shown

LARGEST_JSON = 2**26  # bytes; an index of a model of a million tensors has about as many


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which gets that name if the block succeeds.

    An interrupted export so leaves nothing under its final name.

    Raises:
        UserError: there is something at `path` that is not an empty folder.
        MachineError: a file or folder cannot be written.
    """
    check_new(path)
    final = Path(path).expanduser()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        folder.mkdir()
        try:
            yield folder
            for file in folder.iterdir():  # safetensors makes files that only their owner can read
                file.chmod(folder.stat().st_mode & 0o666)
            os.replace(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(path)
        raise MachineError(
            f"cannot write {where!r}: {error.strerror or error}; make room or give another folder"
        ) from None


def check_new(path: str | Path) -> None:
    """Raise UserError if there is something at `path` that is not an empty folder."""
    final = Path(path).expanduser()
    if final.is_symlink() or (final.exists() and (not final.is_dir() or any(final.iterdir()))):
        raise UserError(f"{str(path)!r} exists, and is not an empty folder; give a new one")


def inside(folder: Path, name: Any, by: str) -> Path:
    """The path of the file that `by` names in its folder.

    Hugging Face's cache consists of links from snapshots/ to blobs/, so there a link may lead to
    another place of the same model.

    Raises:
        UserError: the name is a path, or a link leads out of the folder.
        MachineError: there is no such file.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise UserError(
            f"{by} names {shown(name)}, and a file must be in the folder itself; do not trust this "
            "folder"
        )
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise UserError(
            f"{name} is a link to {str(path.resolve())!r}, out of its folder; do not trust "
            "this folder, or put the file itself there"
        )
    if not path.is_file():
        raise MachineError(f"no file {str(path)!r}, which {by} names; get the whole folder")
    return path


def read_text(path: Path) -> str:
    """Reads a text file. Raises MachineError if it is none, or too large."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise MachineError(
                f"{str(path)!r} has {size} bytes, more than the {LARGEST_JSON} of any file of "
                "its kind; it is not one"
            )
        return path.read_bytes().decode()
    except OSError as error:
        raise MachineError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise MachineError(f"{str(path)!r} is not JSON: {one_line(error)}; get it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file with one JSON object. Raises MachineError if it is none, or too large."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MachineError(f"{str(path)!r} is not JSON: {one_line(error)}; get it again") from None
    if not isinstance(value, dict):
        raise MachineError(f"{str(path)!r} has no JSON object; get it again")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def is_folder(path: str | Path, what: str) -> Path:
    """The folder at `path`. Raises UserError if there is none; `what` says which one is meant."""
    folder = Path(path).expanduser()
    with suppress(OSError):
        if folder.is_dir():
            return folder
    found = "is a file" if folder.is_file() else "does not exist"
    raise UserError(f"{str(path)!r} {found}; give {what}")


def one_line(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
