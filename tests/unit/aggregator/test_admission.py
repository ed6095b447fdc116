"""aggregator.admission: every refusal at the door, with its code."""

from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.admission import (
    LARGEST_NORM,
    Limits,
    OpenRound,
    check_offer,
    check_round,
    check_update,
    open_message,
)
from aggregator.config import RoundsConfig
from federation.errors import PeerError, Rejection
from federation.wire.codec import MAX_MAGNITUDE, encode, max_encoded_bytes
from federation.wire.fields import Wire
from federation.wire.messages import Decline, Receipt, TrainMetrics, UpdateOffer
from federation.wire.signing import Purpose, seal
from federation.wire.transfer import make_ref

KEYS = {"pi1": Ed25519PrivateKey.generate(), "pi2": Ed25519PrivateKey.generate()}
RUN, BASE = "0" * 16, "b" * 64
SCHEMA = {"w": (8, 8), "b": (3,)}
DELTA = {name: np.full(shape, 0.5, np.float32) for name, shape in SCHEMA.items()}
RNG = np.random.default_rng(0)
DATA = encode(dict(sorted(DELTA.items())), "float32", RNG)
LIMITS = Limits(max_samples=1000)
STATE = OpenRound(
    run=RUN,
    round=5,
    open=True,
    base=BASE,
    cohort=frozenset({"pi1", "pi2"}),
    encoding="float32",
    upload_chunk_bytes=128,
    schema=SCHEMA,
)
OFFER = UpdateOffer(
    run=RUN,
    round=5,
    base=BASE,
    object=make_ref(DATA, 128),
    encoding="float32",
    samples=10,
    metrics=TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=1.0),
)


def code(call: Any, *arguments: Any, **named: Any) -> Rejection:
    with pytest.raises(PeerError) as refused:
        call(*arguments, **named)
    return refused.value.code


def changed(**fields: Any) -> UpdateOffer:
    return msgspec.structs.replace(OFFER, **fields)


def state(**fields: Any) -> OpenRound:
    return OpenRound(**{name: getattr(STATE, name) for name in OpenRound.__slots__} | fields)


def sealed(
    message: Wire,
    key: str = "pi1",
    sender: str = "pi1",
    federation: str = "home",
    purpose: Purpose = Purpose.AGENT,
) -> bytes:
    return seal(message, purpose=purpose, federation=federation, sender=sender, key=KEYS[key])


def opened(data: bytes, agent: str = "pi1") -> UpdateOffer | Decline:
    def key_of(name: str) -> Any:
        return KEYS[name].public_key() if name in KEYS else None

    return open_message(data, agent=agent, federation="home", key_of=key_of)


def test_an_offer_and_a_decline_of_an_enrolled_agent_are_opened() -> None:
    decline = Decline(run=RUN, round=5, reason="")
    assert opened(sealed(OFFER)) == OFFER
    assert opened(sealed(decline)) == decline


@pytest.mark.parametrize(
    ("data", "agent", "expected"),
    [
        (sealed(OFFER), "stranger", Rejection.UNKNOWN_AGENT),
        (sealed(OFFER), "pi2", Rejection.WRONG_SENDER),
        (sealed(OFFER, key="pi2"), "pi1", Rejection.BAD_SIGNATURE),
        (sealed(OFFER, purpose=Purpose.RECEIPT), "pi1", Rejection.BAD_SIGNATURE),
        (sealed(OFFER, federation="away"), "pi1", Rejection.WRONG_FEDERATION),
        (sealed(OFFER)[:-1], "pi1", Rejection.MALFORMED),
        (sealed(Receipt(run=RUN, round=1, sha256=BASE, accepted=True)), "pi1", Rejection.MALFORMED),
        (b"", "pi1", Rejection.MALFORMED),
    ],
)
def test_who_has_not_signed_is_not_heard(data: bytes, agent: str, expected: Rejection) -> None:
    assert code(opened, data, agent) is expected


@pytest.mark.parametrize(
    ("offer", "agent", "round_", "expected"),
    [
        (changed(run="1" * 16), "pi1", STATE, Rejection.WRONG_RUN),
        (changed(round=4), "pi1", STATE, Rejection.STALE_ROUND),
        (changed(round=6), "pi1", STATE, Rejection.FUTURE_ROUND),
        (OFFER, "pi1", state(open=False), Rejection.LATE),
        (OFFER, "pi3", STATE, Rejection.NOT_IN_COHORT),
    ],
)
def test_a_message_about_another_round_is_refused(
    offer: UpdateOffer, agent: str, round_: OpenRound, expected: Rejection
) -> None:
    assert code(check_round, offer, agent, round_) is expected
    assert code(check_offer, offer, agent, round_, LIMITS) is expected
    decline = Decline(run=offer.run, round=offer.round, reason="")
    assert code(check_round, decline, agent, round_) is expected


