"""A corpus in the tokens of its own tokenizer: trained once, and cached beside the bytes.

    stdlib-3f9a51c290b1d7e4.corpus              bytes, from corpus.py
    stdlib-3f9a51c290b1d7e4-bpe-4096.corpus     training tokens, validation tokens, tokenizer.json

The tokenizer is trained on the training bytes alone. All three are in one file, so they belong
together, and with the same bytes and size they are the same.

[Note: made once] Eight ranks that begin at the same time need one tokenizer, not eight. The first
process that locks the cached file makes it, and the others wait for the lock. The kernel releases a
lock when its process ends, so that after a kill the next one makes the file. No collective is
needed, and other runs wait, too.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dist_lab.data import corpus
from dist_lab.data.bpe import encoded, train
from dist_lab.data.corpus import SUFFIX, Corpus
from dist_lab.data.tokenizer import FileTokenizer, size_of
from dist_lab.errors import MachineError

LARGE = 5_000_000  # bytes, which take a second or more


def tokenize(text: Corpus, spec: str, tell: Callable[[str], None]) -> Corpus:
    """Returns the corpus in tokens.

    Args:
        text: in bytes.
        spec: a value of --tokenizer, such as bpe:4096.
        tell: called with a line before a tokenizer is trained on a large text.

    Raises:
        UserError: the training text is too short for so many tokens.
        MachineError: the cache cannot be written, or the library `tokenizers` is missing.
    """
    size = size_of(spec)
    path = text.path.with_name(f"{text.path.stem}-bpe-{size}{SUFFIX}")
    found = load(text, size, path)
    if found is None:
        with locked(path, text.name):  # see [Note: made once]
            found = load(text, size, path)
            if found is None:
                if len(text.train) > LARGE:
                    megabytes = f"{len(text.train) / 1e6:,.0f} MB"
                    tell(f"training the tokenizer {spec} on {megabytes} of {text.name}, once ...")
                build(text, size, path)
                found = load(text, size, path)
    assert found is not None, f"{path} was just built and does not open"
    return found


def load(text: Corpus, size: int, path: Path) -> Corpus | None:
    """Map the cached file; None if there is none."""
    cached = corpus.load(text.name, path)
    if cached is None:
        return None
    dtype = "<u2" if size <= 2**16 else "<u4"
    (end,) = cached.ends  # of the validation tokens; the tokenizer follows
    return replace(
        text, path=path, train=cached.train.view(dtype),
        validation=cached.validation[:end].view(dtype),
        tokenizer=FileTokenizer(cached.validation[end:].tobytes().decode(), str(path)),
    )  # fmt: skip


def build(text: Corpus, size: int, path: Path) -> None:
    """Train the tokenizer, encode both splits, and write the cached file."""
    training, validation = text.documents()
    file = train(training, size, text.name)
    tokenizer = FileTokenizer(file, str(path))
    tokens, held_out = (
        encoded(documents, tokenizer).tobytes() for documents in (training, validation)
    )
    whole = tokens + held_out + file.encode()
    corpus.write(text.name, path, whole, len(tokens), [len(held_out)])


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of a cached file, which need not exist."""
    try:
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise MachineError(
            f"cannot write the cache of data={name!r} in {str(path.parent)!r} ({error.strerror}); "
            "name a folder with room for it: cache=DIR"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield
