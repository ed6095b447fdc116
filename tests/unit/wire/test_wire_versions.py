"""federation.wire.versions: one digest for one model, the cheapest way to it, and sums that agree bit for bit."""

import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, read_checkpoint
from federation.wire.codec import encode
from federation.wire.messages import FullModel, ModelDelta, RoundPlan, TaskSpec, TrainSpec
from federation.wire.transfer import make_ref
from federation.wire.versions import Built, Held, Route, apply_delta, cheapest_route, model_digest

TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
MODEL = {
    "b": np.array([1.0, -2.0, 0.5], np.float32),
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scale": np.array(0.25, np.float32),
    "none": np.zeros((0, 4), np.float32),
}
VERSIONS = tuple(f"{number:064x}" for number in range(10))

Model = Mapping[str, NDArray[np.float32]]


def changed(name: str, array: Any) -> Model:
    return {**MODEL, name: np.asarray(array, np.float32)}


# --- digest -------------------------------------------------------------------------------------------------------


def test_the_digest_is_the_sha256_of_what_the_document_says() -> None:
    names_and_shapes = b"\x94\x92\xa1a\x92\x02\x03\x92\xa1b\x91\x03\x92\xa4none\x92\x00\x04\x92\xa5scale\x90"
    values = struct.pack("<10f", 0, 1, 2, 3, 4, 5, 1, -2, 0.5, 0.25)
    assert model_digest(MODEL) == sha256(names_and_shapes + values).hexdigest()
    assert model_digest(MODEL) == "6c6cbdb8bbc90de5dbf9ec26b3721ddf0ac1f10448424af9f1533a83664ce62f"


def test_the_digest_depends_neither_on_order_nor_on_layout_nor_on_the_file(tmp_path: Path) -> None:
    expected = model_digest(MODEL)
    assert model_digest(dict(reversed(MODEL.items()))) == expected
    transposed = np.asfortranarray(MODEL["a"])
    assert not transposed.flags["C_CONTIGUOUS"]
    assert model_digest({**MODEL, "a": transposed}) == expected
    big_endian: Any = MODEL["b"].astype(">f4")
    assert model_digest({**MODEL, "b": big_endian}) == expected
    for number in (1, 2):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(checkpoint_bytes(CheckpointInfo(federation="home", round=number, task=TASK), MODEL))
        assert model_digest(read_checkpoint(path)[1]) == expected, "its round is not part of a version"


@pytest.mark.parametrize(
    "other",
    [
        changed("a", MODEL["a"].reshape(3, 2)),
        changed("a", MODEL["a"].reshape(6)),
        changed("scale", [0.25]),
        changed("none", np.zeros((4, 0))),
        changed("b", np.nextafter(MODEL["b"], np.float32(9))),
        changed("extra", []),
        {name: array for name, array in MODEL.items() if name != "none"},
        {("c" if name == "b" else name): array for name, array in MODEL.items()},
        {**MODEL, "a": MODEL["b"], "b": MODEL["a"]},
    ],
    ids=["shape", "flat", "vector", "empty", "values", "extra", "missing", "name", "swapped"],
)
def test_another_model_has_another_digest(other: Model) -> None:
    assert model_digest(other) != model_digest(MODEL)


def test_zeros_of_either_sign_are_different_versions() -> None:
    # They are equal to NumPy, but a stranger who compares bytes must agree with us.
    assert model_digest({"a": np.zeros(2, np.float32)}) != model_digest({"a": np.full(2, -0.0, np.float32)})


# --- routes -------------------------------------------------------------------------------------------------------


def plan(
    lengths: tuple[int, ...], *, full: int = 0, full_length: int = 1000, seed: int | None = None
) -> RoundPlan:
    """Versions 0 to n, deltas of these lengths between them, a full model of one of them."""
    deltas = tuple(
        ModelDelta(base=VERSIONS[number], object=make_ref(bytes(length), 64), encoding="int8")
        for number, length in enumerate(lengths)
    )
    return RoundPlan(
        run="0" * 16,
        round=1,
        attempt=1,
        task=TASK,
        train=TrainSpec(),
        base=VERSIONS[len(lengths)],
        full=FullModel(version=VERSIONS[full], object=make_ref(bytes(full_length), 64), seed=seed),
        deltas=deltas,
        up_encoding="int8",
        max_noise=0.0,
        cohort=("pi1",),
        deadline_s=60.0,
        issued_at=0.0,
        upload_chunk_bytes=1024,
    )


