"""A device written from docs/protocol.md alone: nothing of fedge is imported here, and a test says so.

Plain and synchronous on purpose: one connection, one round at a time, no resume. The document's section numbers stand
beside what they ask for. Section 10, the frame, is in ``independent_frame``.
"""

import contextlib
import json
import math
import queue
import secrets
import struct
import time
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from independent_frame import read_frame
from numpy.typing import NDArray
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from safetensors.numpy import load

Tensors = dict[str, NDArray[np.float32]]
Fields = dict[str, Any]

DIGEST_BYTES = 16
WINDOW = 8
DOWNLOAD_RETRY_S = 2.0
OFFER_RETRY_S = 2.0
PATIENCE_S = 90.0


class Refused(Exception):  # noqa: N818 - a receipt says so
    """The aggregator refused the update; the code is the argument."""


class IndependentClient:
    """One device.

    Args:
        bundle: The parsed bundle file (section 2).
        encodings: That it says it can write.
    """

    def __init__(
        self, bundle: Fields, encodings: tuple[str, ...] = ("float32", "float16", "int8", "sq")
    ) -> None:
        self._federation, self._agent = bundle["federation"], bundle["agent"]
        self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(bundle["private_key"]))
        self._aggregator = Ed25519PublicKey.from_public_bytes(bytes.fromhex(bundle["aggregator_key"]))
        self._root = f"fedge/1/{self._federation}"
        self._mine = f"{self._root}/agent/{self._agent}"
        self._encodings = encodings
        self._held: tuple[str, Tensors] = "", {}
        self.deltas_applied = 0
        self._session = secrets.token_hex(8)
        self._heard: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._plan: Fields | None = None
        url = urlsplit(bundle["broker"])
        assert url.scheme == "mqtt"
        three = parse_qs(url.query).get("version") == ["3"]
        self._mqtt = Client(
            CallbackAPIVersion.VERSION2,
            f"{self._federation}-{self._agent}-{self._session}",
            protocol=MQTTProtocolVersion.MQTTv311 if three else MQTTProtocolVersion.MQTTv5,
        )
        self._mqtt.username_pw_set(bundle["username"], bundle["password"])
        self._mqtt.will_set(f"{self._mine}/state", self._death(), qos=1, retain=True)
        self._mqtt.on_connect = self._on_connect
        self._mqtt.on_message = self._on_message
        self._host, self._port = str(url.hostname), url.port or 1883

    # --- section 3: connecting, and section 5: states -----------------------------------------------------------

    def start(self) -> None:
        """Connect, and stay connected. Waits for the broker to come up."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._mqtt.connect(self._host, self._port, keepalive=30)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._mqtt.loop_start()

    def stop(self) -> None:
        """Say goodbye, if the broker is still there."""
        goodbye = self._mqtt.publish(f"{self._mine}/state", self._death(), qos=1, retain=True)
        with contextlib.suppress(RuntimeError):
            goodbye.wait_for_publish(5)
        self._mqtt.disconnect()
        self._mqtt.loop_stop()

    def _on_connect(self, *_: object) -> None:
        self._mqtt.publish(f"{self._mine}/state", self._birth(), qos=1, retain=True)
        self._mqtt.subscribe([(f"{self._mine}/down/#", 1), (f"{self._root}/plan", 1)])

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        self._heard.put((message.topic, bytes(message.payload)))

    def _birth(self) -> bytes:
        capabilities = {
            "version": "independent",
            "device": "cpu",
            "threads": 1,
            "memory_mb": 1,
            "samples": 100,
            "encodings": list(self._encodings),
            "platform": "a document",
        }
        state = {"state": "online", "session": self._session, "capabilities": capabilities}
        return json.dumps(state).encode()

    def _death(self) -> bytes:
        return json.dumps({"state": "offline", "session": self._session}).encode()

    # --- section 6: envelopes -----------------------------------------------------------------------------------

    def _signed_bytes(self, purpose: str, sender: str, body: bytes) -> bytes:
        fields = (
            b"fedge/1 signed message",
            purpose.encode(),
            self._federation.encode(),
            sender.encode(),
            body,
        )
        return b"".join(struct.pack(">I", len(field)) + field for field in fields)

    def _seal(self, message: Fields) -> bytes:
        body = msgspec.msgpack.encode(message)
        signature = self._key.sign(self._signed_bytes("agent-message", self._agent, body))
        envelope = {
            "purpose": "agent-message",
            "federation": self._federation,
            "sender": self._agent,
            "body": body,
            "signature": signature,
        }
        return msgspec.msgpack.encode(envelope)

    def _unseal(self, payload: bytes, purpose: str) -> Fields:
        envelope = msgspec.msgpack.decode(payload)
        assert envelope["purpose"] == purpose
        assert envelope["federation"] == self._federation
        assert envelope["sender"] == "aggregator"
        body: bytes = envelope["body"]
        self._aggregator.verify(envelope["signature"], self._signed_bytes(purpose, "aggregator", body))
        message: Fields = msgspec.msgpack.decode(body)
        return message

    # --- section 8: plan and download ---------------------------------------------------------------------------

    def wait_for_round(self) -> Fields:
        """The plan of a round that invites this agent."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self._plan and self._plan["type"] == "round" and self._agent in self._plan["cohort"]):
            self._hear(deadline)
        return self._plan

    def download(self, ref: Fields) -> bytes:
        """Pull an object's retained chunks in windows of exact topics."""
        count = -(-ref["length"] // ref["chunk_bytes"])
        assert len(ref["digests"]) == count * DIGEST_BYTES
        prefix = f"{self._root}/object/{ref['sha256']}/"
        chunks: dict[int, bytes] = {}
        deadline = time.monotonic() + PATIENCE_S
        while missing := [index for index in range(count) if index not in chunks][:WINDOW]:
            topics = [f"{prefix}{index}" for index in missing]
            self._mqtt.subscribe([(topic, 0) for topic in topics])
            retry_at = time.monotonic() + DOWNLOAD_RETRY_S
            while any(index not in chunks for index in missing) and time.monotonic() < retry_at:
                heard = self._hear(deadline, until=retry_at)
                if heard is None or not heard[0].startswith(prefix):
                    continue
                index, payload = int(heard[0].removeprefix(prefix)), heard[1]
                wanted = ref["digests"][index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
                if sha256(payload).digest()[:DIGEST_BYTES] == wanted:
                    chunks[index] = payload
            self._mqtt.unsubscribe(topics)
        whole = b"".join(chunks[index] for index in range(count))
        assert len(whole) == ref["length"]
        assert sha256(whole).hexdigest() == ref["sha256"]
        return whole

    def base_model(self, plan: Fields) -> Tensors:
        """The base model, its tensors sorted by name: by deltas from the last one if they lead there, else from the full
        model. Nothing is built from a seed: this device has no PyTorch.
        """
        versions = [delta["base"] for delta in plan["deltas"]] + [plan["base"]]
        held, model = self._held
        if held not in versions:
            held = plan["full"]["version"]
            tensors = load(self.download(plan["full"]["object"]))
            model = {name: tensors[name] for name in sorted(tensors)}
            assert version_of(model) == held
        for delta in plan["deltas"][versions.index(held) :]:
            change = read_frame(self.download(delta["object"]))
            model = {name: array + change[name] for name, array in model.items()}
            self.deltas_applied += 1
        assert version_of(model) == plan["base"]
        self._held = plan["base"], model
        return model

    # --- section 9: delivering ----------------------------------------------------------------------------------

    def offer_of(self, plan: Fields, frame: bytes, samples: int) -> Fields:
        """Describe an update."""
        size = plan["upload_chunk_bytes"]
        pieces = [frame[start : start + size] for start in range(0, len(frame), size)]
        ref = {
            "sha256": sha256(frame).hexdigest(),
            "length": len(frame),
            "chunk_bytes": size,
            "digests": b"".join(sha256(piece).digest()[:DIGEST_BYTES] for piece in pieces),
        }
        return {
            "type": "offer",
            "run": plan["run"],
            "round": plan["round"],
            "base": plan["base"],
            "object": ref,
            "encoding": plan["up_encoding"],
            "samples": samples,
            "metrics": {"loss": 0.5, "accuracy": 0.5, "steps": 1, "train_s": 0.1},
        }

    def deliver(self, plan: Fields, frame: bytes, samples: int = 100) -> Fields:
        """Offer, send the chunks that are asked for, and wait for the receipt.

        Raises:
            Refused: With the receipt's code.
        """
        offer = self.offer_of(plan, frame, samples)
        digest, size = offer["object"]["sha256"], offer["object"]["chunk_bytes"]
        sealed = self._seal(offer)
        deadline = time.monotonic() + PATIENCE_S
        interval_s, due = OFFER_RETRY_S, 0.0
        while True:
            if time.monotonic() >= due:
                self._mqtt.publish(f"{self._mine}/up/offer", sealed, qos=1)
                due = time.monotonic() + interval_s
                interval_s = min(2 * interval_s, 60.0)
            match self._hear(deadline, until=due):
                case (topic, payload) if topic == f"{self._mine}/down/credit":
                    credit = msgspec.msgpack.decode(payload)
                    if credit["sha256"] != digest:
                        continue
                    interval_s, due = OFFER_RETRY_S, time.monotonic() + OFFER_RETRY_S
                    for index in credit["chunks"]:
                        piece = frame[index * size : (index + 1) * size]
                        self._mqtt.publish(f"{self._mine}/up/{digest}/{index}", piece, qos=0)
                case (topic, payload) if topic == f"{self._mine}/down/receipt":
                    receipt = self._unseal(payload, "receipt")
                    if receipt["sha256"] != digest or receipt["round"] != plan["round"]:
                        continue
                    if not receipt["accepted"]:
                        raise Refused(receipt["code"])
                    return receipt

    def decline(self, plan: Fields, reason: str) -> None:
        """Tell the aggregator not to wait for this round."""
        message = {"type": "decline", "run": plan["run"], "round": plan["round"], "reason": reason}
        self._mqtt.publish(f"{self._mine}/up/offer", self._seal(message), qos=1)

    def _hear(self, deadline: float, *, until: float = math.inf) -> tuple[str, bytes] | None:
        now = time.monotonic()
        assert now < deadline, f"{self._agent} waits in vain; last plan {self._plan}"
        try:
            topic, payload = self._heard.get(timeout=max(0.0, min(deadline, until) - now))
        except queue.Empty:
            return None
        if topic == f"{self._root}/plan":
            self._plan = self._unseal(payload, "plan")
        return topic, payload


def version_of(model: Tensors) -> str:
    """The digest of a version of the global model (section 8)."""
    names = sorted(model)
    digest = sha256(msgspec.msgpack.encode([[name, list(model[name].shape)] for name in names]))
    for name in names:
        digest.update(model[name].astype("<f4").tobytes())
    return digest.hexdigest()
