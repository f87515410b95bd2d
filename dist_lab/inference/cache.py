"""The KV cache: attention computes the keys and values of a token once, and keeps them.

    without      token t computes t tokens in every layer        T tokens cost T^2 / 2 forwards
    with         token t computes one, and attends to t - 1      T tokens cost T forwards

The memory for it is 2 x layers x K x Dh numbers a token. Under tensor parallelism a rank has the
keys and values of its own heads, under pipeline parallelism those of its own layers.

A model is given a list of `Past`, one for each of its layers (zoo/gpt.py). `Contiguous` keeps one
sequence, or B of one length, in one piece of memory. `Flattened` lets sequences of any lengths
share a forward: their new tokens lie one after another in one row of N, and each token has its own
position. So no row is padded, and there is nothing to mask:

    tokens       [ a7 | b0 b1 b2 b3 | c2 ]       (1, N): one new token of a, a prompt b, one of c
    positions    [ 7  | 0  1  2  3  | 2  ]       (N,)
    linear       one matmul for all N tokens
    attention    a7 to a's cache, b0 ... b3 to b's, c2 to c's

Letters: B sequences, T new tokens, S tokens so far, H query heads, K key and value heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_lab.zoo.gpt import Past, causal_attention


class Contiguous:
    """The keys and values of one layer, in memory that doubles when it is full.

    Args:
        capacity: tokens to make room for at first.

    Attributes:
        seen: S, the tokens that it has.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.seen, self._capacity = 0, capacity
        self._memory: Tensor | None = None  # (2, B, K, capacity, Dh): keys, then values

    def positions(self, new: int) -> Tensor:
        return torch.arange(self.seen, self.seen + new)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory = self._with_room(k)
        before, self.seen = self.seen, self.seen + k.size(2)
        memory[0, :, :, before : self.seen] = k
        memory[1, :, :, before : self.seen] = v
        keys, values = memory[:, :, :, : self.seen]
        return causal_attention(q, keys, values)

    def _with_room(self, k: Tensor) -> Tensor:
        """The memory, with room for new keys of this shape."""
        needed, old = self.seen + k.size(2), self._memory
        if old is None or needed > old.size(3):
            doubled = 0 if old is None else 2 * old.size(3)
            capacity = max(needed, self._capacity, doubled)
            self._memory = k.new_empty(2, *k.shape[:2], capacity, k.size(3))
            if old is not None:
                self._memory[:, :, :, : self.seen] = old[:, :, :, : self.seen]
        assert self._memory is not None
        return self._memory


class Flattened:
    """One layer's caches of several sequences, for a forward of all their new tokens together.

    Args:
        pasts: of each sequence.
        counts: the number of new tokens of each, in the order in which they lie in the row.
    """

    def __init__(self, pasts: Sequence[Past], counts: Sequence[int]) -> None:
        assert len(pasts) == len(counts), (len(pasts), counts)
        self.pasts, self.counts = pasts, list(counts)

    def positions(self, new: int) -> Tensor:
        assert new == sum(self.counts), (new, self.counts)
        each = zip(self.pasts, self.counts, strict=True)
        return torch.cat([past.positions(count) for past, count in each])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(self.counts, dim=2) for x in (q, k, v)), strict=True)  # N -> T each
        outs = [past.attend(*part) for past, part in zip(self.pasts, parts, strict=True)]
        return torch.cat(outs, dim=2)  # (1, H, N, Dh)


def flattened(caches: Sequence[Sequence[Past]], counts: Sequence[int]) -> list[Flattened]:
    """The caches of several sequences -> one of all, a `Flattened` for each layer."""
    return [Flattened(layer, counts) for layer in zip(*caches, strict=True)]
