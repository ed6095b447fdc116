"""One sample of everything that crosses the wire, from which the committed vectors are made."""

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from federation.errors import Rejection, ReleaseFault
from federation.wire import codec, fields, masking, messages, predictions, release, signing, terms, transfer

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RUN = "0123456789abcdef"
SESSION = "fedcba9876543210"

BASE = transfer.make_ref(bytes(range(256)) * 2, 200)
DELTA = transfer.make_ref(b"delta" * 20, 64)
EARLIER, VERSION = "1" * 64, "2" * 64
UPDATE = transfer.make_ref(b"update" * 20, 64)

TASK = messages.TaskSpec(
    model="cnn", labels=("0", "1"), channels=1, height=28, width=28, mean=(0.1307,), std=(0.3081,)
)
OFFER = messages.UpdateOffer(
    run=RUN,
    round=3,
    base=VERSION,
    object=UPDATE,
    encoding="sq:16",
    samples=600,
    metrics=messages.TrainMetrics(loss=0.25, accuracy=0.9375, steps=19, train_s=1.5),
)
TERMS = terms.PrivacyTerms(
    sample=terms.SampleTerms(clip_norm=1.0, delta=1e-5, rounds=10, epsilon=3.0),
    client=terms.ClientTerms(clip_norm=0.5, noise_multiplier=1.5, epsilon=8.0, delta=1e-5, sampling_rate=0.5),
    secagg=terms.SecAggTerms(
        clip_norm=10.0,
        modulus_bits=16,
        min_agents=3,
        dropouts=0.25,
        rotation_seed=bytes(range(16)),
        noise_multiplier=1.0,
        epsilon=8.0,
        delta=1e-5,
    ),
)
SPENT = terms.Spent(
    epsilon=1.5,
    round_epsilon=0.5,
    delta=1e-5,
    noise_multiplier=1.1,
    clip_norm=1.0,
    steps=47,
    entry=3,
    head="3" * 64,
)

PLAN = messages.RoundPlan(
    run=RUN,
    round=3,
    attempt=1,
    task=TASK,
    train=messages.TrainSpec(),
    base=VERSION,
    full=messages.FullModel(version=EARLIER, object=BASE, seed=7),
    deltas=(messages.ModelDelta(base=EARLIER, object=DELTA, encoding="sq:4"),),
    up_encoding="sq:16",
    max_noise=0.06,
    cohort=("pi1", "pi2"),
    deadline_s=600.0,
    issued_at=1750000000.0,
    upload_chunk_bytes=98304,
)

KEYS = masking.MaskingKeys(
    run=RUN,
    round=3,
    attempt=2,
    base=VERSION,
    mask=bytes(32),
    seal=bytes(range(32)),
    seed_commitment=b"c" * 32,
)
AGREEMENT = masking.Agreement(run=RUN, round=3, attempt=2, digest=b"d" * 32)


def signed(message: fields.Wire, purpose: signing.Purpose) -> bytes:
    """As device pi1 signs it."""
    return signing.seal(message, purpose=purpose, federation="home", sender="pi1", key=KEY)


IDENTITY = KEY.public_key().public_bytes_raw()
MASKING: dict[str, fields.Wire] = {
    "masking_keys": KEYS,
    "masking_roster": masking.Roster(
        run=RUN,
        round=3,
        attempt=2,
        names=("pi1", "pi2"),
        members={"pi1": masking.Member(identity=IDENTITY, keys=signed(KEYS, signing.Purpose.MASKING_KEYS))},
    ),
    "masking_shares": masking.SealedShares(run=RUN, round=3, attempt=2, sealed={"pi2": b"s" * 82}),
    "masking_survivors": masking.Survivors(run=RUN, round=3, attempt=2, names=("pi1", "pi2")),
    "masking_agreement": AGREEMENT,
    "masking_agreements": masking.Agreements(
        run=RUN, round=3, attempt=2, signed={"pi1": signed(AGREEMENT, signing.Purpose.MASKING_AGREEMENT)}
    ),
    "masking_reveal": masking.Reveal(
        run=RUN, round=3, attempt=2, seeds={"pi1": b"b" * 33}, keys={"pi2": b"k" * 33}
    ),
}
"""Messages of secure aggregation, all of which travel in envelopes."""

