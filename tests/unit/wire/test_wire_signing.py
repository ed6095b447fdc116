"""federation.wire.signing: nothing counts that was signed by another key, for another purpose, place or sender."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ConfigError, PeerError, Rejection
from federation.wire.messages import Decline, Receipt, decode_msgpack, encode_msgpack
from federation.wire.signing import (
    Envelope,
    Purpose,
    load_private_key,
    private_key,
    private_key_bytes,
    public_key,
    public_key_hex,
    seal,
    signed_bytes,
    unseal,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
DECLINE = Decline(run="0" * 16, round=3, reason="no data")


def sealed(
    *,
    purpose: Purpose = Purpose.AGENT,
    federation: str = "home",
    sender: str = "pi1",
    key: Ed25519PrivateKey = KEY,
) -> bytes:
    return seal(DECLINE, purpose=purpose, federation=federation, sender=sender, key=key)


def opened(data: bytes) -> Decline:
    return unseal(data, Decline, purpose=Purpose.AGENT, federation="home", sender="pi1", key=KEY.public_key())


def refusal(data: bytes) -> Rejection:
    with pytest.raises(PeerError) as refused:
        opened(data)
    return refused.value.code


def test_what_was_sealed_is_opened() -> None:
    assert opened(sealed()) == DECLINE


def test_each_wrong_circumstance_is_refused() -> None:
    assert refusal(sealed(key=STRANGER)) is Rejection.BAD_SIGNATURE
    assert refusal(sealed(purpose=Purpose.PLAN)) is Rejection.BAD_SIGNATURE
    assert refusal(sealed(federation="away")) is Rejection.WRONG_FEDERATION
    assert refusal(sealed(sender="pi2")) is Rejection.WRONG_SENDER


@pytest.mark.parametrize(
    "claim",
    [{"purpose": Purpose.AGENT}, {"federation": "home"}, {"sender": "pi1"}],
    ids=lambda claim: next(iter(claim)),
)
def test_an_envelope_that_claims_what_was_not_signed_is_refused(claim: dict[str, str]) -> None:
    other = {"purpose": Purpose.RECEIPT, "federation": "away", "sender": "pi2"}
    (field,) = claim
    honest = decode_msgpack(sealed(**{field: other[field]}), Envelope)  # type: ignore[arg-type]
    forged = Envelope(
        purpose=Purpose.AGENT,
        federation="home",
        sender="pi1",
        body=honest.body,
        signature=honest.signature,
    )
    assert refusal(encode_msgpack(forged)) is Rejection.BAD_SIGNATURE


def test_another_kind_of_message_in_a_good_envelope_is_malformed() -> None:
    receipt = Receipt(run="0" * 16, round=1, sha256="0" * 64, accepted=True)
    data = seal(receipt, purpose=Purpose.AGENT, federation="home", sender="pi1", key=KEY)
    assert refusal(data) is Rejection.MALFORMED


def test_every_flipped_bit_is_refused() -> None:
    data = sealed()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refusal(bytes(damaged))


def test_every_truncation_and_any_trailing_byte_is_refused() -> None:
    data = sealed()
    for length in range(len(data)):
        assert refusal(data[:length]) is Rejection.MALFORMED
    assert refusal(data + b"\0") is Rejection.MALFORMED


parts = st.text("ab", max_size=4)


@given(
    first=st.tuples(parts, parts, parts, st.binary(max_size=6)),
    second=st.tuples(parts, parts, parts, st.binary(max_size=6)),
)
def test_what_is_signed_is_injective(
    first: tuple[str, str, str, bytes], second: tuple[str, str, str, bytes]
) -> None:
    assert (signed_bytes(*first) == signed_bytes(*second)) == (first == second)


@given(text=st.text("ab", max_size=5), cut=st.integers(0, 5), other=st.integers(0, 5))
def test_moving_a_border_between_fields_changes_what_is_signed(text: str, cut: int, other: int) -> None:
    one, two = (signed_bytes("p", text[:at], text[at:], b"") for at in (cut, other))
    assert (one == two) == (text[:cut] == text[:other])


def test_keys_survive_hex(tmp_path: Path) -> None:
    again = private_key(private_key_bytes(KEY).hex())
    assert public_key_hex(again) == public_key_hex(KEY) == public_key_hex(public_key(public_key_hex(KEY)))
    file = tmp_path / "key"
    file.write_text(private_key_bytes(KEY).hex() + "\n")
    assert public_key_hex(load_private_key(file)) == public_key_hex(KEY)


@pytest.mark.parametrize("text", ["", "zz", "ab" * 31, "ab" * 33])
def test_a_broken_key_is_refused_and_a_secret_one_is_not_shown(text: str) -> None:
    with pytest.raises(ConfigError):
        public_key(text)
    with pytest.raises(ConfigError) as refused:
        private_key(text or "0")
    assert not text or text not in str(refused.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-here"):
        load_private_key(tmp_path / "nothing-here")
