import math
from statistics import NormalDist

import pytest
import torch

from shardspec.runtime import rng

KEY = rng.stream_key(0, "layers.0.weight")
N = 1 << 18


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(key, counter, expected):
    index = counter[0] | counter[1] << 32
    index -= (index >> 63) << 64
    words = rng.philox(rng.Key(key, counter[2:]), torch.tensor([index]))
    assert tuple(int(word) for word in words) == expected


def kolmogorov_smirnov(cdf):
    """sqrt(n) times the largest distance of sorted values of a distribution function from uniform ones."""
    n = len(cdf)
    steps = torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * max((cdf - steps).max(), (steps + 1 / n - cdf).max()).item()


def test_uniform_values_are_uniform():
    values = rng.uniform(KEY, torch.arange(N))
    assert 0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    assert kolmogorov_smirnov(values.sort().values) < 1.63  # the 1 % quantile
    assert torch.equal(values * 2**53, (values * 2**53).round())


def test_normal_values_are_normal():
    values = rng.normal(KEY, torch.arange(N))
    assert kolmogorov_smirnov(torch.special.ndtr(values.sort().values)) < 1.63
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(values.pow(power).mean() - moment) < 3 * math.sqrt(variance / N)
    for bound in (2.0, 3.0, 4.0):
        expected = N * math.erfc(bound / math.sqrt(2))
        assert abs((values.abs() > bound).sum() - expected) < 4 * math.sqrt(expected)


def test_streams_are_independent():
    index = torch.arange(N)
    first = rng.normal(KEY, index)
    others = (("layers.1.weight", 0, 0), ("layers.0.weight", 1, 0), ("layers.0.weight", 0, 1))
    for name, seed, stream in others:
        other = rng.normal(rng.stream_key(seed, name, stream), index)
        assert abs((first * other).mean()) < 3 / math.sqrt(N)
    assert abs((first[1:] * first[:-1]).mean()) < 3 / math.sqrt(N)


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_any_part_of_the_index_gives_the_same_bits(draw):
    index = torch.arange(200_003)  # several chunks, and a tail
    whole = draw(KEY, index)
    for part in (
        slice(1, None),
        slice(3, 20),
        slice(7, 8),
        slice(5, None, 3),
        slice(65_530, 65_550),
        slice(0, 0),
    ):
        assert torch.equal(draw(KEY, index[part]), whole[part])
    order = torch.randperm(200_003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(KEY, order), whole[order])
    assert torch.equal(draw(KEY, index[:12].reshape(3, 4).t()), whole[:12].reshape(3, 4).t())
    assert torch.equal(draw(KEY, torch.tensor(11)), whole[11])


def test_indices_beyond_32_bits_have_values_of_their_own():
    index = torch.arange(100)
    assert not torch.isin(rng.uniform(KEY, index + (1 << 32)), rng.uniform(KEY, index)).any()


def test_the_inverse_distribution_function_agrees_with_torchs_and_pythons():
    tail = 10.0 ** -torch.arange(1, 300, 7, dtype=torch.float64)
    p = torch.cat([torch.linspace(1e-6, 1 - 1e-6, 999, dtype=torch.float64), tail])
    torch.testing.assert_close(rng.ndtri(p), torch.special.ndtri(p), rtol=1e-13, atol=1e-15)
    pythons = torch.tensor([NormalDist().inv_cdf(value) for value in p.tolist()], dtype=torch.float64)
    torch.testing.assert_close(rng.ndtri(p), pythons, rtol=2e-15, atol=2e-16)
    edges = rng.ndtri(torch.tensor([0.0, 0.5, 1.0, -0.1, 1.1], dtype=torch.float64)).tolist()
    assert edges[:3] == [-math.inf, 0.0, math.inf]
    assert all(map(math.isnan, edges[3:]))


def test_the_inverse_error_function_agrees_with_torchs():
    x = torch.linspace(-0.999, 0.999, 1001, dtype=torch.float64)
    torch.testing.assert_close(rng.erfinv(x), torch.erfinv(x), rtol=1e-13, atol=1e-15)
