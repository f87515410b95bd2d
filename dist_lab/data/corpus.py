"""A corpus is text as bytes: one memory-mapped array, split into training and validation.

A byte-level model needs no tokenizer and no download: every Python comes with about 12 MB of text,
the source of its standard library, which is the default. A text file or a folder of text files
works as well. This file does not import torch, and numpy only when a cached file is opened or
written: the launcher checks the data before it starts a rank, and reports a wrong path at once.
`tokenized.py` makes other tokens of a corpus.

[Note: what is held out]
Validation data must be similar to training data and disjoint from it. If there are ten files or
more, every tenth file in sorted order is held out. Neighbors in that order belong to one package,
so a tenth of each package is held out. If there are fewer files, the last tenth of their bytes is
held out.

[Note: one file, renamed into place]
A cached corpus is a .npy file of bytes: the training bytes, the validation bytes, where each source
file ends in the two, and FOOTER bytes with two lengths and the SHA-256 of both splits. It is
written under a hidden name and renamed when complete, so a file with the final name is always
complete: two ranks may build it at once, and a killed build is never opened. The name contains a
hash of the source files (path, size, modification time), so a changed source is another corpus.
Opening a corpus checks its length, not its bytes. All cached files may be deleted.
"""

import hashlib
import os
import secrets
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import MachineError, UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Tokens: TypeAlias = "npt.NDArray[np.unsignedinteger]"

ACCEPTED = {  # values of --data -> their meaning
    "stdlib": "the source of Python's standard library",
    "FILE": "a text file",
    "FOLDER": "a folder of text files",
    "module:function": "your own function(batch=, seq=, seed=)",
}
DEFAULT_CACHE = Path("~/.cache/dist_lab")

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT = 10  # every tenth file, or the last tenth of the bytes, is for validation
SUFFIX = ".corpus"
FOOTER = 8 + 8 + 32  # bytes: the lengths of the two splits, little-endian, and the digest
FORMAT = 3  # in the hash in a cached file's name: raise it when the format or the split changes
HEAD = 1 << 20  # bytes at the start of a file that are searched for a NUL: then it is not text


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, mapped read-only from the cached file at `path`.

    `name` is the value of --data. `sha256` is the hash of the training bytes followed by the
    validation bytes; it does not depend on the machine, on paths or on the tokenizer.
    """

    name: str
    path: Path
    train: Tokens  # (tokens,), uint8 where a token is a byte
    validation: Tokens  # (tokens,)
    ends: tuple[int, ...]  # of source files, in the training bytes followed by the validation bytes
    sha256: str
    tokenizer: FileTokenizer | None = None  # None: a token is a byte

    def documents(self) -> tuple[list[bytes], list[bytes]]:
        """The source files of the two splits, which may share one: each has a part of it then."""
        border = len(self.train)
        return (
            split_at(self.train, (end for end in self.ends if end < border)),
            split_at(self.validation, (end - border for end in self.ends if end > border)),
        )


def find(spec: str, cache_dir: Path = DEFAULT_CACHE) -> Corpus:
    """Open the corpus that `spec` names (see ACCEPTED), and build its cached file if it is missing.

    Raises UserError when `spec` names no text, MachineError when the cache cannot be written.
    """
    try:
        label, files = standard_library() if spec == "stdlib" else files_of(spec)
        stats = [(str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
        key = hashlib.sha256(ascii((FORMAT, stats)).encode()).hexdigest()[:16]
        path = Path(os.path.expanduser(cache_dir), f"{label}-{key}{SUFFIX}")
        corpus = load(spec, path)
        if corpus is None:
            build(spec, read_texts(spec, files), path)
            corpus = load(spec, path)
    except OSError as error:
        raise UserError(
            f"data={spec!r}: cannot read {str(error.filename or spec)!r} ({error.strerror}); "
            f"make it readable, or give another path"
        ) from error
    assert corpus is not None, f"{path} was just built and does not open"
    return corpus


def require(corpus: Corpus, seq: int) -> None:
    """Raise UserError unless both splits have at least one window of `seq` + 1 tokens."""
    train, validation = len(corpus.train), len(corpus.validation)
    unit = "bytes" if corpus.tokenizer is None else "tokens"
    longest = min(train, validation) - 1
    if seq > longest:
        shorter = f"use seq={longest} or less, or " if longest > 0 else ""
        raise UserError(
            f"data={corpus.name!r} has {train} training and {validation} validation {unit}, and "
            f"seq={seq} needs {seq + 1} of each; {shorter}give more text"
        )


# The source files of a corpus: each function returns a prefix for the cached file's name, and the
# sorted files.


def standard_library() -> tuple[str, list[Path]]:
    """Every .py file of this Python's standard library except its tests, about 12 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    candidates = walk(root, NOT_THE_LIBRARY) if root.is_dir() else []
    files = [path for path in candidates if path.suffix == ".py"]
    if not files:
        raise MachineError(
            f"this Python has no source of its standard library in {str(root)!r}; "
            f"give other text: data=FILE or data=FOLDER"
        )
    return "stdlib", files


