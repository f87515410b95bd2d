"""A request on its way: the tokens that it has so far, and the text that they are."""

from collections import abc
from dataclasses import dataclass, field

from dist_lab.errors import UserError, shown
from dist_lab.inference.blocks import Table
from dist_lab.inference.sampling import Sampling
from dist_lab.inference.text import TextStream, Tokenizer


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Args:
        prompt: its tokens, at least one.
        new_tokens: generate so many at most.
        sampling: how a token is chosen.
        stops: strings that end the text; they are not part of it.
    """

    prompt: abc.Sequence[int]
    new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: abc.Sequence[str] = ()

    @property
    def longest(self) -> int:
        """The number of tokens that the text may grow to."""
        return len(self.prompt) + self.new_tokens


class Sequence:
    """The prompt of a request and its continuation, which grows by a token at a time.

    Args:
        name: of the request; the engine tells by it which text an event is of.

    Attributes:
        tokens: of the prompt, and those generated so far.
        seen: the number of tokens whose keys and values are in the cache.
        reason: why the text has ended: "length", "stop" or "failed"; "" if it has not.
        table: its blocks, where the cache is paged.

    Raises:
        UserError: the prompt is empty, or has a token that the model does not know.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, name: str = "") -> None:
        check_prompt(request.prompt, tokenizer.vocab)
        self.request, self.name = request, name
        self.tokens, self.seen, self.table = list(request.prompt), 0, Table()
        self.stream = TextStream(tokenizer, request.stops)
        self.reason = "" if request.new_tokens > 0 else "length"
        self._ends = tokenizer.ends

    @property
    def missing(self) -> int:
        """The number of tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.seen

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def add(self, token: int) -> str:
        """Add a generated token. Returns the text that has become certain."""
        self.tokens.append(token)
        shown = "" if token in self._ends else self.stream.feed(token)
        if token in self._ends or self.stream.stopped:
            self.reason = "stop"
        elif len(self.tokens) == self.request.longest:
            self.reason = "length"
        return shown + self.stream.finish() if self.reason else shown

    def fail(self) -> None:
        """No token can be chosen. A policy may let it run on, so it gets one that exists."""
        self.tokens.append(0)
        self.reason = "failed"


def check_prompt(prompt: abc.Sequence[int], vocab: int) -> None:
    """Raise UserError for an empty prompt, and for tokens that do not exist."""
    if not prompt:
        raise UserError("the prompt is empty, and a model continues a text; give one token or more")
    wrong = [token for token in prompt if not 0 <= token < vocab]
    if wrong:
        raise UserError(
            f"the prompt has token {shown(wrong[0])}, and the vocabulary has {vocab}, from 0 to "
            f"{vocab - 1}; use the model's own tokenizer"
        )