def held(*numbers: int) -> set[str]:
    return {VERSIONS[number] for number in numbers}


def test_the_base_model_that_is_here_costs_nothing() -> None:
    asked = plan((10, 20), seed=1, full=2)
    route = cheapest_route(asked, held(0, 2), may_build=True)
    assert route == Route(Held(asked.base), (), asked.base)
    assert route.fetched_bytes == 0


def test_from_an_older_version_deltas_lead_on() -> None:
    asked = plan((10, 20, 30))
    route = cheapest_route(asked, held(0, 1), may_build=True)
    assert route == Route(Held(VERSIONS[1]), asked.deltas[1:], asked.base)
    assert route.fetched_bytes == 50


def test_a_newcomer_takes_the_full_model_and_the_deltas_since() -> None:
    asked = plan((10, 20, 30), full=2)
    route = cheapest_route(asked, held(9), may_build=True)
    assert route == Route(asked.full, asked.deltas[2:], asked.base)
    assert route.fetched_bytes == 1030


def test_deltas_that_are_longer_than_the_full_model_lose_against_it() -> None:
    asked = plan((600, 600), full=2)
    assert cheapest_route(asked, held(0), may_build=True) == Route(asked.full, (), asked.base)
    assert cheapest_route(asked, held(1), may_build=True).start == Held(VERSIONS[1])


def test_a_model_is_built_only_where_that_is_allowed_and_there_is_a_seed() -> None:
    asked = plan((10,), seed=7)
    route = cheapest_route(asked, set(), may_build=True)
    assert route == Route(Built(VERSIONS[0], 7), asked.deltas, asked.base)
    assert route.fetched_bytes == 10
    assert cheapest_route(asked, set(), may_build=False).start == asked.full
    assert cheapest_route(plan((10,)), set(), may_build=True).start == plan((10,)).full


def test_at_equal_cost_what_is_here_comes_before_what_must_be_built() -> None:
    asked = plan((10,), seed=7)
    assert cheapest_route(asked, held(0), may_build=True).start == Held(VERSIONS[0])


def test_at_equal_cost_fewer_deltas_are_applied() -> None:
    asked = plan((500, 500), full=2)
    assert cheapest_route(asked, held(0), may_build=True) == Route(asked.full, (), asked.base)


@given(
    lengths=st.lists(st.integers(1, 400), max_size=6).map(tuple),
    full_length=st.integers(1, 800),
    full=st.integers(0, 6),
    seed=st.none() | st.integers(0, 9),
    here=st.sets(st.integers(0, 9)),
    may_build=st.booleans(),
)
def test_every_route_ends_at_the_base_and_none_is_longer_than_from_the_full_model(
    lengths: tuple[int, ...],
    full_length: int,
    full: int,
    seed: int | None,
    here: set[int],
    may_build: bool,
) -> None:
    full = min(full, len(lengths))
    asked = plan(lengths, full=full, full_length=full_length, seed=seed)
    route = cheapest_route(asked, held(*here), may_build=may_build)
    assert route.version == asked.base
    steps = [*(delta.base for delta in route.deltas), route.version]
    assert steps[0] == route.start.version
    assert steps == list(VERSIONS[len(lengths) + 1 - len(steps) : len(lengths) + 1]), "no step is left out"
    assert route.fetched_bytes <= full_length + sum(lengths[full:])
    for number in here & set(range(len(lengths) + 1)):
        assert route.fetched_bytes <= sum(lengths[number:])
    match route.start:
        case Held(version):
            assert version in held(*here)
        case Built(version, used):
            assert may_build
            assert (version, used) == (VERSIONS[full], seed)
        case FullModel():
            assert route.start == asked.full


# --- deltas -------------------------------------------------------------------------------------------------------

CHANGE = {name: np.full(array.shape, 0.1, np.float32) for name, array in MODEL.items()}


