"""Tokenizers: text to token ids and back. A file, tokenizer.json, describes one.

    bytes       a token is a byte: 256 ids, no file
    bpe:4096    4,096 ids: the 256 bytes, frequent strings of bytes, and the end of a text (bpe.py)

The file has Hugging Face's format. Their library `tokenizers` reads it to encode a text, and runs
no code from it. `FileTokenizer` reads it, too, for the way back: which bytes a token stands for. A
token may be a part of a character, so the way back is a way to bytes, not to text. Of the many
kinds of such files two have bytes for every token, whatever its neighbors are:

    ByteLevel       GPT-2, Llama 3, ours     "Ġdef" is " def": each character stands for one byte
    ByteFallback    Llama 1 and 2, Mistral   "▁def" is " def"; "<0xC3>" is one byte of a character

All others are refused. Imports neither torch nor numpy.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from dist_lab.errors import MachineError, UserError, shown

BYTES = "bytes"
END = "<|endoftext|>"  # the end token of the tokenizers that we train
ENDS = (END, "</s>", "<|end_of_text|>", "<|eot_id|>")  # those of others, by their usual names
FEWEST, MOST = 257, 2**20  # ids of a bpe tokenizer: 256 bytes and the end token, at least
SPACE = "▁"  # in files with ByteFallback
TRIAL = "  Def  é x\n\tY 12 \n"  # a text that lossy rules change


def read_tokenizer(value: object, where: str) -> str:
    """Read the value of --tokenizer: bytes or bpe:N. Raises UserError if it is none of these.

    >>> read_tokenizer("bpe:04096", "--tokenizer")
    'bpe:4096'
    """
    if value == BYTES:
        return BYTES
    match = re.fullmatch(r"bpe:([0-9]{1,9})", value) if isinstance(value, str) else None
    if match is None:
        raise UserError(
            f"no tokenizer {shown(value)} ({where}); give bytes, or bpe:N with the number of "
            "tokens, such as bpe:4096"
        )
    size = int(match[1])
    if not FEWEST <= size <= MOST:
        raise UserError(
            f"tokenizer bpe:{size} has {size} tokens ({where}); give {FEWEST} (256 bytes and the "
            f"end of a text) to {MOST}, such as bpe:4096"
        )
    return f"bpe:{size}"


def size_of(spec: str) -> int:
    """The number of tokens that a value of --tokenizer stands for.

    >>> size_of("bytes"), size_of("bpe:4096")
    (256, 4096)
    """
    return 256 if spec == BYTES else int(spec.partition(":")[2])


class FileTokenizer:
    """The tokenizer of a tokenizer.json.

    Attributes:
        text: the contents of the file.
        sha256: of the file.
        vocab: the number of ids, those that have no token included.
        special: the special tokens, name -> id.
        ends: the tokens that end a text; if none are given, the special tokens named in ENDS.
    """

    def __init__(self, text: str, where: str, *, ends: tuple[int, ...] = ()) -> None:
        """
        Args:
            where: the file, for messages.

        Raises:
            UserError: tokens of such a file have no bytes of their own.
            MachineError: it is no such file, or is damaged.
        """
        self.text, self._where = text, where
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._bytes, self.special = pieces_of(text, where)
        self.vocab = max(self._bytes) + 1
        self.ends = ends or tuple(self.special[name] for name in ENDS if name in self.special)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. The name of a special token in it is text like any other.

        Raises:
            UserError: the file's rules lose a part of a text.
            MachineError: there is no library, or the library cannot read the file.
        """
        ids: list[int] = self.library.encode(text).ids
        return ids

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for: none for a special token, or an id without a token."""
        return self._bytes.get(token, b"")

    def length_of(self, tokens: Iterable[int]) -> int:
        """The number of bytes that tokens stand for."""
        return sum(len(self.bytes_of(token)) for token in tokens)

    @cached_property
    def library(self) -> Any:
        """The file as a `tokenizers.Tokenizer`."""
        Library = import_library().Tokenizer
        try:
            library = Library.from_str(self.text)
            library.no_truncation()  # some files would cut a long prompt off
            library.no_padding()
            library.model.dropout = None  # each rank would draw other tokens
            library.encode_special_tokens = True  # as text: whoever asks cannot end a prompt
            tokens = library.encode(TRIAL).ids
        except BaseException as error:  # a panic of its Rust code is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            why = " ".join(str(error).split())[:200]
            raise MachineError(
                f"the library tokenizers cannot read {self._where}: {why}; get the file again"
            ) from None
        back = b"".join(map(self.bytes_of, tokens)).decode(errors="replace")
        if back not in (TRIAL, " " + TRIAL):  # many put a space before a text
            raise UserError(
                f"{self._where} makes {shown(back)} of {shown(TRIAL)}, and a text must come back; "
                "give a model whose tokenizer keeps spaces, capitals and all bytes"
            )
        return library


def import_library() -> Any:
    """The library `tokenizers`. Raises MachineError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise MachineError(
            "tokens that are no bytes need the library tokenizers, which is not installed; type "
            "pip install 'tokenizers>=0.21'"
        ) from None
    return tokenizers


