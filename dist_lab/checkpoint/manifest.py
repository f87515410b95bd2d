"""The manifest of a checkpoint: which files it has, and what is in them.

    manifest.json            format, step, mesh, files with their bytes and SHA-256, optimizer, ...
    rank-0.json              the tensors in rank-0.safetensors, the boxes that they are, ...
    rank-0.safetensors
    tokenizer.json           what the tokens of a text stand for, unless they are bytes

The manifest has the hash of every other file, and of itself. So a checkpoint is one chain: whoever
has changed a byte of it, also of the manifest, is found out before a tensor is used. All values are
checked against this file's description, and sizes against a limit before memory is taken for them.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_lab.checkpoint import table
from dist_lab.checkpoint.files import sha256_of
from dist_lab.checkpoint.pace import Pace
from dist_lab.errors import MachineError, UserError

FORMAT = 1
NAME = "manifest.json"
ANOTHER = "give an earlier checkpoint"
IMPORT = "python launch/checkpoint.py import SOURCE FOLDER"
LARGEST_JSON = 256 * 2**20  # bytes
TOKENIZER = "tokenizer.json"
FILE = re.compile(r"rank-\d{1,6}\.(json|safetensors)|tokenizer\.json")
KEYS: Mapping[str, type | tuple[type, ...]] = {
    "format": int, "step": int, "mesh": dict, "strategies": str, "files": dict,
    "optimizer": (dict, type(None)), "settings": (dict, type(None)), "extra": (dict, type(None)),
    "tied": (dict, type(None)), "versions": dict, "sha256": str,
}  # fmt: skip


class Damaged(MachineError):
    """A checkpoint is not what was saved: a file is missing, cut off or changed."""


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as the bytes of its file, with its own hash."""
    plain = json.loads(_text(manifest))  # keys that are numbers become texts, as a reader sees them
    return _text({**plain, "sha256": _hash(plain)})


