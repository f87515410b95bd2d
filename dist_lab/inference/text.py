"""From text to tokens and back, as a stream: a token may be a part of a character.

    bytes that come     63 61 66 c3 a9 0a    with "\\n\\n" as a stop string
    text that is shown  c  a  f     é           the line break may be the first half of it

Text that has been shown cannot be taken back. So a stream holds back bytes that are the beginning
of a character, or of a stop string. Bytes that are no UTF-8 become U+FFFD, so that the text is
always valid. Does not import torch.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Protocol

from dist_lab.errors import UserError


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocab: the number of tokens.
        ends: the tokens that end a text, if there are any.
    """

    vocab: int
    ends: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...
    def bytes_of(self, token: int) -> bytes: ...


class Bytes:
    """The tokens of the zoo's text models: the bytes of the text in UTF-8. No token ends a text."""

    vocab = 256
    ends: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def bytes_of(self, token: int) -> bytes:
        return bytes([token])


class TextStream:
    """Tokens of one text as they come -> the text that is certain.

    Args:
        stops: strings that end the text. They are not part of it.

    Attributes:
        text: all text so far that is certain.
        stopped: a stop string has come. Further tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise UserError("a stop string is empty, which would stop at once; leave it out")
        self.text, self.stopped = "", False
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # characters that may become a stop string

    def feed(self, token: int) -> str:
        """Add a token. Returns the text that has become certain, often "" or one character."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._tokenizer.bytes_of(token))
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        return self._show(min(found) if found else len(self._held) - self._unsure())

    def finish(self) -> str:
        """No more tokens. Returns the text that was held back; half a character is dropped."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        self.text += shown
        return shown

    def _unsure(self) -> int:
        """The length of the longest end that is the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        ends = (n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stops))
        return next(ends, 0)
