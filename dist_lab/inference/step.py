"""One step of some sequences: a forward of their new tokens in one row, and a choice for each.

    sequence   tokens          seen   count         row                      chosen
    a          a0 ... a7       7      1     decode  a7                       a8
    b          b0 ... b9       0      10    prefill b0 ... b9                b10
    c          c0 ... c9       0      4     a part of a prompt: c0 ... c3    nothing yet

Prefill and decode are one step with other numbers of tokens. Who runs, and with how many tokens, is
the caller's choice: all of them until the last is done (generate.py), or a policy (engine.py).
"""

from collections import abc

import torch
from torch import Tensor

from dist_lab.inference.sampling import NotFinite, choose
from dist_lab.inference.sequence import Sequence
from dist_lab.inference.stage import Stage
from dist_lab.zoo.gpt import Past

FAILED = -1
Part = tuple[Sequence, int]  # a sequence, and the number of its tokens that a step computes


def step(
    stage: Stage, parts: abc.Sequence[Part], cache: abc.Sequence[Past]
) -> list[tuple[Sequence, int]]:
    """Compute the next tokens of each sequence. Collective.

    Args:
        parts: each count is from 1 to the number of tokens that are missing.
        cache: of all these sequences, in this order; a Past for each layer of this stage.

    Returns:
        The next token of each sequence that has no token missing now. The caller adds it. FAILED in
        place of a token whose logits are not finite: the other sequences can go on.
    """
    assert parts, "a step without sequences"
    assert all(0 < count <= s.missing for s, count in parts), parts
    counts = [count for _, count in parts]
    rows = [s.tokens[s.seen : s.seen + count] for s, count in parts]
    tokens = torch.tensor([token for row in rows for token in row])  # (N,)
    positions = torch.cat([torch.arange(s.seen, s.seen + count) for s, count in parts])  # (N,)
    last = torch.tensor(counts).cumsum(0) - 1  # where the last new token of each sequence is
    ready = [i for i, (s, count) in enumerate(parts) if count == s.missing]
    phase = "decode" if len(tokens) == len(parts) else "prefill"
    with stage.mesh.comm.label(phase, unit=""):
        logits = stage.forward(tokens, positions, cache, last[ready])
    for sequence, count in parts:
        sequence.seen += count
    if not ready:
        return []
    waiting, chosen = [parts[i][0] for i in ready], None
    if logits is not None:
        chosen = [next_token(row, s) for row, s in zip(logits, waiting, strict=True)]
    return list(zip(waiting, stage.agree(chosen, len(ready)), strict=True))


def next_token(logits: Tensor, sequence: Sequence) -> int:
    """The token after a sequence, or FAILED, which the other stages get to know as they do tokens.

    Args:
        logits: (V,).
    """
    try:
        return choose(logits, sequence.request.sampling, len(sequence.tokens))
    except NotFinite:
        return FAILED
