"""A token depends on its logits, the request's seed and its position, and on nothing else."""

import pytest
import torch

from dist_lab.errors import MachineError, UserError
from dist_lab.inference.sampling import Sampling, choose, filtered, noise

LOGITS = torch.tensor([0.5, 2.0, 2.0, -1.0, 1.0, 0.0], dtype=torch.float64)


def kept(scores, **options):
    scores = torch.tensor(scores, dtype=torch.float64)
    return filtered(scores, Sampling(1.0, **options)).isfinite().nonzero()[:, 0].tolist()


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_probabilities_of_the_softmax(temperature):
    """With 5 degrees of freedom chi-square is above 20.5 once in a thousand seeds."""
    sampling = Sampling(temperature, seed=3)
    counts = torch.zeros(6)
    for position in range(2000):
        counts[choose(LOGITS, sampling, position)] += 1
    assert chi_square(counts, (LOGITS / temperature).softmax(0)) < 20.5


def test_frequencies_after_top_k_and_top_p_are_those_of_the_kept_tokens():
    sampling = Sampling(1.0, top_k=4, top_p=0.8, seed=1)
    probabilities = filtered(LOGITS, sampling).softmax(0)
    assert probabilities.gt(0).tolist() == [False, True, True, False, True, False]
    counts = torch.zeros(6)
    for position in range(2000):
        counts[choose(LOGITS, sampling, position)] += 1
    assert counts[probabilities == 0].sum() == 0
    assert chi_square(counts[counts > 0], probabilities[counts > 0]) < 13.8  # 2 degrees of freedom


def test_noise_of_other_seeds_and_positions_is_uncorrelated():
    rows = torch.stack([noise(seed, at, 2000) for seed in (0, 1) for at in (0, 1, 2)])
    correlated = torch.corrcoef(rows) - torch.eye(6)
    assert correlated.abs().max() < 0.09  # 4 / sqrt(2000)
    assert torch.equal(noise(1, 2, 2000), rows[5])
    assert torch.equal(noise(1, 2, 50), rows[5, :50])


def test_the_noise_has_the_mean_and_variance_of_gumbel():
    x = noise(0, 0, 200_000)
    assert abs(x.mean() - 0.57722) < 0.012
    assert abs(x.var() - 1.64493) < 0.03
    assert x.isfinite().all()


def test_greedy_takes_the_first_of_equal_logits():
    assert choose(LOGITS, Sampling(), 0) == 1
    assert choose(LOGITS.flip(0), Sampling(), 9) == 3


def test_top_k_keeps_exactly_k_also_among_equals():
    assert kept([1.0, 3.0, 3.0, 3.0], top_k=2) == [1, 2]
    assert kept([0.0] * 5, top_k=3) == [0, 1, 2]
    assert kept([1.0, 2.0], top_k=9) == [0, 1]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    scores = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log().tolist()
    assert kept(scores, top_p=0.4) == [0]
    assert kept(scores, top_p=0.5) == [0]
    assert kept(scores, top_p=0.51) == [0, 1]
    assert kept(scores, top_p=0.75) == [0, 1]
    assert kept(scores, top_p=0.8) == [0, 1, 2]  # of the equal ones the first
    assert kept(scores, top_p=1e-9) == [0]
    assert kept(scores, top_p=1.0) == [0, 1, 2, 3]


def test_top_p_counts_probabilities_after_top_k():
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log().tolist()
    assert kept(scores, top_p=0.65) == [0, 1]
    assert kept(scores, top_p=0.55, top_k=2) == [0]  # 0.4 / 0.7 = 0.57


def test_a_seed_is_a_stream_of_its_own():
    flat = torch.zeros(50)
    streams = [[choose(flat, Sampling(1.0, seed=s), at) for at in range(40)] for s in (0, 1, 0)]
    assert streams[0] == streams[2]
    assert sum(a == b for a, b in zip(*streams[:2], strict=True)) < 6


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0},
              {"top_p": 1.5}],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(MachineError, match="position 7 are not finite"):
        choose(torch.tensor([0.0, torch.nan]), Sampling(), 7)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature):
    for sign in (1, -1):
        logits = sign * torch.tensor([1.0, 2.0, 9.0, 3.0])
        assert choose(logits, Sampling(temperature=temperature), 5) == int(logits.argmax())
        assert choose(logits, Sampling(temperature, top_k=3, top_p=0.5), 5) == int(logits.argmax())
