"""edge_agent.outbox: an update is there whole and signed, or not at all."""

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import structs

from edge_agent.outbox import Outbox
from federation.errors import ConfigError, VerificationError
from federation.wire.codec import decode
from federation.wire.messages import FullModel, RoundPlan, TaskSpec, TrainMetrics, TrainSpec, UpdateOffer
from federation.wire.signing import Purpose, unseal
from federation.wire.transfer import make_ref

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
VERSION = "1" * 64
PLAN = RoundPlan(
    run="0" * 16,
    round=2,
    attempt=1,
    task=TASK,
    train=TrainSpec(),
    base=VERSION,
    full=FullModel(version=VERSION, object=make_ref(b"model" * 30, 64)),
    deltas=(),
    up_encoding="float32",
    max_noise=0.0,
    cohort=("pi1",),
    deadline_s=60,
    issued_at=0,
    upload_chunk_bytes=64,
)
DELTA = {"b": np.arange(20, dtype=np.float32), "a": np.ones((3, 4), np.float32)}


def outbox(
    folder: Path, *, federation: str = "home", agent: str = "pi1", key: Ed25519PrivateKey = KEY
) -> Outbox:
    return Outbox(folder, federation=federation, agent=agent, key=key)


def put(
    box: Outbox,
    delta: dict[str, np.ndarray] = DELTA,
    *,
    plan: RoundPlan = PLAN,
    base: dict[str, np.ndarray] | None = None,
) -> UpdateOffer:
    return box.put(
        plan,
        delta if base is None else base,
        delta,
        samples=7,
        metrics=TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=1.0),
        rng=np.random.default_rng(0),
        chunk_bytes=64,
    )


def test_an_update_is_there_for_the_next_process(tmp_path: Path) -> None:
    offer = put(outbox(tmp_path))
    box = outbox(tmp_path)
    assert box.pending() == offer
    assert (offer.run, offer.round, offer.base, offer.samples) == (PLAN.run, 2, VERSION, 7)
    data = b"".join(box.chunk(offer, index) for index in range(offer.object.chunks))
    decoded = decode(data, {name: array.shape for name, array in DELTA.items()}, "float32")
    for name, array in DELTA.items():
        np.testing.assert_array_equal(decoded[name], array)
    signed = unseal(
        box.sealed_offer(),
        UpdateOffer,
        purpose=Purpose.AGENT,
        federation="home",
        sender="pi1",
        key=KEY.public_key(),
    )
    assert signed == offer


def test_a_new_update_takes_the_place_of_the_former(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    first, second = put(box), put(box, {"a": np.zeros(5, np.float32)})
    assert first != second == box.pending()


def test_a_cleared_outbox_is_empty(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    put(box)
    box.clear()
    box.clear()
    assert box.pending() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_damaged_offer_is_dropped_with_its_update(tmp_path: Path, position: int) -> None:
    put(outbox(tmp_path))
    damaged = bytearray((tmp_path / "offer").read_bytes())
    damaged[position] ^= 1
    (tmp_path / "offer").write_bytes(damaged)
    assert outbox(tmp_path).pending() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [{"key": Ed25519PrivateKey.from_private_bytes(bytes(32))}, {"agent": "pi2"}, {"federation": "away"}],
    ids=["key", "agent", "federation"],
)
def test_an_update_of_an_earlier_identity_is_dropped(tmp_path: Path, other: dict[str, object]) -> None:
    put(outbox(tmp_path))
    assert outbox(tmp_path, **other).pending() is None  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_power_loss_before_the_offer_is_written_leaves_nothing_to_deliver(tmp_path: Path) -> None:
    put(outbox(tmp_path))
    (tmp_path / "offer").unlink()
    (tmp_path / ".offer.abc").write_bytes(b"half")
    assert outbox(tmp_path).pending() is None
    assert not (tmp_path / ".offer.abc").exists(), "each would stay for ever"


def test_a_chunk_that_the_disk_has_damaged_is_not_sent_again(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    offer = put(box)
    data = bytearray((tmp_path / "update").read_bytes())
    data[70] ^= 1
    (tmp_path / "update").write_bytes(data)
    assert len(box.chunk(offer, 0)) == 64
    box.chunk(offer, 1)
    assert len(box.chunk(offer, 0)) == 64
    with pytest.raises(VerificationError):
        box.chunk(offer, 1)
    (tmp_path / "update").unlink()
    with pytest.raises(ConfigError, match="update"):
        box.chunk(offer, 0)


def test_a_diverged_update_is_not_written(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    with pytest.raises(ConfigError, match="diverged"):
        put(box, {"a": np.full(3, np.nan, np.float32)})
    assert box.pending() is None


def test_the_plan_bounds_the_noise_by_the_weights_that_the_round_starts_from(tmp_path: Path) -> None:
    delta = {"weight": np.random.default_rng(1).standard_normal((100, 100), dtype=np.float32)}
    plan = structs.replace(PLAN, up_encoding="sq:16", max_noise=0.06)

    def noise(plan: RoundPlan, weight: float) -> float:
        """What is added to the update, as a share of its own power."""
        box = outbox(tmp_path)
        offer = put(box, delta, plan=plan, base={"weight": np.full((100, 100), weight, np.float32)})
        data = b"".join(box.chunk(offer, index) for index in range(offer.object.chunks))
        decoded = decode(data, {"weight": (100, 100)}, "sq:16")["weight"]
        return float(np.square(decoded - delta["weight"]).mean())

    assert noise(plan, 0.0) < 0.07
    assert 0.07 < noise(plan, 3.0) < 0.06 * 3.0**2 * 1.1
    unbounded = structs.replace(plan, max_noise=0.0)
    assert noise(plan, 1e6) == noise(unbounded, 0.0) > 5