RELEASE = release.Release(
    number=7,
    run=RUN,
    round=20,
    created_at=1750000000.0,
    format=release.ModelFormat.INT8,
    model=transfer.make_ref(b"model" * 40, 64),
    golden=transfer.make_ref(b"golden" * 20, 64),
    requirements=release.Requirements(opset=20, ir_version=10, min_runtime="1.18", card_format="2"),
    delta=release.ReleaseDelta(base="4" * 64, object=transfer.make_ref(b"xor" * 20, 64)),
    metrics=release.ReleaseMetrics(accuracy=0.9875, samples=10_000, drop_points=0.03125, loss=0.0625),
    privacy=release.ReleasePrivacy(epsilon=3.0, delta=1e-5, level="sample"),
    notes="more night pictures",
)
MANIFEST = release.Manifest(
    version=31,
    channel=release.Channel.CANARY,
    issued_at=1750000000.0,
    expires_at=1757776000.0,
    release=RELEASE,
    share=0.125,
    next_key=bytes(range(32, 64)),
)
ROLLOUT: dict[str, fields.Wire] = {
    "manifest": MANIFEST,
    "empty_manifest": msgspec.structs.replace(
        MANIFEST, channel=release.Channel.STABLE, release=None, share=1.0
    ),
    "release_confirmed": release.ReleaseReport(
        session=SESSION,
        number=7,
        sha256=RELEASE.model.sha256,
        manifest=31,
        state=release.RolloutState.CONFIRMED,
        time=1750000100.0,
        running=7,
        frames=600,
        p50_ms=2.5,
        p99_ms=4.0,
    ),
    "release_refused": release.ReleaseReport(
        session=SESSION,
        number=7,
        sha256=RELEASE.model.sha256,
        manifest=31,
        state=release.RolloutState.REFUSED,
        time=1750000100.0,
        fault=ReleaseFault.TOO_SLOW,
        detail="p99 130 ms, at most 100 ms",
        running=6,
    ),
}

MSGPACK: dict[str, fields.Wire] = {
    **ROLLOUT,
    **MASKING,
    "round_plan": PLAN,
    "private_plan": msgspec.structs.replace(PLAN, privacy=TERMS),
    "idle_plan": messages.IdlePlan(
        run=RUN, round=3, finished=False, reason="waiting", issued_at=1750000000.0
    ),
    "update_offer": OFFER,
    "private_offer": msgspec.structs.replace(
        OFFER,
        samples=1,
        metrics=messages.TrainMetrics(loss=None, accuracy=None, steps=47, train_s=1.5),
        attempt=2,
        spent=SPENT,
    ),
    "decline": messages.Decline(run=RUN, round=3, reason="no data"),
    "credit": messages.Credit(sha256=UPDATE.sha256, chunks=(0, 1)),
    "receipt_accepted": messages.Receipt(run=RUN, round=3, sha256=UPDATE.sha256, accepted=True),
    "receipt_refused": messages.Receipt(
        run=RUN,
        round=3,
        sha256=UPDATE.sha256,
        accepted=False,
        code=Rejection.NON_FINITE,
        detail="tensor 'fc1.weight'",
    ),
}
"""Messages that are sent as msgpack."""

