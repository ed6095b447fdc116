"""Noise is normal to the tails, new at every call, and leaves nothing in the last bits.

The limits are such that a right generator fails one of these tests less than once in a million runs.
"""

import math
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy import stats

from privacy import gaussian

COUNT = 400_000
RARE = 1e-7


@pytest.fixture(scope="module")
def sample() -> NDArray[np.float64]:
    return gaussian.draw((COUNT,), 1.0)


def test_it_is_normal(sample: NDArray[np.float64]) -> None:
    assert stats.kstest(sample, "norm").pvalue > RARE


def test_its_moments_are_those_of_the_normal(sample: NDArray[np.float64]) -> None:
    """Of the k-th power, the mean is within 6 standard errors: its variance is E[x^2k] - E[x^k]^2."""
    for power in (1, 2, 3, 4, 6):
        expected, second = stats.norm.moment(power), stats.norm.moment(2 * power)
        error = math.sqrt((second - expected**2) / COUNT)
        assert np.mean(sample**power) == pytest.approx(expected, abs=6 * error)


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0])
def test_its_tails_are_as_heavy_as_they_must_be(limit: float, sample: NDArray[np.float64]) -> None:
    beyond = int(np.sum(np.abs(sample) > limit))
    assert stats.binomtest(beyond, COUNT, 2 * stats.norm.sf(limit)).pvalue > RARE


def test_the_two_numbers_of_a_pair_and_the_next_are_independent(sample: NDArray[np.float64]) -> None:
    pairs = gaussian._PAIRS
    for apart in (1, pairs):
        first, second = sample[:-apart], sample[apart:]
        for one, other in ((first, second), (first**2 - 1, second**2 - 1)):
            correlation = np.mean(one * other) / (np.std(one) * np.std(other))
            assert abs(correlation) < 6 / math.sqrt(first.size)


class _Stream:
    """Stands for the cipher, to reach the ends of its range."""

    def __init__(self, byte: int) -> None:
        self._byte = byte

    def __call__(self, *_: object, **__: object) -> "_Stream":
        return self

    def encryptor(self) -> "_Stream":
        return self

    def update(self, data: bytes) -> bytes:
        return bytes([self._byte]) * len(data)


@pytest.mark.parametrize(("byte", "largest"), [(0x00, math.sqrt(106 * math.log(2))), (0xFF, 0.0)])
def test_the_ends_of_the_range_are_finite(byte: int, largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "Cipher", _Stream(byte))
    assert gaussian.draw((2,), 1.0)[0] == pytest.approx(largest, abs=1e-12)


def test_it_follows_from_a_fresh_key_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    urandom = os.urandom

    def listen(size: int) -> bytes:
        keys.append(urandom(size))
        return keys[-1]

    monkeypatch.setattr(os, "urandom", listen)
    first, second = gaussian.draw((2,), 1.0), gaussian.draw((2,), 1.0)
    assert len(set(keys)) == 2
    for key, drawn in zip(keys, (first, second), strict=True):
        assert len(key) == 32
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(16))
        k, m = (int.from_bytes(stream[at : at + 8], "little") >> 11 for at in (0, 8))
        radius, angle = math.sqrt(-2 * math.log((k + 1) / 2**53)), 2 * math.pi * m / 2**53
        np.testing.assert_allclose(drawn, [radius * math.cos(angle), radius * math.sin(angle)], rtol=1e-12)


def test_no_seed_repeats_it() -> None:
    np.random.seed(1)  # noqa: NPY002 - that this changes nothing is the point
    first = gaussian.draw((8,), 1.0)
    np.random.seed(1)  # noqa: NPY002 - as above
    assert not np.any(first == gaussian.draw((8,), 1.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (2 * gaussian._PAIRS + 1,), (0,), (2, 0)])
def test_every_shape_is_filled_to_the_last_value(shape: tuple[int, ...], dtype: type) -> None:
    out: NDArray[np.float64] = np.full(shape, np.nan, dtype)
    gaussian.fill(out, 2.5)
    assert np.isfinite(out).all()
    assert np.unique(out).size == out.size or dtype is np.float32


def test_the_standard_deviation_scales_it() -> None:
    out = np.empty(100_000, np.float32)
    gaussian.fill(out, 1e-3)
    assert stats.kstest(out.astype(np.float64) / 1e-3, "norm").pvalue > RARE
    gaussian.fill(out, 0.0)
    assert not out.any()


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_standard_deviation_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="finite and at least 0"):
        gaussian.draw((1,), std)
    with pytest.raises(ValueError, match="finite and at least 0"):
        gaussian.add(np.zeros(1), std)


@pytest.mark.parametrize("out", [np.zeros((4, 4))[:, ::2], np.zeros(4, np.int64)])
def test_a_buffer_that_would_not_be_filled_is_refused(out: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="C-contiguous float32 or float64"):
        gaussian.fill(out, 1.0)
    with pytest.raises(ValueError, match="C-contiguous float32 or float64"):
        gaussian.add(out, 1.0)


@pytest.mark.parametrize("std", [1e-30, 0.03, 1.0, 1.5, 7e10])
def test_the_grid_is_a_power_of_two_a_million_times_finer_than_the_noise(std: float) -> None:
    step = gaussian.grid_step(std)
    assert math.frexp(step)[0] == 0.5
    assert 2**20 <= std / step < 2**21


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-9, 1 / 3])
def test_noisy_values_lie_on_one_grid_whatever_they_were(value: float) -> None:
    """Without the grid, float64 sums with 1.0 are multiples of 2^-53 or more, and those with 0.0 are not."""
    values = np.full(100_000, value)
    gaussian.add(values, 1.0)
    steps = values / gaussian.grid_step(1.0)
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert stats.kstest(values - value, "norm").pvalue > RARE
    plain = np.full(100_000, value) + gaussian.draw((100_000,), 1.0)
    assert np.any(plain / gaussian.grid_step(1.0) % 1)


def test_the_noise_of_a_float32_buffer_is_added_in_float64() -> None:
    values = np.full(50_000, 100.0, np.float32)
    gaussian.add(values, 1.0)
    assert stats.kstest(values.astype(np.float64) - 100.0, "norm").pvalue > RARE
    before = values.copy()
    gaussian.add(values, 0.0)
    np.testing.assert_array_equal(values, before)


def test_values_and_noise_on_one_grid_are_added_exactly() -> None:
    step = 2.0**-30
    values = gaussian.draw((50_000,), 1.0)
    exact = values.copy()
    gaussian.truncate(values, step)
    assert np.all(np.abs(values) <= np.abs(exact))
    assert np.max(np.abs(exact - values)) < step
    noise = gaussian.draw_on_grid(values.shape, 1.0, step)
    np.testing.assert_array_equal(noise / step, np.rint(noise / step))
    np.testing.assert_array_equal((values + noise) - values, noise)
    assert stats.kstest(noise, "norm").pvalue > RARE
