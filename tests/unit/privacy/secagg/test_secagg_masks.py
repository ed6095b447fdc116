"""privacy.secagg.masks and unmask: against HKDF and ChaCha20 written out here, and against numpy's plain sums."""

import hmac
import struct
from hashlib import sha256

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.secagg.errors import RefusedError
from privacy.secagg.masks import (
    Mask,
    MaskedVector,
    MaskPlan,
    apply_mask,
    check_public_key,
    dtype_of,
    own_mask,
    pair_mask,
)
from privacy.secagg.unmask import MaskedSum, UnmaskPlan

ROSTER = bytes(range(32))
ALICE, BOB = (X25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
BLOCK = 1 << 18


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, 32 bytes."""
    extracted = hmac.digest(bytes(32), secret, sha256)
    return hmac.digest(extracted, info + b"\x01", sha256)


def chacha20(key: bytes, blocks: int) -> bytes:
    """RFC 8439, section 2.3, with a nonce of zeros and the counter from 0."""

    def quarter(state: list[int], *at: int) -> None:
        a, b, c, d = at
        for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[first] = (state[first] + state[second]) & 0xFFFFFFFF
            mixed = state[third] ^ state[first]
            state[third] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF

    stream = b""
    for counter in range(blocks):
        begin = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
        state = list(begin)
        for _ in range(10):
            for column in range(4):
                quarter(state, column, column + 4, column + 8, column + 12)
            for diagonal in range(4):
                quarter(
                    state, diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4
                )
        stream += struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(state, begin, strict=True)))
    return stream


def keystream(mask: Mask, length: int, bits: int) -> MaskedVector:
    return np.frombuffer(chacha20(mask.key, -(-length * bits // 512)), dtype_of(bits))[:length]


def test_the_cipher_written_out_here_is_the_one_of_the_rfc() -> None:
    assert chacha20(bytes(32), 1)[:16].hex() == "76b8e0ada0f13d90405d6ae55386bd28"  # RFC 8439, A.1, vector 1


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("subtract", [False, True])
def test_a_mask_is_the_keystream_modulo_a_power_of_two(bits: int, subtract: bool) -> None:
    mask = Mask(sha256(b"key").digest(), subtract)
    vector = np.arange(1000).astype(dtype_of(bits))
    expected = vector.astype(object) + (-1 if subtract else 1) * keystream(mask, 1000, bits).astype(object)
    apply_mask(vector, mask)
    assert vector.tolist() == [value % 2**bits for value in expected]


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("length", [0, 1, 63, BLOCK // 4 + 1, BLOCK + 3])
def test_blocks_do_not_show(bits: int, length: int) -> None:
    """The start of a long vector is masked as a short one, and its mask comes off again."""
    mask = Mask(sha256(b"key").digest())
    vector = np.zeros(length, dtype_of(bits))
    apply_mask(vector, mask)
    whole = np.zeros(2 * BLOCK, dtype_of(bits))
    apply_mask(whole, mask)
    assert np.array_equal(vector, whole[:length])
    apply_mask(vector, mask.inverted())
    assert not vector.any()


def test_keys_follow_from_both_names_the_roster_and_the_secret_of_the_two() -> None:
    secret = ALICE.exchange(BOB.public_key())
    info = b"fedge/secagg/1/pair" + ROSTER + b"\x00\x05alice" + b"\x00\x03bob"
    theirs = pair_mask(ALICE, BOB.public_key().public_bytes_raw(), ROSTER, "alice", "bob")
    assert theirs == Mask(hkdf(secret, info), subtract=False)
    assert pair_mask(BOB, ALICE.public_key().public_bytes_raw(), ROSTER, "bob", "alice") == theirs.inverted()
    assert own_mask(b"\x07" * 32, ROSTER) == Mask(hkdf(b"\x07" * 32, b"fedge/secagg/1/own" + ROSTER))


def test_other_names_or_another_roster_give_unrelated_keys() -> None:
    public = BOB.public_key().public_bytes_raw()
    keys = {
        pair_mask(ALICE, public, ROSTER, "alice", "bob").key,
        pair_mask(ALICE, public, ROSTER, "alice", "bobb").key,
        pair_mask(ALICE, public, ROSTER, "aliceb", "ob").key,
        pair_mask(ALICE, public, bytes(32), "alice", "bob").key,
    }
    assert len(keys) == 4


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"short", bytes(33)])
def test_keys_that_make_the_secret_known_to_all_are_refused(public: bytes) -> None:
    with pytest.raises(RefusedError):
        check_public_key(public)
    with pytest.raises(RefusedError):
        pair_mask(ALICE, public, ROSTER, "alice", "bob")


def test_masks_are_used_once() -> None:
    plan = MaskPlan([Mask(bytes(32))])
    plan.apply(np.zeros(4, np.uint16))
    second = np.zeros(4, np.uint16)
    with pytest.raises(RefusedError, match="before"):
        plan.apply(second)
    assert not second.any()


def test_wiped_masks_are_of_no_use() -> None:
    plan = MaskPlan([Mask(bytes(32))])
    plan.wipe()
    with pytest.raises(RefusedError):
        plan.apply(np.zeros(4, np.uint16))


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, np.int16),
        np.zeros(4, np.float32),
        np.zeros((2, 2), np.uint16),
        np.zeros(8, np.uint16)[::2],
    ],
)
def test_what_is_no_row_of_unsigned_integers_is_not_masked(vector: MaskedVector) -> None:
    with pytest.raises(ValueError, match="cannot mask"):
        apply_mask(vector, Mask(bytes(32)))


def test_no_secret_shows_in_a_log() -> None:
    mask = Mask(b"secret" * 5 + b"se")
    plan = UnmaskPlan(ROSTER, ("a",), {"a": mask.key}, {"b": mask.key}, {"b": {"a": mask.key}})
    assert "secret" not in repr(mask) + repr(plan)


def test_a_sum_takes_vectors_of_one_shape_and_type_only() -> None:
    running = MaskedSum(3, 16)
    with pytest.raises(ValueError, match="cannot be added"):
        running.add(np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="cannot be added"):
        running.add(np.zeros(3, np.uint32))
    with pytest.raises(ValueError, match="modulus_bits"):
        MaskedSum(3, 64)
