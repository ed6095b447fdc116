"""Shamir's secret sharing (1979) of 32-byte secrets over the field of p = 2^256 + 297.

A secret s becomes the values f(x) of a random polynomial f of degree t - 1 with f(0) = s, at the points x of its holders. Any t
of them give s = f(0) by Lagrange's formula; fewer say nothing about it. p is the smallest prime above 2^256, so that every string of
32 bytes is a secret.
"""

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from math import prod
from random import Random
from typing import Final

from privacy.secagg.errors import RefusedError, UnrecoverableError

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
MAX_POINT: Final = 1 << 16
"""Points are places in a roster."""

_RANDOM_SUBSETS: Final = 1000
"""Tries to find t true shares among false ones, after each single one was left out. With 3 of 30 false and t = 20, one of
34 subsets is true."""


def split(secret: bytes, threshold: int, points: Collection[int]) -> dict[int, bytes]:
    """Share a secret.

    Args:
        secret: 32 bytes.
        threshold: t, shares that recover it.
        points: Of the holders: distinct, 1 to 65,536, at least t of them.

    Returns:
        Point to share, 33 bytes each. The coefficients come from the operating system.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} of {len(points)} shares")
    if len(set(points)) != len(points) or not all(1 <= point <= MAX_POINT for point in points):
        raise ValueError(f"points must be distinct and between 1 and {MAX_POINT}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _evaluate(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points}


def check_share(share: bytes) -> None:
    """Refuse what cannot be a share.

    Raises:
        RefusedError: If it has another length or is not below p.
    """
    if len(share) != SHARE_BYTES:
        raise RefusedError(f"a share has {len(share)} bytes, not {SHARE_BYTES}")
    if int.from_bytes(share, "big") >= PRIME:
        raise RefusedError("a share is not an element of the field")


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Recover a secret from exactly t shares, all of which count.

    Args:
        shares: Point to share.

    Returns:
        32 bytes.

    Raises:
        RefusedError: If a share or a point is none.
        UnrecoverableError: If what they give is no string of 32 bytes.
    """
    if not shares or not all(1 <= point <= MAX_POINT for point in shares):
        raise RefusedError(f"points of shares must lie between 1 and {MAX_POINT}")
    for share in shares.values():
        check_share(share)
    value = _at(0, {point: int.from_bytes(share, "big") for point, share in shares.items()})
    if value >> (8 * SECRET_BYTES):
        raise UnrecoverableError(f"{len(shares)} shares give no secret: one of them is false")
    return value.to_bytes(SECRET_BYTES, "big")


def recover(
    shares: Mapping[int, bytes], threshold: int, genuine: Callable[[bytes], bool]
) -> tuple[bytes, frozenset[int]]:
    """Recover a secret although some of its shares may be false.

    Args:
        shares: Point to share; each passed :func:`check_share`. The first ones are tried first.
        threshold: t.
        genuine: Whether a candidate is the secret that was committed to.

    Returns:
        The secret, and the points whose shares were found to be false: none if the first ones were all true.

    Raises:
        UnrecoverableError: If there are fewer than t, or no t of them were found that give a genuine secret.
    """
    if len(shares) < threshold:
        raise UnrecoverableError(f"{len(shares)} shares, {threshold} are needed")
    first = True
    for chosen in _subsets(list(shares), threshold):
        values = {point: int.from_bytes(shares[point], "big") for point in chosen}
        value = _at(0, values)
        secret = (value % (1 << 8 * SECRET_BYTES)).to_bytes(SECRET_BYTES, "big")
        if value >> (8 * SECRET_BYTES) == 0 and genuine(secret):
            # Checking the others costs more than the secret did: it is done when somebody is known to lie.
            rest = () if first else shares.keys() - values.keys()
            return secret, frozenset(
                point for point in rest if _at(point, values) != int.from_bytes(shares[point], "big")
            )
        first = False
    raise UnrecoverableError(f"no {threshold} of {len(shares)} shares give the secret that was committed to")


def _subsets(points: list[int], size: int) -> Iterator[tuple[int, ...]]:
    """Subsets to try: the first, then each run of ``size`` in the circle (they leave out each single point), then drawn ones."""
    yield tuple(sorted(points[:size]))
    if len(points) == size:
        return
    doubled = points + points
    yield from (tuple(sorted(doubled[start : start + size])) for start in range(1, len(points)))
    draw = Random(len(points))  # noqa: S311 - no secret; the same on each replay
    yield from islice(iter(lambda: tuple(sorted(draw.sample(points, size))), None), _RANDOM_SUBSETS)


def _evaluate(coefficients: list[int], point: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _at(point: int, values: Mapping[int, int]) -> int:
    """The polynomial through these values, at a point where none is given."""
    weights = _weights(point, tuple(values))
    return sum(weight * value for weight, value in zip(weights, values.values(), strict=True)) % PRIME


@lru_cache(maxsize=256)
def _weights(point: int, points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights: w_i = prod over all j of (x - x_j) / ((x - x_i) prod over j != i of (x_i - x_j)). Cached: many secrets have the same holders."""
    whole = prod(point - other for other in points) % PRIME
    weights = []
    for own in points:
        # Products of small integers, reduced once: ten times as fast as reducing each.
        below = (point - own) * prod(own - other for other in points if other != own)
        weights.append(whole * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