def files_of(spec: str) -> tuple[str, list[Path]]:
    """The file `spec`, or all files below the folder `spec`."""
    root = Path(os.path.abspath(os.path.expanduser(spec)))
    try:
        os.stat(root if spec else "")  # Path("") would be the current folder
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL byte
        accepted = ", ".join(f"{form} ({meaning})" for form, meaning in ACCEPTED.items())
        raise UserError(f"data={spec!r}: no such file or folder; give {accepted}") from error
    if not (root.is_file() or root.is_dir()):
        raise UserError(f"data={spec!r} is neither a file nor a folder; give one of them")
    return root.name[:40], [root] if root.is_file() else walk(root)


def walk(root: Path, pruned: Collection[str] = ()) -> list[Path]:
    """All files below `root`, except hidden files, broken links, pipes and cached corpora."""

    def refuse(error: OSError) -> None:  # by default os.walk skips folders that it cannot list
        raise error

    paths: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in pruned]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    kept = [path for path in paths if path.suffix != SUFFIX and os.path.isfile(path)]
    return sorted(kept, key=Path.as_posix)


# The cached file: see [Note: one file, renamed into place].


def load(name: str, path: Path) -> Corpus | None:
    """Map the cached file; None if it is missing, too short or not a cached corpus."""
    import numpy as np

    try:
        whole = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    body, (one, two, digest) = whole[:-FOOTER], np.split(whole[-FOOTER:], [8, 16])
    train, validation = (int.from_bytes(size.tobytes(), "little") for size in (one, two))
    ends = np.frombuffer(body[train + validation :].tobytes(), "<i8")
    splits = body[:train], body[train : train + validation]
    return Corpus(name, path, *splits, tuple(ends.tolist()), digest.tobytes().hex())


def build(spec: str, texts: list[bytes], path: Path) -> None:
    """Write the cached file of source files."""
    held_out = texts[HELD_OUT - 1 :: HELD_OUT]  # see [Note: what is held out]
    kept = [text for number, text in enumerate(texts, start=1) if number % HELD_OUT]
    whole = b"".join(kept + held_out)
    train = len(whole) - (sum(map(len, held_out)) or len(whole) // HELD_OUT)
    write(spec, path, whole, train, accumulate(map(len, kept + held_out)))


def write(spec: str, path: Path, whole: bytes, train: int, ends: Iterable[int] = ()) -> None:
    """Write a cached file, whose first `train` bytes are for training: complete, or not at all."""
    from numpy.lib.format import write_array_header_1_0

    digest = hashlib.sha256(whole).digest()
    numbers = [*ends, train, len(whole) - train]
    after = b"".join(number.to_bytes(8, "little") for number in numbers) + digest
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # unique for each builder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                length = len(whole) + len(after)
                shape = {"descr": "|u1", "fortran_order": False, "shape": (length,)}
                write_array_header_1_0(file, shape)
                file.write(whole)  # np.save does not report why a write fails
                file.write(after)
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(
            f"cannot write the cache of data={spec!r} in {str(path.parent)!r} "
            f"({error.strerror}); name a folder with room for it: cache=DIR"
        ) from error


def split_at(text: Tokens, ends: Iterable[int]) -> list[bytes]:
    """The parts of a text that end at these places, and the last one."""
    edges = sorted({0, *ends, len(text)})
    return [text[start:stop].tobytes() for start, stop in pairwise(edges)]


def read_texts(spec: str, files: list[Path]) -> list[bytes]:
    """Read all text files: those that are not empty and have no NUL in the first HEAD bytes."""
    texts, empty = [], 0
    for path in files:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            if head and b"\0" not in head:
                texts.append(head + file.read())
        empty += not head
    if not texts:
        raise UserError(
            f"data={spec!r} holds no text: of {len(files)} files (hidden ones aside) {empty} are "
            f"empty and {len(files) - empty} binary; give a text file, or a folder with one in it"
        )
    return texts
