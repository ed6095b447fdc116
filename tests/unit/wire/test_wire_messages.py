"""federation.wire.messages: foreign bytes are a message within its bounds, or a PeerError."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from federation.errors import PeerError, Rejection
from federation.wire import messages, predictions
from federation.wire.fields import Wire
from federation.wire.messages import ObjectRef, decode_json, decode_msgpack, encode_json, encode_msgpack
from federation.wire.signing import Envelope

KINDS = [*Wire.__subclasses__(), messages.Plan, messages.AgentMessage]
RUN, HASH = "0" * 16, "0" * 64
METRICS: dict[str, Any] = {"loss": 1.0, "accuracy": 0.5, "steps": 1, "train_s": 1.0}
REF: dict[str, Any] = {"sha256": HASH, "length": 100, "chunk_bytes": 64, "digests": bytes(32)}
TASK: dict[str, Any] = {
    "model": "cnn",
    "labels": ["0", "1"],
    "channels": 1,
    "height": 8,
    "width": 8,
    "mean": [0.5],
    "std": [0.5],
}
OTHER_HASH = "1" * 64
PLAN: dict[str, Any] = {
    "run": RUN,
    "round": 1,
    "attempt": 1,
    "task": TASK,
    "train": {},
    "base": HASH,
    "full": {"version": HASH, "object": REF},
    "deltas": [],
    "up_encoding": "sq:16",
    "max_noise": 0.0,
    "cohort": ["pi1"],
    "deadline_s": 60.0,
    "issued_at": 0.0,
    "upload_chunk_bytes": 1024,
}
OFFER: dict[str, Any] = {
    "run": RUN,
    "round": 1,
    "base": HASH,
    "object": REF,
    "encoding": "float32",
    "samples": 1,
    "metrics": METRICS,
}


def step(base: str) -> dict[str, Any]:
    """A delta from this version."""
    return {"base": base, "object": REF, "encoding": "int8"}


def test_every_struct_is_tried() -> None:
    assert {Envelope, messages.UpdateOffer, messages.Telemetry, predictions.ModelState, ObjectRef} <= set(
        KINDS
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_arbitrary_bytes_raise_nothing_but_peer_error(kind: Any) -> None:
    @given(st.binary(max_size=200))
    @example(b"\x81" * 5000)
    @example(b"[" * 5000)
    @example(b"\xdd\xff\xff\xff\xff")
    @example(b"\xc6\xff\xff\xff\xff")
    @example(b'{"state":"\\ud800"}')
    def check(data: bytes) -> None:
        for decode in (decode_msgpack, decode_json):
            try:
                decode(data, kind)
            except PeerError as error:
                refused = error.code
                if refused is not Rejection.MALFORMED or len(error.detail) > 300:
                    raise

    check()


nested = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(OFFER)), value=nested)
def test_a_wrong_field_is_malformed_or_within_its_bounds(field: str, value: object) -> None:
    data = msgspec.msgpack.encode({"type": "offer", **OFFER, field: value})
    try:
        offer = decode_msgpack(data, messages.UpdateOffer)
    except PeerError:
        return
    assert 1 <= offer.round <= 1_000_000
    assert 1 <= offer.samples <= 2**40
    assert 0 < len(offer.encoding) <= 64


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (messages.UpdateOffer, OFFER, {"round": 0}),
        (messages.UpdateOffer, OFFER, {"round": 1_000_001}),
        (messages.UpdateOffer, OFFER, {"samples": 0}),
        (messages.UpdateOffer, OFFER, {"samples": 2**40 + 1}),
        (messages.UpdateOffer, OFFER, {"run": "0" * 15}),
        (messages.UpdateOffer, OFFER, {"run": "0" * 16 + "\n"}),
        (messages.UpdateOffer, OFFER, {"base": "../../etc/passwd"}),
        (messages.UpdateOffer, OFFER, {"extra": 1}),
        (messages.TrainMetrics, METRICS, {"loss": math.nan}),
        (messages.TrainMetrics, METRICS, {"loss": math.inf}),
        (messages.TrainMetrics, METRICS, {"accuracy": 1.5}),
        (messages.TrainMetrics, METRICS, {"train_s": -1.0}),
        (ObjectRef, REF, {"length": 0}),
        (ObjectRef, REF, {"length": 2**40}),
        (ObjectRef, REF, {"length": 129}),
        (ObjectRef, REF, {"chunk_bytes": 63}),
        (ObjectRef, REF, {"chunk_bytes": messages.MAX_CHUNK_BYTES + 1}),
        (ObjectRef, REF, {"digests": bytes(31)}),
        (ObjectRef, REF, {"sha256": HASH.upper() + "A"}),
        (messages.RoundPlan, PLAN, {"deltas": [step(HASH)]}),
        (messages.RoundPlan, PLAN, {"deltas": [step(OTHER_HASH), step("2" * 64), step(OTHER_HASH)]}),
        (messages.RoundPlan, PLAN, {"full": {"version": OTHER_HASH, "object": REF}}),
        (
            messages.RoundPlan,
            PLAN,
            {"full": {"version": OTHER_HASH, "object": REF}, "deltas": [step("2" * 64)]},
        ),
        (
            messages.RoundPlan,
            PLAN,
            {"deltas": [step(f"{number + 1:064x}") for number in range(messages.MAX_DELTAS + 1)]},
        ),
        (messages.RoundPlan, PLAN, {"full": {"version": HASH, "object": REF, "seed": -1}}),
        (messages.RoundPlan, PLAN, {"max_noise": -0.1}),
        (messages.RoundPlan, PLAN, {"max_noise": math.nan}),
        (messages.RoundPlan, PLAN, {"max_noise": math.inf}),
        (messages.RoundPlan, PLAN, {"base": "../../../etc/passwd"}),
        (messages.TaskSpec, TASK, {"mean": [0.5, 0.5]}),
        (messages.TaskSpec, TASK, {"labels": ["0", "0"]}),
        (messages.TaskSpec, TASK, {"std": [0.0]}),
        (messages.Credit, {"sha256": HASH, "chunks": [0]}, {"chunks": []}),
        (messages.Credit, {"sha256": HASH, "chunks": [0]}, {"chunks": [messages.MAX_CHUNKS]}),
        (messages.Credit, {"sha256": HASH, "chunks": [0]}, {"chunks": [0] * (messages.MAX_CREDIT + 1)}),
        (messages.Decline, {"run": RUN, "round": 1, "reason": ""}, {"reason": "x" * 1001}),
    ],
)
def test_bounds(kind: type[Wire], good: dict[str, Any], bad: dict[str, Any]) -> None:
    tag = {"type": kind.__struct_config__.tag} if kind.__struct_config__.tag else {}
    message = decode_msgpack(msgspec.msgpack.encode(tag | good), kind)
    assert decode_msgpack(encode_msgpack(message), kind) == message
    with pytest.raises(PeerError) as refused:
        decode_msgpack(msgspec.msgpack.encode(tag | good | bad), kind)
    assert refused.value.code is Rejection.MALFORMED


@pytest.mark.parametrize("full", [HASH, OTHER_HASH, "2" * 64], ids=["base", "first", "between"])
def test_a_plan_may_offer_a_full_model_of_any_version_that_leads_to_its_base(full: str) -> None:
    offered = {
        "full": {"version": full, "object": REF, "seed": 7},
        "deltas": [step(OTHER_HASH), step("2" * 64)],
    }
    plan = decode_msgpack(msgspec.msgpack.encode({"type": "round", **PLAN, **offered}), messages.RoundPlan)
    assert plan.full.version == full
    assert [delta.base for delta in plan.deltas] == [OTHER_HASH, "2" * 64]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"deltas": [step(HASH)]}, "in a circle"),
        ({"full": {"version": OTHER_HASH, "object": REF}}, "nothing leads from the full model 111111111111"),
    ],
    ids=["circle", "nowhere"],
)
def test_a_plan_that_leads_nowhere_says_so(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(PeerError, match=why):
        decode_msgpack(msgspec.msgpack.encode({"type": "round", **PLAN, **bad}), messages.RoundPlan)


def test_json_round_trip() -> None:
    state = messages.AgentState(state="offline", session=RUN)
    assert decode_json(encode_json(state), messages.AgentState) == state


def test_chunks_are_the_ceiling() -> None:
    for length, chunks in ((64, 1), (65, 2), (128, 2), (129, 3)):
        ref = ObjectRef(sha256=HASH, length=length, chunk_bytes=64, digests=bytes(16 * chunks))
        assert ref.chunks == chunks
