"""Sampling: the next token as a function of its logits, the request's seed and its position.

    scores   = logits / temperature
    filtered = the top_k largest scores; of these the fewest whose probabilities reach top_p
    token    = argmax over v of filtered[v] + noise(seed, position, v)

With noise of the Gumbel distribution, -log(-log(uniform)), the argmax is a sample of the softmax of
the scores (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030, section 2). So no generator has a
state. The noise of token v is a hash of (seed, position, v): dist_lab/randomness/bits.py. It does
not depend on the other requests in a batch, on what was sampled before, or on the ranks. A request
that is preempted and computed again gets the same tokens.

Tokens are ordered by score, the largest first, and of equal scores by number, the smallest first.
`top_k` keeps the first k in this order, also among equals. `top_p` keeps the shortest beginning
whose probabilities sum to top_p or more (Holtzman et al. 2020, arXiv:1904.09751); probabilities are
those after temperature and top_k. At least one token is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.errors import MachineError, UserError
from dist_lab.randomness.bits import key_of, random_bits


@dataclass(frozen=True)
class Sampling:
    """How a request chooses tokens. The default is greedy: always the most likely one.

    Args:
        temperature: 0 is greedy; 1 samples from the model's own probabilities.
        top_k: keep so many tokens; None: all.
        top_p: keep the most likely tokens of this total probability.
        seed: requests with other seeds get other samples.

    Raises:
        UserError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature cannot be {self.temperature}; give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k cannot be {self.top_k}; give 1 or more, or leave it out")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p cannot be {self.top_p}; give a number above 0, and at most 1")


class NotFinite(MachineError):
    """The logits of a token are NaN or infinite."""


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """Choose a token.

    Args:
        logits: (V,) of this position's token, any floating-point dtype.
        position: of the token that is chosen: the number of tokens before it.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    if not bool(logits.isfinite().all()):
        raise not_finite(position)
    if sampling.temperature == 0:
        return int(logits.argmax())  # of equal ones the first
    below = logits.double() - logits.max()  # so that a tiny temperature makes -inf, and no inf
    scores = filtered(below / sampling.temperature, sampling)
    return int((scores + noise(sampling.seed, position, len(logits)).to(scores.device)).argmax())


def not_finite(position: int) -> NotFinite:
    return NotFinite(
        f"logits at position {position} are not finite; the weights are of a run that has "
        "diverged, or of a dtype that is too small"
    )


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """(V,) -> (V,): scores of tokens that are not kept become -inf."""
    order = scores.argsort(descending=True, stable=True)
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    if sampling.top_p < 1:
        probabilities = scores[order].softmax(0)
        before = probabilities.cumsum(0) - probabilities  # of all tokens ahead of this one
        order = order[: max(1, int((before < sampling.top_p).sum()))]
    kept = torch.full_like(scores, -torch.inf)
    kept[order] = scores[order]
    return kept


def noise(seed: int, position: int, vocab: int) -> Tensor:
    """(V,) float64 of the Gumbel distribution."""
    bits = random_bits(key_of(seed, position, "sampling", 0), [torch.arange(vocab)])
    uniform = (bits.double() + (2**31 + 0.5)) / 2**32  # int32 -> inside of (0, 1)
    return -(-uniform.log()).log()
