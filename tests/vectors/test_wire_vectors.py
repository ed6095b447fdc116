"""The bytes on the wire are those that were committed: a difference is a new protocol version, or a mistake.

When it is on purpose: ``python tests/vectors/regenerate.py``, and say so in the changelog.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from samples import JSON, KEY, LOSSY, MSGPACK, OFFER, TENSORS, lossy_tensors, vectors

from federation.wire import codec, masking, messages, predictions, release, signing, terms
from federation.wire.encodings import ENCODINGS, RAW, ZERO, encoding_named
from federation.wire.fields import Wire

COMMITTED: dict[str, str] = json.loads(Path(__file__).with_name("wire.json").read_text())
FRAMES: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("frames.json").read_text())


def committed(name: str) -> bytes:
    return bytes.fromhex(COMMITTED[name])


def structs_in(value: Any) -> Iterator[type]:
    if isinstance(value, msgspec.Struct):
        yield type(value)
        for field in type(value).__struct_fields__:
            yield from structs_in(getattr(value, field))
    elif isinstance(value, tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from structs_in(item)


@pytest.mark.parametrize("name", sorted(vectors().keys() | COMMITTED.keys()))
def test_bytes_are_those_committed(name: str) -> None:
    assert vectors()[name] == COMMITTED[name]


@pytest.mark.parametrize("name", MSGPACK)
def test_committed_msgpack_is_still_understood(name: str) -> None:
    message = MSGPACK[name]
    assert messages.decode_msgpack(committed(f"msgpack/{name}"), type(message)) == message


@pytest.mark.parametrize("name", JSON)
def test_committed_json_is_still_understood(name: str) -> None:
    message = JSON[name]
    assert messages.decode_json(committed(f"json/{name}"), type(message)) == message


def test_committed_envelope_is_still_accepted() -> None:
    body = signing.unseal(
        committed("envelope/update_offer"),
        messages.UpdateOffer,
        purpose=signing.Purpose.AGENT,
        federation="home",
        sender="pi1",
        key=KEY.public_key(),
    )
    assert body == OFFER


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_committed_frame_is_still_decoded(encoding: str) -> None:
    decoded = codec.decode(committed(f"frame/{encoding}"), codec.schema_of(TENSORS), encoding)
    for name, array in TENSORS.items():
        assert np.allclose(decoded[name], array, rtol=2.0**-11, atol=0), name


@pytest.mark.parametrize("encoding", LOSSY)
def test_committed_lossy_frame_gives_the_committed_values(encoding: str) -> None:
    committed_frame = FRAMES[encoding]
    schema = codec.schema_of(lossy_tensors())
    decoded = codec.decode(bytes.fromhex(committed_frame["frame"]), schema, encoding)
    for name, array in decoded.items():
        assert array.astype("<f4").tobytes().hex() == committed_frame[name], name


def test_every_encoding_has_a_vector() -> None:
    exact = {name.removeprefix("frame/") for name in COMMITTED if name.startswith("frame/")}
    assert exact | {spec.partition(":")[0] for spec in FRAMES} == set(ENCODINGS)
    sent = {ZERO.name, RAW.name}
    for family in ENCODINGS.values():
        sent |= {scheme.name for scheme in encoding_named(family.example).schemes}
    frames = [(spec, bytes.fromhex(frame["frame"])) for spec, frame in FRAMES.items()]
    frames += [(spec, committed(f"frame/{spec}")) for spec in exact]
    seen = {entry[2] for _, frame in frames for entry in header_of(frame)[1]}
    assert seen == sent


def header_of(frame: bytes) -> Any:
    return msgspec.msgpack.decode(frame[12 : 12 + int.from_bytes(frame[8:12], "little")])


def test_every_message_has_a_sample() -> None:
    sampled = {kind for message in (*MSGPACK.values(), *JSON.values()) for kind in structs_in(message)}
    kinds = {*Wire.__subclasses__(), *masking.MaskingMessage.__subclasses__()} - {masking.MaskingMessage}
    modules = {module.__name__ for module in (messages, terms, masking, release, predictions)}
    assert sampled == {kind for kind in kinds if kind.__module__ in modules}
