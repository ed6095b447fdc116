"""A federation in memory whose updates are masked, and what its devices have put into the sum."""

import threading
from collections.abc import Callable
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from memory_federation import Federation, base_arrays
from numpy.typing import NDArray

from aggregator.privacy_config import PrivacyConfig, SecAggConfig
from edge_agent import masking
from federation.wire.codec import schema_of
from federation.wire.inbox import Limits
from federation.wire.masking import scale_of
from federation.wire.messages import RoundPlan
from federation.wire.shared_scale import SharedScale
from federation.wire.signing import Envelope
from privacy.secagg.masks import MaskPlan

WIDE = Limits(max_packet_bytes=16 * 1024)
"""A roster of ten fits."""

Integers = NDArray[np.unsignedinteger]


class Recorder:
    """Sees what devices mask, before and after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain: dict[str, Integers] = {}
        """By the SHA-256 of the masked update: its integers."""
        self.plans: dict[tuple[int, int], RoundPlan] = {}
        here, original, reduced = threading.local(), masking.mask_update, SharedScale.reduced

        def seen(scale: SharedScale, integers: NDArray[np.int32]) -> Integers:
            here.vector = reduced(scale, integers)
            vector: Integers = here.vector.copy()
            return vector

        def mask(plan: RoundPlan, delta: dict[str, NDArray[np.float32]], masks: MaskPlan) -> bytes:
            data = original(plan, delta, masks)
            self.plain[sha256(data).hexdigest()] = here.vector
            self.plans[plan.round, plan.attempt] = plan
            return data

        monkeypatch.setattr(SharedScale, "reduced", seen)
        monkeypatch.setattr(masking, "mask_update", mask)


def kind_of(topic: str, payload: bytes) -> str:
    """What a message of an agent's branch is: ``keys``, ``shares``, ``offer``, ``agreement``, ``reveal``...; else empty."""
    if not topic.endswith(("/up/secagg", "/up/offer", "/down/secagg", "/down/receipt")):
        return ""
    body = msgspec.msgpack.decode(msgspec.msgpack.decode(payload, type=Envelope).body)
    return str(body["type"])


def vanish(fleet: Federation, agents: list[str], when: str) -> Callable[[], None]:
    """Cut the link of each of these agents in the moment when it sends such a message, which is lost.

    Returns:
        Brings them back, and lets them stay.
    """
    route = fleet.broker.route

    def watch(client_id: str, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        for agent in agents:
            if f"/agent/{agent}/up/" in topic and kind_of(topic, payload) == when:
                for link in fleet.broker.links_of(agent):
                    fleet.broker.cut(link)
                return
        route(client_id, topic, payload, qos=qos, retain=retain)

    def come_back() -> None:
        fleet.broker.route = route  # type: ignore[method-assign]
        for link in fleet.broker.links:
            if not link.connected:
                fleet.broker.restore(link)

    fleet.broker.route = watch  # type: ignore[method-assign]
    return come_back


def at_message(
    fleet: Federation, when: str, count: int, act: Callable[[], None], *, of: str = ""
) -> threading.Event:
    """Do something in the moment of the so-many-th message of a kind (of that agent), which is lost.

    Returns:
        Set when it was done.
    """
    route, done, left = fleet.broker.route, threading.Event(), count

    def watch(client_id: str, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        nonlocal left
        if f"/agent/{of}" in topic and "/up/" in topic and kind_of(topic, payload) == when:
            left -= 1
            if not left:
                act()
                done.set()
                return
        route(client_id, topic, payload, qos=qos, retain=retain)

    fleet.broker.route = watch  # type: ignore[method-assign]
    return done


def masked(fleet: Federation, **secagg: object) -> Federation:
    """Switch secure aggregation on."""
    settings = {"enabled": True, "min_agents": 2, "phase_s": 30.0} | secagg
    privacy = PrivacyConfig(secagg=SecAggConfig(**settings))  # type: ignore[arg-type]
    fleet.config = msgspec.structs.replace(fleet.config, privacy=privacy)
    fleet.broker.limits = WIDE
    return fleet


def expected_model(
    base: dict[str, NDArray[np.float32]], recorder: Recorder, plan: RoundPlan, digests: list[str]
) -> dict[str, NDArray[np.float32]]:
    """Base plus the mean of the plain sum of these updates' integers."""
    terms = plan.privacy.secagg
    assert terms is not None
    scale = scale_of(plan, schema_of(base))
    total = np.zeros(scale.size, scale.dtype)
    for digest in digests:
        total += recorder.plain[digest]
    mean = scale.mean(total, terms.rotation_seed, len(digests))
    return {name: (base[name] + mean[name].astype(np.float64)).astype(np.float32) for name in base}


def check_sums(fleet: Federation, recorder: Recorder, agents: dict[int, list[str]]) -> None:
    """Every round's model is the one before plus the mean of exactly these agents' integers, to the bit."""
    model = base_arrays()
    with fleet.store() as store:
        rows = {row.round: row for row in store.rounds()}
        for number, names in agents.items():
            updates = store.updates(number)
            assert sorted(updates) == names
            plan = recorder.plans[number, rows[number].attempt]
            model = expected_model(model, recorder, plan, [update.sha256 for update in updates.values()])
            for name, array in fleet.model(number).items():
                np.testing.assert_array_equal(array, model[name])
            assert rows[number].phase == "closed"
