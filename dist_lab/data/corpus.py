"""Text as bytes: whatever text this machine has becomes one memory-mapped array, cut in two.

A byte-level model needs no tokenizer and no download: every Python brings some twelve megabytes of
text, the source of its standard library, and that is the default. A text file or a folder of them
serves as well. Nothing here imports torch: the launcher looks at the data before it starts a rank,
and a misspelled path should not take seconds to answer.

[Note: what is held out]
Validation must look like training and be no part of it. From ten files on, every tenth in sorted
order is held out whole: neighbors in that order are of one package, so each package gives its
tenth. Of fewer files, the last tenth of their bytes is held out.

[Note: one file, renamed into place]
A cached corpus is a header (JSON, padded to HEADER bytes), the training bytes, the validation
bytes. It is written under a hidden name and renamed when complete, so its name stands for all of it
or for nothing: two ranks that build at once both end up right, and a killed build is never opened.
The name carries a hash of the source's files (path, size, time of change), so a changed source is
another corpus. Opening one checks its length, not its bytes. All cached files may be deleted.
"""

import hashlib
import json
import os
import secrets
import stat
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_lab.errors import MachineError, UserError

Bytes = npt.NDArray[np.uint8]

ACCEPTED = {  # what --data takes
    "stdlib": "the source of Python's standard library",
    "FILE": "a text file",
    "FOLDER": "a folder of text files",
    "module:function": "your own function(batch=, seq=, seed=)",
}
DEFAULT_CACHE = Path("~/.cache/dist_lab")

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT = 10  # one in ten is for validation
SUFFIX = ".corpus"
HEADER = 256  # bytes
FORMAT = 1  # part of every cached file's name: raise it when the layout or the split changes
CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Corpus:
    """Two disjoint runs of bytes, mapped read-only from the cached file at `path`.

    `name` is what was asked for. `sha256` is of the training bytes followed by the validation
    bytes, whatever the machine and the path they came from.
    """

    name: str
    path: Path
    train: Bytes  # (bytes,)
    validation: Bytes  # (bytes,)
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from: files whose names, sizes and times are known, not their bytes."""

    spec: str  # as given to --data
    label: str  # how the cached file's name begins
    files: tuple[Path, ...]  # sorted
    key: str  # another one when a file is added, removed, resized or touched


def find(spec: str, cache_dir: Path = DEFAULT_CACHE) -> Corpus:
    """Open the corpus that `spec` names (see ACCEPTED), building its cached file if need be.

    Raises UserError when `spec` gives no text, MachineError when the cache cannot be written.
    """
    source = standard_library() if spec == "stdlib" else text_below(spec)
    path = Path(os.path.expanduser(cache_dir), f"{source.label}-{source.key}{SUFFIX}")
    corpus = load(spec, path)
    if corpus is None:
        build(source, path)
        corpus = load(spec, path)
    assert corpus is not None, f"{path} was just built and does not open"
    return corpus


def require(corpus: Corpus, seq: int) -> None:
    """Raise UserError unless both splits hold one window: `seq` bytes and the one that follows."""
    train, validation = len(corpus.train), len(corpus.validation)
    longest = min(train, validation) - 1
    if seq > longest:
        shorter = f"use --seq {longest} or less, or " if longest > 0 else ""
        raise UserError(
            f"--data {corpus.name!r} has {train} bytes to train on and {validation} to validate "
            f"on, and a sequence of --seq {seq} takes {seq + 1} of each; {shorter}give more text"
        )


# Where the text lies.


def standard_library() -> Source:
    """Every .py file of this Python's standard library except its tests, about 12 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    found = walk("stdlib", root, NOT_THE_LIBRARY) if root.is_dir() else ()
    files = [path for path in found if path.suffix == ".py"]
    if not files:
        raise MachineError(
            f"this Python keeps no source of its standard library in {str(root)!r}; "
            f"give other text: --data FILE or --data FOLDER"
        )
    return source_of("stdlib", "stdlib", files)