@pytest.mark.parametrize(
    ("offer", "expected"),
    [
        (changed(base="c" * 64), Rejection.WRONG_BASE),
        (changed(encoding="int8"), Rejection.WRONG_ENCODING),
        (changed(encoding="\x1b[31m"), Rejection.WRONG_ENCODING),
        (
            changed(object=make_ref(bytes(max_encoded_bytes(SCHEMA, "float32") + 1), 128)),
            Rejection.WRONG_LENGTH,
        ),
        (changed(object=make_ref(DATA, 129)), Rejection.WRONG_LENGTH),
        (changed(samples=1001), Rejection.BAD_SAMPLE_COUNT),
    ],
)
def test_an_offer_that_cannot_count_is_refused_before_it_is_sent(
    offer: UpdateOffer, expected: Rejection
) -> None:
    assert code(check_offer, offer, "pi1", STATE, LIMITS) is expected


def test_a_good_offer_passes_at_its_limits() -> None:
    assert check_offer(changed(samples=1000), "pi1", STATE, LIMITS) is False
    longest = make_ref(bytes(max_encoded_bytes(SCHEMA, "float32")), 128)
    assert check_offer(changed(object=longest), "pi1", STATE, LIMITS) is False


@pytest.mark.parametrize("still_open", [True, False])
def test_the_accepted_update_again_gets_its_receipt_again_also_after_the_close(still_open: bool) -> None:
    accepted = state(accepted={"pi1": OFFER.object.sha256}, open=still_open)
    assert check_offer(OFFER, "pi1", accepted, LIMITS) is True
    other = changed(object=make_ref(b"another", 128))
    expected = Rejection.DUPLICATE if still_open else Rejection.LATE
    assert code(check_offer, other, "pi1", accepted, LIMITS) is expected
    assert code(check_offer, changed(round=4), "pi1", accepted, LIMITS) is Rejection.STALE_ROUND


def test_somebody_elses_accepted_update_is_no_excuse() -> None:
    accepted = state(accepted={"pi2": OFFER.object.sha256})
    assert check_offer(OFFER, "pi1", accepted, LIMITS) is False


def test_a_good_update_is_decoded() -> None:
    for name, array in check_update(DATA, SCHEMA, "float32", LIMITS).items():
        np.testing.assert_array_equal(array, DELTA[name])


def poisoned(value: float) -> bytes:
    delta = {name: array.copy() for name, array in sorted(DELTA.items())}
    clean = encode(delta, "float32", RNG)
    marker = np.float32(0.5).tobytes()
    at = clean.rindex(marker)
    return clean[:at] + np.float32(value).tobytes() + clean[at + len(marker) :]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (poisoned(np.nan), Rejection.NON_FINITE),
        (poisoned(np.inf), Rejection.NON_FINITE),
        (encode({"b": DELTA["b"]}, "float32", RNG), Rejection.MISSING_TENSOR),
        (
            encode(dict(sorted((DELTA | {"x": np.ones(2, np.float32)}).items())), "float32", RNG),
            Rejection.EXTRA_TENSOR,
        ),
        (encode({"b": np.ones(4, np.float32), "w": DELTA["w"]}, "float32", RNG), Rejection.WRONG_SHAPE),
        (encode({"b": DELTA["b"], "w": DELTA["w"].reshape(4, 16)}, "float32", RNG), Rejection.WRONG_SHAPE),
        (DATA[:-1], Rejection.WRONG_LENGTH),
        (DATA + b"\0", Rejection.WRONG_LENGTH),
        (encode(dict(sorted(DELTA.items())), "float16", RNG), Rejection.WRONG_ENCODING),
        (b"\xff" * len(DATA), Rejection.MALFORMED),
    ],
)
def test_an_update_that_is_not_the_model_is_refused(data: bytes, expected: Rejection) -> None:
    assert code(check_update, data, SCHEMA, "float32", LIMITS) is expected


def test_the_norm_is_bounded_when_asked() -> None:
    norm = float(np.sqrt(0.25 * (64 + 3)))
    assert check_update(DATA, SCHEMA, "float32", Limits(1000, norm * 1.001))
    assert code(check_update, DATA, SCHEMA, "float32", Limits(1000, norm * 0.999)) is Rejection.NORM_TOO_LARGE


def test_a_norm_that_overflows_float32_is_too_large() -> None:
    huge = {name: np.full(shape, 9e29, np.float32) for name, shape in sorted(SCHEMA.items())}
    data = encode(huge, "float32", RNG)
    assert code(check_update, data, SCHEMA, "float32", Limits(1000, 1e12)) is Rejection.NORM_TOO_LARGE


@pytest.mark.parametrize("value", [2.0**61, 9e29, 3e38])
def test_an_update_whose_average_could_not_be_encoded_is_refused_without_any_setting(value: float) -> None:
    assert code(check_update, poisoned(value), SCHEMA, "float32", Limits(1000)) is Rejection.NORM_TOO_LARGE
    assert check_update(poisoned(2.0**59), SCHEMA, "float32", Limits(1000))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"server_learning_rate": MAX_MAGNITUDE / LARGEST_NORM}, RoundsConfig)
