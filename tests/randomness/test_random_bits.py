"""The bits of a mask: the same on every rank, and as good as random ones."""

import hashlib

import pytest
import torch

from dist_lab.randomness.bits import key_of, mix64, random_bits

ROWS, PLACES, FEATURES = 32, 32, 256
KEY = key_of(0, 0, "drop", 0)


def bits_of(key=KEY, samples=ROWS, places=PLACES, features=FEATURES):
    return random_bits(key, [torch.arange(n) for n in (samples, places, features)])


def one_by_one(seed, step, name, call, sample, place, feature):
    """The bits of one element, in Python's own integers."""
    low, high = (1 << 32) - 1, (1 << 64) - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & high
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & high
        return x ^ (x >> 31)

    address = f"{seed} {step} {call} {name}".encode()
    row = int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little")
    for index in (sample, place):
        row = mix((row + (index + 1) * 0x9E3779B97F4A7C15) & high)
    x = (feature * 0x9E3779B9 + (row & low)) & low
    x = (x ^ (x >> 16)) * 0x7FEB352D & low
    x ^= row >> 32
    x = (x ^ (x >> 15)) * 0x846CA68B & low
    x ^= x >> 16
    return x - (1 << 32) if x >> 31 else x


def test_bits_are_those_of_the_definition_in_plain_integers():
    bits = random_bits(
        key_of(3, 7, "a.b", 1), [torch.tensor([5, 2**40]), *map(torch.arange, (3, 4))]
    )
    expected = [
        [[one_by_one(3, 7, "a.b", 1, s, t, d) for d in range(4)] for t in range(3)]
        for s in (5, 2**40)
    ]
    assert bits.tolist() == expected
    assert bits.dtype is torch.int32


def test_a_shard_has_the_bits_of_its_place_in_the_whole():
    whole = bits_of()
    key = key_of(0, 0, "drop", 0)
    part = random_bits(key, [torch.arange(3, 9), torch.arange(16, 32), torch.arange(100, 101)])
    assert torch.equal(part, whole[3:9, 16:32, 100:101])


def test_each_bit_is_set_half_the_time_and_values_are_uniform():
    bits = bits_of().flatten().long() & 0xFFFF_FFFF
    n = len(bits)  # 262,144 elements: the deviation of a fraction is 0.001
    for i in range(32):
        assert float((bits >> i & 1).double().mean()) == pytest.approx(0.5, abs=0.005)
    counts = torch.bincount(bits >> 24, minlength=256).double()
    chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    assert 180 < chi_square < 345  # 255 degrees of freedom: 255 +- 4 deviations


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 16])
def test_neighbours_along_each_dim_are_independent(dim, distance):
    keep = (bits_of() >= round(0.1 * 2**32) - 2**31).double()
    length = keep.shape[dim] - distance
    a, b = keep.narrow(dim, 0, length).flatten(), keep.narrow(dim, distance, length).flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("other", [(1, 0, "drop", 0), (0, 1, "drop", 0), (0, 0, "dropp", 0),
                                   (0, 0, "drop", 1)])  # fmt: skip
def test_another_seed_step_module_or_call_has_independent_bits(other):
    ours, theirs = bits_of().double().flatten(), bits_of(key_of(*other)).double().flatten()
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) == pytest.approx(0, abs=0.01)


def test_one_changed_bit_changes_half_of_the_others():
    x = torch.arange(1000) * 0x5851F42D4C957F2D
    for i in range(0, 64, 7):
        changed = mix64(x) ^ mix64(x ^ (1 << i if i < 63 else -(2**63)))
        ones = sum((changed >> j & 1).double().mean() for j in range(64))
        assert float(ones) == pytest.approx(32, abs=1.0)