def text_below(spec: str) -> Source:
    """The file `spec`, or all files below the folder `spec`."""
    root = Path(os.path.abspath(os.path.expanduser(spec)))
    try:
        mode = os.stat(root if spec else "").st_mode  # Path("") would be the current folder
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL byte
        accepted = ", ".join(f"{form} ({meaning})" for form, meaning in ACCEPTED.items())
        raise UserError(f"--data {spec!r}: no such file or folder; give {accepted}") from error
    except OSError as error:
        raise unreadable(spec, error.filename, error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"--data {spec!r} is neither a file nor a folder; give one of them")
    files = walk(spec, root) if stat.S_ISDIR(mode) else [root]
    return source_of(spec, root.name[:40], files)


def walk(spec: str, root: Path, pruned: Collection[str] = ()) -> Iterator[Path]:
    """All files below `root`, but hidden ones, broken links, pipes and our own cached files."""

    def refuse(error: OSError) -> None:  # else os.walk passes over what it cannot list
        raise unreadable(spec, error.filename, error) from error

    for folder, below, names in os.walk(root, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".") and name not in pruned]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix != SUFFIX and os.path.isfile(path):
                yield path


def source_of(spec: str, label: str, files: Iterable[Path]) -> Source:
    """Sort the files, and hash what would change if one of them did."""
    ordered = sorted(files, key=Path.as_posix)
    try:
        known = [(str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in ordered]
    except OSError as error:
        raise unreadable(spec, error.filename, error) from error
    key = hashlib.sha256(ascii((FORMAT, known)).encode()).hexdigest()[:16]
    return Source(spec, label, tuple(ordered), key)


# The cached file: see [Note: one file, renamed into place].


def load(name: str, path: Path) -> Corpus | None:
    """Map the cached file; None when there is none, or it is cut short or not one of ours."""
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        header = json.loads(whole[:HEADER].tobytes())
        train, end = HEADER + header["train"], HEADER + header["train"] + header["validation"]
        sha256 = header["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(whole) != end:
        return None
    return Corpus(name, path, train=whole[HEADER:train], validation=whole[train:], sha256=sha256)


def build(source: Source, path: Path) -> None:
    """Write the cached file, complete or not at all."""
    train, validation = split(texts(source))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # no two builders share one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(source.spec, train, validation, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:  # what cannot be read is a UserError, so this is the writing
        raise MachineError(
            f"cannot write the cache of --data {source.spec!r} in {str(path.parent)!r} "
            f"({error.strerror}); name a folder with room for it: --cache DIR"
        ) from error


def texts(source: Source) -> list[Path]:
    """The files that hold text: not empty, and no NUL byte within their first CHUNK bytes."""
    found, empty = [], 0
    for path in source.files:
        head = next(chunks(source.spec, path), b"")
        empty += head == b""
        if head and b"\0" not in head:
            found.append(path)
    if not found:
        count = len(source.files)
        raise UserError(
            f"--data {source.spec!r} holds no text: of {count} files (hidden ones aside) {empty} "
            f"are empty and {count - empty} binary; give a text file, or a folder with one in it"
        )
    return found


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Which files to train on and which to hold out whole: see [Note: what is held out]."""
    train = [path for number, path in enumerate(files, start=1) if number % HELD_OUT]
    return train, files[HELD_OUT - 1 :: HELD_OUT]


def write(spec: str, train: list[Path], validation: list[Path], path: Path) -> None:
    """Write header and bytes to the new file `path`, and see them on the disk."""
    sizes, sha256 = [], hashlib.sha256()
    with open(path, "xb") as file:
        file.write(bytes(HEADER))
        for source in train + validation:
            sizes.append(0)
            for chunk in chunks(spec, source):
                sizes[-1] += file.write(chunk)
                sha256.update(chunk)
        held_out = sum(sizes[len(train) :]) if validation else sum(sizes) // HELD_OUT
        header = {
            "train": sum(sizes) - held_out,
            "validation": held_out,
            "sha256": sha256.hexdigest(),
        }
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER))
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before the bytes do


def chunks(spec: str, path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise unreadable(spec, path, error) from error


def unreadable(spec: str, path: Path | str, error: OSError) -> UserError:
    return UserError(
        f"--data {spec!r}: cannot read {str(path)!r} ({error.strerror}); "
        f"make it readable, or give another path"
    )