# --- the file -------------------------------------------------------------------------------------


def pieces_of(text: str, where: str) -> tuple[dict[int, bytes], dict[str, int]]:
    """Token -> its bytes, and the names of the special tokens, which have no bytes.

    Raises UserError, MachineError: see FileTokenizer.
    """
    try:
        table = json.loads(text)
        model, added = table["model"], table.get("added_tokens") or []
        kind, vocab = model.get("type", "BPE"), model["vocab"]
        if kind != "BPE":
            raise UserError(
                f"{where} has tokens of the kind {shown(kind)}, and only those of BPE have bytes "
                "of their own; give a model with a byte-level BPE tokenizer"
            )
        to_bytes = decoder_of(table.get("decoder"), where)
        pieces = {checked_id(token): to_bytes(name) for name, token in vocab.items()}
        if len(pieces) != len(vocab) or not pieces:
            raise ValueError("two tokens have one id, or there is none")
        special: dict[str, int] = {}
        for token in added:
            number, name = checked_id(token["id"]), token["content"]
            pieces[number] = b"" if token["special"] else name.encode()
            special |= {name: number} if token["special"] else {}
    except UserError:  # which is a ValueError
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MachineError(
            f"{where} is no file of a tokenizer, or is damaged ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:100]}); get it again"
        ) from None
    return pieces, special


def checked_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{shown(value)} is no id")
    return value


def decoder_of(decoder: Any, where: str) -> Callable[[str], bytes]:
    """The function from the name of a token to its bytes."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] if isinstance(step, Mapping) else str(step) for step in steps]
    if kinds == ["ByteLevel"]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        return lambda name: bytes(byte_of[character] for character in name)
    # A Strip after them drops the space before the first word of a whole text.
    fallback = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"])
    if fallback and (steps[0]["pattern"], steps[0]["content"]) == ({"String": SPACE}, " "):
        return fallback_bytes
    raise UserError(
        f"{where} turns tokens into text by {', '.join(map(str, kinds))}, so that a token has no "
        "bytes of its own; give a model whose tokenizer is a byte-level BPE"
    )


def fallback_bytes(name: str) -> bytes:
    """
    >>> fallback_bytes("<0xC3>"), fallback_bytes("▁def")
    (b'\\xc3', b' def')
    """
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes([int(match[1], 16)])
    return name.replace(SPACE, " ").encode()


def byte_characters() -> list[str]:
    """The character that stands for each byte in a ByteLevel file, as in GPT-2's (256,).

    A byte that is a printable character of Latin-1 stands for itself. The others, such as the
    space, have the characters from U+0100 on.

    >>> byte_characters()[ord("a")], byte_characters()[ord(" ")]
    ('a', 'Ġ')
    """
    others = iter(range(0x100, 0x200))
    return [
        chr(byte if chr(byte).isprintable() and chr(byte) != " " else next(others))
        for byte in range(256)
    ]