def frame_of(change: Model, encoding: str = "float32") -> bytes:
    return encode(change, encoding, np.random.default_rng(3))


def refused(frame: bytes, model: Model = MODEL, encoding: str = "float32") -> Rejection:
    with pytest.raises(PeerError) as error:
        apply_delta(model, frame, encoding)
    return error.value.code


def test_a_delta_is_added_with_one_rounding() -> None:
    before = {name: array.copy() for name, array in MODEL.items()}
    following = apply_delta(MODEL, frame_of(CHANGE), "float32")
    assert set(following) == set(MODEL)
    for name, array in following.items():
        expected = (MODEL[name].astype(np.float64) + CHANGE[name].astype(np.float64)).astype(np.float32)
        assert array.dtype == np.float32
        assert array.shape == expected.shape
        assert array.tobytes() == expected.tobytes()
        assert MODEL[name].tobytes() == before[name].tobytes(), "the version before is not changed"
        assert not np.shares_memory(array, MODEL[name])


@pytest.mark.parametrize("encoding", ["int8", "int4", "float16", "sq:4", "sq:16"])
def test_both_ends_reach_the_same_version_whatever_the_encoding_and_the_order(encoding: str) -> None:
    random = np.random.default_rng(5)
    model = {name: random.standard_normal((40, 30), dtype=np.float32) for name in ("x", "y", "z")}
    frames = []
    server: Model = model
    for _ in range(3):
        change = {name: random.standard_normal((40, 30), dtype=np.float32) for name in model}
        frames.append(encode(change, encoding, random))
        server = apply_delta(server, frames[-1], encoding)
    device: Model = dict(reversed(model.items()))
    for frame in frames:
        device = apply_delta(device, memoryview(frame), encoding)
    assert model_digest(device) == model_digest(server)


@given(st.binary(max_size=300), st.sampled_from(["float32", "int8", "sq:4", "no such encoding"]))
def test_a_foreign_frame_is_refused_and_nothing_else(data: bytes, encoding: str) -> None:
    assert refused(data, encoding=encoding) in set(Rejection)


def test_a_delta_in_another_encoding_is_refused() -> None:
    assert refused(frame_of(CHANGE), encoding="int8") is Rejection.WRONG_ENCODING


def test_a_delta_of_another_model_is_refused() -> None:
    assert refused(frame_of({"a": CHANGE["a"]})) is Rejection.MISSING_TENSOR
    assert refused(frame_of({**CHANGE, "c": CHANGE["a"]})) is Rejection.EXTRA_TENSOR
    assert refused(frame_of({**CHANGE, "a": CHANGE["a"].T})) is Rejection.WRONG_SHAPE


def test_a_delta_against_another_version_gives_another_digest() -> None:
    frame = frame_of(CHANGE)
    expected = apply_delta(MODEL, frame, "float32")
    again = apply_delta(expected, frame, "float32")
    assert model_digest(again) != model_digest(expected)


@pytest.mark.parametrize(
    ("weight", "change"),
    [(3.4e38, 3.4e38), (-3.4e38, -3.4e38)],
    ids=["above", "below"],
)
def test_a_sum_that_overflows_is_refused(weight: float, change: float) -> None:
    frame = frame_with(change)
    assert refused(frame, {"w": np.full(3, weight, np.float32)}) is Rejection.NON_FINITE
    assert np.isfinite(apply_delta({"w": np.zeros(3, np.float32)}, frame, "float32")["w"]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_delta_or_a_model_that_is_not_finite_is_refused(value: float) -> None:
    assert refused(frame_with(value), {"w": np.zeros(3, np.float32)}) is Rejection.NON_FINITE
    assert refused(frame_with(1.0), {"w": np.full(3, value, np.float32)}) is Rejection.NON_FINITE


def frame_with(value: float) -> bytes:
    """A frame of three such values; our encoder writes none that are so large."""
    marker = np.full(3, 1.5, np.float32)
    frame = frame_of({"w": marker})
    assert marker.tobytes() in frame
    return frame.replace(marker.tobytes(), np.full(3, value, np.float32).tobytes())
