"""Mistakes that shipped in trainers that mix strategies, each as a test that would have shown it.

The loss looks right in all of them. Most became cells of the matrix in programs/verify/matrix; the
tests here need a batch or a model of their own.
"""

import pytest
import torch
from models import PLANS, VOCAB, batch, gpt, odd
from torch import nn
from torch.nn import functional as F

import dist_lab
from dist_lab.programs.verify import batch as batches

MIXES = [
    ({"pp": 2, "dp": 2, "tp": 2}, "ddp"),
    ({"pp": 2, "dp": 2, "tp": 2}, "zero2"),
    ({"pp": 2, "fsdp": 2, "tp": 2}, None),
    ({"dp": 2, "fsdp": 2, "tp": 2}, None),
]


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda axes, strategy: strategy is None and "pp" in axes)
@pytest.mark.parametrize(("axes", "strategy"), MIXES, ids=str)
@pytest.mark.ranks(8)
def test_a_rank_whose_micro_batches_are_empty_or_short_adds_its_own_tokens_only(axes, strategy):
    # A mean of the ranks' means would weigh 3 rows like 8, and a rank without rows would give NaN.
    mesh = dist_lab.init_mesh(**axes)
    job = dist_lab.parallelize(gpt(layers=4), mesh, strategy)
    x, y = batch(0, 11)
    sizes = [8, 3] if mesh.data.size == 2 else [8, 0, 2, 1]
    own = [t.split(sizes)[mesh.data.index] for t in (x, y)]
    total = job.count(own[1].numel())
    assert total == y.numel()
    pairs = batches.slice_rows(tuple(own), 4)
    loss = job.run(pairs, lambda out, t: dist_lab.cross_entropy_sum(out, t) / total)
    job.finish()
    reference = gpt(layers=4)
    expected = dist_lab.cross_entropy_sum(reference(x), y) / y.numel()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    gradients = job.full_gradients()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-10, atol=1e-12)
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert job.clip_grad_norm(1.0) == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.slow_unless(lambda axes, strategy: strategy is None)
@pytest.mark.parametrize(
    ("axes", "strategy"),
    [
        ({"dp": 2, "tp": 2}, "dp"),
        ({"dp": 2, "tp": 2}, "ddp"),
        ({"dp": 2, "tp": 2}, "zero1"),
        ({"dp": 2, "tp": 2}, "zero2"),
        ({"fsdp": 2, "tp": 2}, None),
    ],
    ids=str,
)
@pytest.mark.ranks(4)
def test_tied_frozen_unused_and_undivided_parameters_are_right_under_tp(axes, strategy):
    # Their gradients are partial, missing, or None; a vocabulary of 61 and a width of 13 leave tp
    # shards of two lengths, which a flat bucket must not shift against each other.
    report = dist_lab.verify(
        odd, batch, dist_lab.init_mesh(**axes), strategy, microbatches=2, plan=PLANS["odd"]
    )
    assert report.equal, report.sentence()


class Residual(nn.Module):
    """A block with biases everywhere, and a norm whose gradient is partial over tp."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class WithBiases(nn.Module):
    stages = ("embed", "blocks.*", "head")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 12)
        self.blocks = nn.ModuleList(Residual(12) for _ in range(4))
        self.head = nn.Linear(12, VOCAB)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PLAN = {
    "embed": "vocabulary", "blocks.*.norm": "sequence", "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise", "head": "vocabulary",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.nightly_unless(
    lambda axes, strategy, sequence_parallel: sequence_parallel == (strategy != "ddp")
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("axes", "strategy"), MIXES, ids=str)
@pytest.mark.ranks(8)
def test_row_biases_are_added_once_and_partial_gradients_summed_once(
    axes, strategy, sequence_parallel
):
    example = {"example_inputs": batch(0, rows=2)[0]} if "pp" in axes else {}  # tries the plan
    report = dist_lab.verify(
        lambda: WithBiases().double(), batch, dist_lab.init_mesh(**axes), strategy,
        microbatches=2, plan=PLAN, sequence_parallel=sequence_parallel, **example,
    )  # fmt: skip
    assert report.equal, report.sentence()
