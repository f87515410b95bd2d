"""Generating text for a few requests at once, each with a contiguous cache, until all are done.

    step 1    [ a0 a1 a2 | b0 b1 b2 b3 b4 ]     prefill: all tokens of the prompts  -> a3, b5
    step 2    [ a3 | b5 ]                       decode: one token of each sequence  -> a4, b6
    step 3    [ a4 | b6 ]                       a4 ends its text, so a leaves       -> b7
    step 4    [ b7 ]

A prompt is cut into parts of PREFILL tokens, so that the memory of a step does not grow with the
length of the prompt. Requests that come while others run, and memory for more sequences than fit,
are the subject of the engine.
"""

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

from dist_lab.inference.cache import flattened
from dist_lab.inference.sampling import not_finite
from dist_lab.inference.sequence import Request, Sequence
from dist_lab.inference.stage import Stage
from dist_lab.inference.step import FAILED, step
from dist_lab.inference.text import Tokenizer

PREFILL = 512  # tokens of a prompt in one step

OnText = Callable[[int, str], None]  # number of the request, text that has become certain


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
    stage: Stage, requests: abc.Sequence[Request], tokenizer: Tokenizer,
    on_text: OnText = lambda number, text: None,
) -> list[Completion]:  # fmt: skip
    """Continue each request's prompt. Collective: every rank gives the same requests.

    Args:
        on_text: called on every rank with each part of a text, in order.

    Raises:
        UserError: a prompt is empty, or has a token that the model does not know.
        NotFinite: logits of one are not finite.
    """
    sequences = [Sequence(request, tokenizer, str(n)) for n, request in enumerate(requests)]
    live = {s.name: s for s in sequences if not s.reason}
    caches = {name: stage.new_cache(s.request.longest) for name, s in live.items()}
    while live:
        parts = [(s, min(s.missing, PREFILL)) for s in live.values()]
        cache = flattened(list(caches.values()), [count for _, count in parts])
        for sequence, token in step(stage, parts, cache):
            if token == FAILED:
                raise not_finite(len(sequence.tokens))
            on_text(int(sequence.name), sequence.add(token))
            if sequence.reason:
                del live[sequence.name], caches[sequence.name]
    return [Completion(s.generated, s.stream.text, s.reason) for s in sequences]
