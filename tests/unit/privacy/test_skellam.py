"""Skellam noise: the table against the series of the Bessel functions, what is drawn against the law, and its tails."""

from decimal import Decimal, localcontext
from math import factorial

import numpy as np
import pytest
from scipy.stats import chisquare
from scipy.stats import skellam as reference

from privacy.skellam import MAX_VARIANCE, Skellam, keystream, log_pmf

VARIANCES = [0.01, 0.3, 1.0, 4.5, 44.0, 512.0]
WHOLE = 1 << 128


def series(variance: float, k: int) -> Decimal:
    """P(k) = exp(-v) sum over j of (v / 2)^(2 j + k) / (j! (j + k)!): all terms positive, so it cannot cancel."""
    half = Decimal(variance) / 2
    total, j, term = Decimal(0), 0, half**k / factorial(k)
    while term > total * Decimal(10) ** -55 or j < half:
        total += term
        j += 1
        term *= half * half / (j * (j + k))
    return total * (-Decimal(variance)).exp()


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_is_the_law_to_the_last_of_128_bits(variance: float) -> None:
    noise = Skellam(variance)
    with localcontext() as context:
        context.prec = 70
        law = [series(variance, k) for k in range(noise.reach + 1)]
        assert 2 * sum(law[1:]) + law[0] > 1 - Decimal(2) ** -127, "the tails that were left out"
        below = (1 - 2 * sum(law[1:]) - law[0]) / 2
        for k, edge in zip(range(-noise.reach, noise.reach), noise._edges, strict=True):
            below += law[abs(k)]
            assert abs(below * WHOLE - edge) <= 2


@pytest.mark.parametrize("variance", VARIANCES)
def test_each_uniform_becomes_the_integer_in_whose_interval_it_is(variance: float) -> None:
    """At both sides of every edge, by the guide and by comparison."""
    noise = Skellam(variance)
    uniforms, expected = [], []
    for k, edge in zip(range(-noise.reach, noise.reach), noise._edges, strict=True):
        for uniform, value in ((edge - 1, k), (edge, k + 1)):
            # Edges may coincide far out, where the integers between them have less than 2^-128.
            if 0 <= uniform < WHOLE and (
                value == -noise.reach or noise._edges[value + noise.reach - 1] <= uniform
            ):
                uniforms.append(uniform)
                expected.append(value)
    keep = [
        index
        for index, (uniform, value) in enumerate(zip(uniforms, expected, strict=True))
        if value == noise.reach or uniform < noise._edges[value + noise.reach]
    ]
    assert len(keep) > noise.reach
    first = np.array([uniforms[index] >> 112 for index in keep], dtype="<u2")
    rest = {
        index: (uniforms[kept] & ((1 << 112) - 1)).to_bytes(14, "big")
        for index, kept in enumerate(keep)
        if noise._guide[first[index]] == np.iinfo(np.int32).min
    }
    assert rest, "some cells hold an edge"
    answers = iter([first.tobytes(), b"".join(rest.values())])
    drawn = noise.sample(len(keep), lambda count: _exactly(next(answers), count))
    assert drawn.tolist() == [expected[index] for index in keep]


def _exactly(given: bytes, count: int) -> bytes:
    assert len(given) == count
    return given


def test_the_ends_of_the_range_of_uniforms() -> None:
    noise = Skellam(4.5)
    zeros = sum(edge == 0 for edge in noise._edges)
    assert zeros <= 3, "integers with less than 2^-128"
    assert noise.sample(3, bytes).tolist() == [zeros - noise.reach] * 3
    assert noise.sample(3, lambda count: b"\xff" * count).tolist() == [noise.reach] * 3


@pytest.mark.parametrize("variance", VARIANCES)
def test_what_is_drawn_has_the_law(variance: float) -> None:
    count = 400_000
    drawn = Skellam(variance).sample(count)
    edge = int(reference.isf(50 / count, variance / 2, variance / 2)) + 1
    observed = np.bincount(np.clip(drawn, -edge, edge) + edge, minlength=2 * edge + 1)
    inner = reference.pmf(np.arange(-edge + 1, edge), variance / 2, variance / 2)
    tail = (1 - inner.sum()) / 2
    expected = np.concatenate(([tail], inner, [tail])) * count
    kept = expected > 5
    pooled = [*observed[kept], observed[~kept].sum()], [*expected[kept], expected[~kept].sum()]
    observed_kept, expected_kept = (np.array(values) for values in pooled)
    if not expected_kept[-1]:
        observed_kept, expected_kept = observed_kept[:-1], expected_kept[:-1]
    assert chisquare(observed_kept, expected_kept * observed_kept.sum() / expected_kept.sum()).pvalue > 1e-7


@pytest.mark.parametrize("variance", VARIANCES)
def test_moments(variance: float) -> None:
    count = 1_000_000
    drawn = Skellam(variance).sample(count).astype(np.float64)
    # Variance of the mean: v / n. Fourth central moment of the law: 3 v^2 + v.
    assert abs(drawn.mean()) < 6 * (variance / count) ** 0.5
    assert abs((drawn**2).mean() - variance) < 6 * ((2 * variance**2 + variance) / count) ** 0.5


def test_tails_are_there() -> None:
    """A table that ended too early would have none."""
    count, variance = 2_000_000, 4.5
    drawn = np.abs(Skellam(variance).sample(count))
    for k in (8, 9, 10, 11):
        expected = 2 * count * reference.sf(k - 1, variance / 2, variance / 2)
        assert abs(np.count_nonzero(drawn >= k) - expected) < 6 * expected**0.5 + 6


@pytest.mark.parametrize("parts", [3, 70, 1000])
def test_the_sum_of_shares_has_the_law_of_the_whole(parts: int) -> None:
    variance, count = 25.0, 20_000
    share = Skellam(variance / parts)
    entropy = keystream()
    total = np.zeros(count, dtype=np.int64)
    for _ in range(parts):
        total += share.sample(count, entropy)
    edge = 14
    observed = np.bincount(np.clip(total, -edge, edge) + edge, minlength=2 * edge + 1)
    inner = reference.pmf(np.arange(-edge + 1, edge), variance / 2, variance / 2)
    tail = (1 - inner.sum()) / 2
    expected = np.concatenate(([tail], inner, [tail])) * count
    assert chisquare(observed, expected).pvalue > 1e-7


def test_no_two_draws_are_alike() -> None:
    noise = Skellam(44.0)
    assert not np.array_equal(noise.sample(1000), noise.sample(1000))
    assert keystream()(32) != keystream()(32)


def test_a_keystream_goes_on() -> None:
    entropy = keystream()
    assert len(entropy(40)) == 40
    assert entropy(40) != entropy(40)


@pytest.mark.parametrize("variance", [*VARIANCES, 1e4])
def test_log_pmf(variance: float) -> None:
    reach = int(12 * variance**0.5) + 20
    logs = log_pmf(variance, reach)
    assert logs.shape == (reach + 1,)
    near = int(5 * variance**0.5) + 2
    assert np.allclose(logs[:near], reference.logpmf(np.arange(near), variance / 2, variance / 2), atol=1e-9)
    with localcontext() as context:
        context.prec = 70
        for k in (0, reach // 2, reach):
            assert logs[k] == pytest.approx(float(series(variance, k).ln()), abs=1e-9)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), float("inf"), 2 * MAX_VARIANCE])
def test_variances_that_cannot_be(variance: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        Skellam(variance)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), float("inf")])
def test_laws_that_cannot_be(variance: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        log_pmf(variance, 3)
