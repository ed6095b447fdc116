"""privacy.secagg.shamir: against polynomials evaluated by hand, and against shares that lie."""

import random
from itertools import combinations

import pytest

from privacy.secagg.errors import RefusedError, UnrecoverableError
from privacy.secagg.shamir import PRIME, SHARE_BYTES, check_share, combine, recover, split

SECRET = bytes(range(1, 33))


def share_of(value: int) -> bytes:
    return (value % PRIME).to_bytes(SHARE_BYTES, "big")


def test_the_modulus_is_the_smallest_prime_above_all_secrets() -> None:
    def fermat(number: int) -> bool:
        return all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13))

    assert fermat(PRIME)
    assert not any(fermat(2**256 + odd) for odd in range(1, PRIME - 2**256, 2))


def test_a_polynomial_written_down_by_hand_gives_its_constant() -> None:
    secret = int.from_bytes(SECRET, "big")
    slope, bend = 2**255 + 12345, PRIME - 7
    shares = {x: share_of(secret + slope * x + bend * x**2) for x in (2, 5, 65536)}
    assert combine(shares) == SECRET


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, SECRET])
def test_any_threshold_of_shares_gives_the_secret(secret: bytes) -> None:
    shares = split(secret, 3, [1, 2, 4, 7, 9])
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    for chosen in combinations(shares, 3):
        assert combine({point: shares[point] for point in chosen}) == secret


def test_fewer_shares_give_every_secret_alike() -> None:
    """With t - 1 shares fixed, each secret is explained by exactly one polynomial."""
    known = {1: share_of(17), 2: share_of(99)}
    # Third shares that make the secret 0 and 1: both exist, so two shares do not tell them apart.
    explained = {combine({**known, 3: share_of(third)}) for third in (3 * 99 - 3 * 17, 3 * 99 - 3 * 17 + 1)}
    assert explained == {bytes(32), (1).to_bytes(32, "big")}


def test_two_sharings_of_one_secret_have_nothing_in_common() -> None:
    first, second = split(SECRET, 2, [1, 2, 3]), split(SECRET, 2, [1, 2, 3])
    assert all(first[point] != second[point] for point in first)


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(33), 2, [1, 2]),
        (SECRET, 0, [1, 2]),
        (SECRET, 3, [1, 2]),
        (SECRET, 2, [1, 1, 2]),
        (SECRET, 2, [0, 1, 2]),
        (SECRET, 2, [1, -1]),
        (SECRET, 2, [1, 65537]),
    ],
)
def test_what_cannot_be_shared_is_refused(secret: bytes, threshold: int, points: list[int]) -> None:
    with pytest.raises(ValueError, match=r"secret|threshold|points"):
        split(secret, threshold, points)


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_what_is_no_element_of_the_field_is_refused(share: bytes) -> None:
    with pytest.raises(RefusedError):
        check_share(share)
    with pytest.raises(RefusedError):
        combine({1: share, 2: bytes(33)})


@pytest.mark.parametrize("point", [0, -1, 65537])
def test_a_share_at_the_secret_itself_is_refused(point: int) -> None:
    with pytest.raises(RefusedError):
        combine({point: bytes(33), 2: bytes(33)})


def test_a_result_that_is_no_secret_is_told() -> None:
    with pytest.raises(UnrecoverableError):
        combine({1: share_of(2**256 + 5), 2: share_of(2**256 + 5)})


@pytest.mark.parametrize("false", [{1}, {4, 5}, {7, 12}, {1, 5, 12}])
def test_false_shares_are_found_and_done_without(false: set[int]) -> None:
    shares = split(SECRET, 7, range(1, 13))
    for point in false:
        shares[point] = share_of(int.from_bytes(shares[point], "big") + 1)
    assert recover(shares, 7, SECRET.__eq__) == (SECRET, frozenset(false))


def test_false_shares_that_are_not_needed_do_no_harm() -> None:
    shares = split(SECRET, 7, range(1, 13))
    shares[12] = share_of(5)
    assert recover(shares, 7, SECRET.__eq__) == (SECRET, frozenset())


def test_too_many_false_shares_give_nothing_rather_than_something_else() -> None:
    shares = split(SECRET, 7, range(1, 10))
    for point in (2, 4, 6):
        shares[point] = share_of(random.Random(point).randrange(PRIME))
    with pytest.raises(UnrecoverableError, match="committed"):
        recover(shares, 7, SECRET.__eq__)


def test_too_few_shares_are_told() -> None:
    shares = split(SECRET, 3, [1, 2, 3])
    del shares[2]
    with pytest.raises(UnrecoverableError, match="2 shares, 3 are needed"):
        recover(shares, 3, SECRET.__eq__)