JSON: dict[str, fields.Wire] = {
    "agent_birth": messages.AgentState(
        state="online",
        session=SESSION,
        capabilities=messages.Capabilities(
            version="0.1.0",
            device="cpu",
            threads=4,
            memory_mb=1848,
            samples=600,
            encodings=("float32", "float16", "int8"),
            platform="Linux-6.6-aarch64",
        ),
    ),
    "agent_death": messages.AgentState(state="offline", session=SESSION),
    "telemetry": messages.Telemetry(
        session=SESSION,
        phase="training",
        uptime_s=3600.0,
        cpu_percent=87.5,
        process_mb=412.0,
        available_mb=900.0,
        disk_free_mb=20000.0,
        temperature_c=61.5,
    ),
    "telemetry_of_a_transfer": messages.Telemetry(
        session=SESSION,
        phase="delivering",
        progress=0.75,
        uptime_s=3660.0,
        cpu_percent=12.5,
        process_mb=412.0,
        available_mb=900.0,
        disk_free_mb=20000.0,
        total=messages.Traffic(
            sent_bytes=900_000,
            received_bytes=2_500_000,
            sent_payload_bytes=880_000,
            received_payload_bytes=2_450_000,
        ),
        traffic=messages.RoundTraffic(
            run=RUN,
            round=2,
            moved=messages.Traffic(
                sent_bytes=190_000,
                received_bytes=750_000,
                sent_payload_bytes=188_000,
                received_payload_bytes=745_000,
            ),
        ),
    ),
    "aggregator_birth": messages.AggregatorState(state="online", session=SESSION, run=RUN, time=1750000000.0),
    "aggregator_death": messages.AggregatorState(state="offline", session=SESSION),
    "prediction": predictions.PredictionMessage(
        label="3",
        confidence=0.96875,
        top=(("3", 0.96875), ("8", 0.03125)),
        source="camera 0 #41",
        latency_ms=2.5,
        time=1750000000.0,
        release=7,
        frames=41,
        dropped=1,
    ),
    "model_state": predictions.ModelState(
        installed_version="6",
        latest_version="7",
        in_progress=True,
        title="fedge model of home",
        online=True,
        session=SESSION,
        state="testing",
    ),
}
"""Messages that are sent as JSON."""

TENSORS: dict[str, NDArray[np.float32]] = {
    "fc.weight": (np.arange(-126, 128, 11) / 256).astype(np.float32).reshape(4, 6),
    "fc.bias": np.array([1e-3, -2e-3], dtype=np.float32),
    "scale": np.array(0.75, dtype=np.float32),
    "none": np.zeros((0, 3), dtype=np.float32),
}
"""What the frames hold: values on the grid of int8, so that its rounding leaves nothing to chance, and tensors too
small for any encoding but float32."""


def vectors() -> dict[str, str]:
    """The wire bytes of every sample, in hex."""
    found = {f"msgpack/{name}": messages.encode_msgpack(message) for name, message in MSGPACK.items()}
    found |= {f"json/{name}": messages.encode_json(message) for name, message in JSON.items()}
    found["envelope/update_offer"] = signing.seal(
        OFFER, purpose=signing.Purpose.AGENT, federation="home", sender="pi1", key=KEY
    )
    for encoding in ("float32", "float16", "int8"):
        found[f"frame/{encoding}"] = codec.encode(TENSORS, encoding, np.random.default_rng())
    return {name: data.hex() for name, data in found.items()}


LOSSY = ("int4", "rotated1", "rotated2", "ternary:0.05", "sq:1", "sq:8", "topk:0.05")
"""Encodings whose bytes depend on random numbers and on how zlib cuts its blocks: their frames are read, not compared."""


def lossy_tensors() -> dict[str, NDArray[np.float32]]:
    """What the lossy frames hold: a matrix with long and short gaps and an outlier, a vector, a frozen layer."""
    matrix = (np.sin(np.arange(20 * 30) ** 2 / 7) ** 5 / 64).astype(np.float32).reshape(20, 30)
    matrix[3:9] = 0
    matrix[11, 17] = 3.5
    return {
        "conv.bias": np.linspace(-1, 1, 5, dtype=np.float32),
        "fc.weight": matrix,
        "frozen": np.zeros((4, 4), np.float32),
    }


def lossy_frames() -> dict[str, dict[str, str]]:
    """For each lossy encoding a frame, and the values that every reader must take from it, little-endian; in hex."""
    tensors, found = lossy_tensors(), {}
    for encoding in LOSSY:
        frame = codec.encode(tensors, encoding, np.random.default_rng(7))
        decoded = codec.decode(frame, codec.schema_of(tensors), encoding)
        values = {name: array.astype("<f4").tobytes().hex() for name, array in decoded.items()}
        found[encoding] = {"frame": frame.hex(), **values}
    return found
