"""Byte-level BPE: a tokenizer that is trained on the text of a run, and the text as its tokens.

    text        d e f _ f ( )         7 bytes
    merges      (d,e) (de,f) (_,f)    the most frequent pair of neighbors becomes a token, again and
    tokens      def _f ( )            again (Sennrich et al. 2016, arXiv:1508.07909, on the bytes of
                                      words, as in GPT-2: Radford et al. 2019)

The library `tokenizers` counts pairs and encodes. The file is written here, from the merges alone:

    ids 0 to 255       the bytes, each under its own number, as with --tokenizer bytes
    ids from 256 on    the merges, in order
    the last id        <|endoftext|>, between two files of the text

So the same text and size give the same file, to the bit, with any number of threads.
A model learns where files end, and can end a text by itself. A text of one file has no such place:
the token is there, and is never seen. Any bytes can be encoded, also those that are no UTF-8: they
stay single tokens.

[Note: cut before a line break] The library works on pieces of a text side by side, so long texts
are cut. BPE merges within words only, and words are found from left to right. A visible character
ends its word before a line break, so a cut there changes no token.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from dist_lab.data.tokenizer import END, FileTokenizer, byte_characters, import_library
from dist_lab.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids: TypeAlias = "npt.NDArray[np.unsignedinteger]"

PIECE, AT_A_TIME = 2**16, 64  # characters of a piece, or a few more; pieces side by side
RARE = 2  # pairs that occur less often become no token
CUT = re.compile(r"[!-~](?=\n)", re.ASCII)
NO_UTF8 = re.compile("([\udc80-\udcff]+)")  # as Python decodes such bytes with surrogateescape


def train(documents: Sequence[bytes], size: int, name: str) -> str:
    """Train a tokenizer of `size` tokens. Returns the contents of its tokenizer.json.

    Args:
        name: of the text, for a message.

    Raises:
        UserError: the text has too few pairs for so many tokens.
        MachineError: the library is not installed.
    """
    library = import_library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=RARE, show_progress=False, special_tokens=[],
        initial_alphabet=sorted(byte_characters()),
    )  # fmt: skip
    texts = (piece for piece in pieces_of(documents, []) if isinstance(piece, str))
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    text = file_of(merges)
    if (found := FileTokenizer(text, "the new tokenizer").vocab) < size:
        raise UserError(
            f"data={name!r} has pairs for {found} tokens in its training text, not for {size}; "
            f'use tokenizer="bpe:{found}", or give more text'
        )
    return text


def file_of(merges: Sequence[Sequence[str]]) -> str:
    """The tokenizer.json of these merges, in order."""
    names = dict.fromkeys([*byte_characters(), *("".join(pair) for pair in merges)])
    level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {
        "id": len(names), "content": END, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    table: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", **level},
        "post_processor": None, "decoder": {"type": "ByteLevel", **level},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": {name: number for number, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n"


def spec_of(text: str) -> str | None:
    """The value of --tokenizer whose file this is; None if it is another one than those of ours."""
    try:
        merges = json.loads(text)["model"]["merges"]
        ours = file_of(merges)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return f"bpe:{FileTokenizer(text, 'it').vocab}" if ours == text else None


# --- encoding a text ------------------------------------------------------------------------------


def encoded(documents: Sequence[bytes], tokenizer: FileTokenizer) -> "Ids":
    """The tokens of documents, with the end token between two. The tokenizer is of `train`.

    Returns:
        (N,) uint16, or uint32 if there are too many ids for it.
    """
    import numpy as np

    dtype = np.uint16 if tokenizer.vocab <= 2**16 else np.uint32
    encoder = type(tokenizer.library).from_str(tokenizer.text)
    encoder.encode_special_tokens = True  # the name of the end token in a text is text
    runs: list[Ids] = [np.zeros(0, dtype)]
    stream = pieces_of(documents, list(tokenizer.ends))
    while block := list(islice(stream, AT_A_TIME)):
        texts = [piece for piece in block if isinstance(piece, str)]
        found = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
        for piece in block:
            runs.append(np.array(next(found).ids if isinstance(piece, str) else piece, dtype))
    return np.concatenate(runs)


def pieces_of(documents: Sequence[bytes], between: list[int]) -> Iterator[str | list[int]]:
    """Pieces of documents: texts, and tokens where bytes are no UTF-8 and between documents."""
    for number, document in enumerate(documents):
        if number:
            yield between
        yield from pieces_of_one(document)


def pieces_of_one(document: bytes) -> Iterator[str | list[int]]:
    """
    >>> [*pieces_of_one(bytes([99, 97, 102, 0xC3, 0xA9, 0xFF, 33]))]
    ['café', [255], '!']
    """
    for run in NO_UTF8.split(document.decode(errors="surrogateescape")):
        if NO_UTF8.match(run):
            yield list(run.encode(errors="surrogateescape"))
        else:
            yield from cut(run)


def cut(text: str) -> Iterator[str]:
    """Cut a text into pieces of PIECE characters or more: [Note: cut before a line break]."""
    begin = 0
    while begin < len(text):
        match = CUT.search(text, begin + PIECE)
        end = match.end() if match else len(text)
        yield text[begin:end]
        begin = end