def read(folder: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest.

    Raises:
        UserError: it is no checkpoint, or one of a newer version of this library.
        Damaged: it is not what was saved.
        MachineError: it cannot be read now.
    """
    path = folder / NAME
    with readable(path):
        if not path.is_file():
            raise _no_manifest(folder)
    manifest = read_json(path)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise UserError(f"{str(path)!r} is no manifest of a checkpoint; give another folder")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"checkpoint {str(folder)!r} has format {manifest['format']}, and this version of "
            f"dist_lab reads up to {FORMAT}; load it with a newer version"
        )
    wrong = [k for k, kind in KEYS.items() if not isinstance(manifest.get(k), kind)]
    wrong += ["format"] * (manifest["format"] < FORMAT)
    unknown = sorted(manifest.keys() - KEYS.keys())
    if wrong or unknown:
        what = f"has no right {wrong[0]!r}" if wrong else f"has an unknown {unknown[0]!r}"
        raise Damaged(f"manifest {str(path)!r} {what}: it is not what was saved; {ANOTHER}")
    without = {key: value for key, value in manifest.items() if key != "sha256"}
    try:
        actual = _hash(without)
    except (ValueError, RecursionError) as error:  # 1e999, or lists that nest too deep
        raise Damaged(f"manifest {str(path)!r} is no JSON of ours; {ANOTHER}") from error
    if actual != manifest["sha256"]:
        raise Damaged(
            f"manifest {str(path)!r} was changed: its SHA-256 is {actual[:16]}..., and was "
            f"{manifest['sha256'][:16]}... when it was saved; {ANOTHER}"
        )
    with readable(folder):
        _check_files(folder, manifest["files"])
    try:
        versions, mesh = manifest["versions"], manifest["mesh"]
        names = [*versions, *versions.values(), *mesh, manifest["strategies"]]
        table.each(table.text, names)
        table.each(table.length, [manifest["step"], *mesh.values()])
        table.optimizer(manifest.get("optimizer"))
        table.mapping(manifest.get("tied") or {}, table.text)
        if not 0 < math.prod(mesh.values()) <= len(manifest["files"]):
            raise table.Odd(f"{len(manifest['files'])} files for a mesh of {mesh}")
    except table.Odd as error:
        raise Damaged(f"manifest {str(path)!r} has {error}; {ANOTHER}") from error
    return dict.fromkeys(KEYS) | manifest


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint. Raises Damaged, or MachineError: see `readable`."""
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{str(path)!r} is no JSON: it is cut off or changed; {ANOTHER}") from error


def read_text(path: Path) -> str:
    """Read a text file of a checkpoint. Raises Damaged, or MachineError: see `readable`."""
    with readable(path):
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise Damaged(
                f"{str(path)!r} has {size:,} bytes, more than {LARGEST_JSON:,}; {ANOTHER}"
            )
        data = path.read_bytes()
    try:
        return data.decode()
    except ValueError as error:
        raise Damaged(f"{str(path)!r} is no JSON: it is cut off or changed; {ANOTHER}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def verify(folder: Path, pace: Pace | None = None) -> None:
    """Read every file of a checkpoint, and compare its hash. Raises Damaged."""
    about = read(folder)
    for name in about["files"]:
        check_hash(folder, name, about["files"][name]["sha256"], pace)


def check_hash(folder: Path, name: str, expected: str, pace: Pace | None = None) -> None:
    """Raise Damaged if a file of a checkpoint is not what was saved."""
    with readable(folder / name):
        actual = sha256_of(folder / name, pace)
    if actual != expected:
        raise Damaged(
            f"{str(folder / name)!r} was changed: its SHA-256 is {actual[:16]}..., and was "
            f"{expected[:16]}... when it was saved; {ANOTHER}"
        )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into an error of one line.

    Raises:
        Damaged: the file is not there.
        MachineError: anything else, such as too many open files. The checkpoint may be whole.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"cannot read {str(path)!r}: {error.strerror}; {ANOTHER}") from error
    except OSError as error:
        raise MachineError(
            f"cannot read {str(path)!r}: {error.strerror}; try again, or {ANOTHER}"
        ) from error


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Every file has a name of ours, so that no path leaves the folder, and its saved size."""
    for name, about in files.items():
        try:
            table.file(about)
        except table.Odd as error:
            raise Damaged(f"manifest of {str(folder)!r} has {error}; {ANOTHER}") from error
        if not FILE.fullmatch(name):
            raise Damaged(f"manifest of {str(folder)!r} has a wrong name {name!r}; {ANOTHER}")
        path = folder / name
        if path.is_symlink():
            raise Damaged(
                f"{str(path)!r} is a link, and links are not followed: put the file itself there, "
                f"or {ANOTHER}"
            )
        if not path.is_file():
            raise Damaged(f"checkpoint {str(folder)!r} has no file {name}; {ANOTHER}")
        if (size := path.stat().st_size) != about["bytes"]:
            raise Damaged(
                f"{str(path)!r} has {size:,} bytes, and had {about['bytes']:,} when it was saved: "
                f"its SHA-256 is {sha256_of(path)[:16]}..., and was {about['sha256'][:16]}...; "
                f"{ANOTHER}"
            )


def _no_manifest(folder: Path) -> UserError | MachineError:
    if not folder.exists():
        return UserError(f"there is no checkpoint {str(folder)!r}: no such folder")
    if not folder.is_dir():
        return UserError(
            f"{str(folder)!r} is a file, and a checkpoint is a folder; give a folder, or make one "
            f"of a state_dict file: {IMPORT}"
        )
    if any(folder.glob("rank-*.safetensors")):
        return Damaged(f"checkpoint {str(folder)!r} is not whole: it has no {NAME}; {ANOTHER}")
    return UserError(f"{str(folder)!r} is no checkpoint: it has no {NAME}{of_others(folder)}")


def of_others(folder: Path) -> str:
    """The command to type if a folder has the files of another program; else ""."""
    names = {path.name for path in folder.iterdir()}
    by = "torch.distributed.checkpoint" if ".metadata" in names else ""
    by = "Hugging Face" if "config.json" in names else by
    return f", but files of {by}; make a checkpoint of them: {IMPORT}" if by else ""


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(manifest)).hexdigest()


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
