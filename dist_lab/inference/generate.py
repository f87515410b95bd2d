"""Generating text for a few requests at once, each with a contiguous cache, until all are done.

    step 1    [ a0 a1 a2 | b0 b1 b2 b3 b4 ]     prefill: all tokens of the prompts  -> a3, b5
    step 2    [ a3 | b5 ]                       decode: one token of each sequence  -> a4, b6
    step 3    [ a4 | b6 ]                       a4 ends its text, so a leaves       -> b7
    step 4    [ b7 ]

Prefill and decode are one step with other numbers of tokens. A prompt is cut into parts of PREFILL
tokens, so that the memory of a step does not grow with the length of the prompt. Requests that come
while others run, and memory for more sequences than fit, are the subject of the engine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dist_lab.errors import UserError
from dist_lab.inference.cache import Contiguous, flattened
from dist_lab.inference.sampling import Sampling, choose
from dist_lab.inference.stage import Stage
from dist_lab.inference.text import TextStream, Tokenizer

PREFILL = 512  # tokens of a prompt in one step

OnText = Callable[[int, str], None]  # number of the request, text that has become certain


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Args:
        prompt: its tokens, at least one.
        new_tokens: generate so many at most.
        sampling: how a token is chosen.
        stops: strings that end the text; they are not part of it.
    """

    prompt: Sequence[int]
    new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        tokens: without those of the prompt; including one that ended the text.
        text: of these tokens.
        reason: "length": there are new_tokens; "stop": by a stop string or the end token.
    """

    tokens: list[int]
    text: str
    reason: str


def generate(
    stage: Stage, requests: Sequence[Request], tokenizer: Tokenizer,
    on_text: OnText = lambda number, text: None,
) -> list[Completion]:  # fmt: skip
    """Continue each request's prompt. Collective: every rank gives the same requests.

    Args:
        on_text: called on every rank with each part of a text, in order.

    Raises:
        UserError: a prompt is empty, or has a token that the model does not know.
        MachineError: logits are not finite.
    """
    sequences = [Running(stage, request, tokenizer) for request in requests]
    while live := [(n, s) for n, s in enumerate(sequences) if not s.reason]:
        for number, token in step(stage, live):
            on_text(number, sequences[number].add(token))
    return [s.completion() for s in sequences]


def step(stage: Stage, live: Sequence[tuple[int, "Running"]]) -> Iterator[tuple[int, int]]:
    """One forward of all sequences. Yields (number, next token) of those whose prompt is over."""
    parts = [s.tokens[s.seen : s.seen + PREFILL] for _, s in live]
    counts = [len(part) for part in parts]
    ready = [i for i, (_, s) in enumerate(live) if s.seen + counts[i] == len(s.tokens)]
    last = torch.tensor(counts).cumsum(0) - 1  # where the last new token of each sequence is
    tokens = torch.tensor([token for part in parts for token in part])  # (N,)
    cache = flattened([s.cache for _, s in live], counts)
    phase = "decode" if len(tokens) == len(live) else "prefill"
    with stage.mesh.comm.label(phase, unit=""):
        logits = stage.forward(tokens, cache[0].positions(len(tokens)), cache, last[ready])
    if not ready:
        return
    chosen = None
    if logits is not None:
        waiting = [live[i][1] for i in ready]
        chosen = [
            choose(row, s.request.sampling, len(s.tokens))
            for row, s in zip(logits, waiting, strict=True)
        ]
    for i, token in zip(ready, stage.agree(chosen, len(ready)), strict=True):
        yield live[i][0], token


class Running:
    """A request on its way.

    Attributes:
        tokens: of the prompt, and those generated so far.
        reason: why it has ended; "" if it has not.
    """

    def __init__(self, stage: Stage, request: Request, tokenizer: Tokenizer) -> None:
        check_prompt(request.prompt, tokenizer.vocab)
        self.request, self.end = request, tokenizer.end
        self.tokens = list(request.prompt)
        self.stream = TextStream(tokenizer, request.stops)
        self.cache: list[Contiguous] = stage.new_cache(len(self.tokens) + request.new_tokens)
        self.reason = "" if request.new_tokens > 0 else "length"

    @property
    def seen(self) -> int:
        """The number of tokens whose keys and values are in the cache."""
        return self.cache[0].seen

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def add(self, token: int) -> str:
        """Add a generated token. Returns the text that has become certain."""
        self.tokens.append(token)
        shown = "" if token == self.end else self.stream.feed(token)
        if token == self.end or self.stream.stopped:
            self.reason = "stop"
        elif len(self.generated) == self.request.new_tokens:
            self.reason = "length"
        if self.reason:
            self.cache.clear()
            shown += self.stream.finish()
        return shown

    def completion(self) -> Completion:
        return Completion(self.generated, self.stream.text, self.reason)


def check_prompt(prompt: Sequence[int], vocab: int) -> None:
    """Raise UserError for an empty prompt, and for tokens that do not exist."""
    if not prompt:
        raise UserError("the prompt is empty, and a model continues a text; give one token or more")
    wrong = [token for token in prompt if not 0 <= token < vocab]
    if wrong:
        raise UserError(
            f"the prompt has token {wrong[0]}, and the vocabulary has {vocab}, from 0 to "
            f"{vocab - 1}; use the model's own tokenizer"
        )
