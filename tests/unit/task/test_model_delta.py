import hashlib
import tracemalloc
import zlib

import msgspec
import numpy as np
import pytest

from federation.errors import ReleaseError, ReleaseFault
from federation.task.delta_format import MAGIC, MAX_HEADER_BYTES, PREFIX, Coding, Header, Kind, Piece, Stream
from federation.task.model_delta import apply_delta, make_delta
from federation.task.onnx_tensors import find_tensors

onnx = pytest.importorskip("onnx")

Arrays = dict[str, np.ndarray]


def model(arrays: Arrays, *, said: str = "round 1") -> bytes:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["N"])],
        [value("y", onnx.TensorProto.FLOAT, ["N"])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    made = onnx.helper.make_model(graph)
    made.metadata_props.add(key="provenance", value=said)
    content: bytes = made.SerializeToString()
    return content


def weights(seed: int, dtype: str = "float32") -> Arrays:
    draw = np.random.default_rng(seed)
    body = draw.normal(size=(60, 40))
    head = draw.normal(size=(10, 60))
    if dtype == "int8":
        return {
            "body": (body * 30).clip(-127, 127).astype(np.int8),
            "head": (head * 30).clip(-127, 127).astype(np.int8),
        }
    return {"body": body.astype(dtype), "head": head.astype(dtype)}


def moved(arrays: Arrays, by: float = 1e-3) -> Arrays:
    draw = np.random.default_rng(99)
    return {
        name: (array * (1 + by * draw.normal(size=array.shape))).round(
            0 if array.dtype == np.int8 else 9
        ).clip(-127, 127).astype(array.dtype)
        for name, array in arrays.items()
    }  # fmt: skip


def restored(base: bytes, delta: bytes, new: bytes) -> bytes:
    return apply_delta(base, delta, length=len(new), sha256=hashlib.sha256(new).hexdigest())


@pytest.mark.parametrize(
    ("dtype", "share"), [("float32", 0.75), ("float16", 0.6), ("int8", 0.3), ("float64", 0.95)]
)
def test_a_model_that_moved_a_little_takes_a_part_of_its_size(dtype: str, share: float) -> None:
    before = weights(1, dtype)
    base, new = model(before), model(moved(before), said="round 2")
    delta = make_delta(base, new)
    assert restored(base, delta, new) == new
    assert len(delta) < share * len(new)


def test_a_model_whose_head_alone_was_trained_costs_its_head() -> None:
    before = weights(1)
    after = before | {"head": moved(before)["head"]}
    base, new = model(before), model(after, said="another round, said in more words than before")
    delta = make_delta(base, new)
    assert restored(base, delta, new) == new
    assert len(delta) < before["head"].nbytes + 200


def test_a_channel_whose_scale_moved_is_scaled_before_it_is_subtracted() -> None:
    draw = np.random.default_rng(3)
    before = draw.integers(-100, 101, (30, 200)).astype(np.int8)
    factors = draw.uniform(0.7, 1.2, 30)
    after = np.rint(before * factors[:, None]).astype(np.int8)
    base, new = model({"w": before}), model({"w": after})
    delta = make_delta(base, new)
    assert restored(base, delta, new) == new
    assert len(delta) < len(zlib.compress((after - before).tobytes(), 9)) / 4


def test_tensors_are_found_by_name_wherever_they_lie() -> None:
    before = weights(1)
    after = {"new": np.ones(7, np.float32), "head": before["head"], "body": before["body"]}
    base, new = model(before), model(after)
    delta = make_delta(base, new)
    assert restored(base, delta, new) == new
    assert len(delta) < 300


@pytest.mark.parametrize("scheme", ["shape", "type", "fewer", "more"])
def test_models_that_differ_in_their_tensors(scheme: str) -> None:
    before = weights(1)
    after = {
        "shape": before | {"head": np.ones((4, 4), np.float32)},
        "type": weights(1, "int8"),
        "fewer": {"head": before["head"]},
        "more": before | {"third": np.arange(5, dtype=np.int64)},
    }[scheme]
    base, new = model(before), model(after)
    assert restored(base, make_delta(base, new), new) == new


def test_empty_and_scalar_tensors() -> None:
    before: Arrays = {
        "empty": np.zeros((0, 3), np.int8),
        "scalar": np.array(1, np.float32),
        "w": np.ones(9, np.int8),
    }
    after: Arrays = before | {"scalar": np.array(2, np.float32), "w": np.full(9, -128, np.int8)}
    base, new = model(before), model(after)
    assert restored(base, make_delta(base, new), new) == new


def test_extremes_wrap_around() -> None:
    low, high = np.full(64, -(2**31), np.int32), np.full(64, 2**31 - 1, np.int32)
    nan = np.array([np.nan, -np.nan, np.inf, -0.0] * 16, np.float32)
    small, large = np.full((8, 8), -128, np.int8), np.full((8, 8), 127, np.int8)
    base = model({"a": low, "b": nan, "c": small})
    new = model({"a": high, "b": -nan, "c": large})
    assert restored(base, make_delta(base, new), new) == new


@pytest.mark.parametrize(("base", "new"), [(b"", b"x"), (b"abc", b"abc"), (b"no model", b"another none")])
def test_what_is_no_model_is_carried_all_the_same(base: bytes, new: bytes) -> None:
    assert restored(base, make_delta(base, new), new) == new


def test_equal_models_cost_nothing() -> None:
    base = model(weights(1))
    assert len(make_delta(base, base)) < 60


def test_another_base_is_noticed() -> None:
    base, new = model(weights(1)), model(weights(2))
    with pytest.raises(ReleaseError) as refused:
        restored(model(weights(3)), make_delta(base, new), new)
    assert refused.value.fault is ReleaseFault.WRONG_HASH


def test_a_delta_cut_short_is_refused() -> None:
    base, new = model(weights(1)), model(moved(weights(1)))
    delta = make_delta(base, new)
    for length in (0, 3, 7, 8, 20, len(delta) // 2, len(delta) - 1):
        with pytest.raises(ReleaseError):
            restored(base, delta[:length], new)
    with pytest.raises(ReleaseError, match="its header accounts for"):
        restored(base, delta + b"x", new)


def test_the_signed_length_bounds_what_is_made() -> None:
    base, new = model(weights(1)), model(moved(weights(1)))
    with pytest.raises(ReleaseError, match="the manifest says 10"):
        apply_delta(base, make_delta(base, new), length=10, sha256="0" * 64)


def crafted(pieces: tuple[Piece, ...], packed: dict[int, tuple[Coding, bytes]]) -> bytes:
    streams = tuple(
        Stream(packed[place][0], len(packed[place][1])) if place in packed else Stream(Coding.STORED, 0)
        for place in range(8)
    )
    text = zlib.compress(msgspec.msgpack.encode(Header(pieces, streams)))
    data = b"".join(packed[place][1] for place in sorted(packed))
    return PREFIX.pack(MAGIC, len(text)) + text + data


def test_a_delta_by_hand_as_the_protocol_describes_it() -> None:
    old = bytes((10, 20, 30, 40)) + (1000).to_bytes(2, "little") + (70_000).to_bytes(4, "little")
    old += np.array([100, -100, 3, -4], np.int8).tobytes()
    pieces = [
        [0, 2, 0, b""],  # literal "hi"
        [1, 3, 1, b""],  # copy of 20, 30, 40
        [2, 1, 0, b""],  # 10 + unzigzag(3) = 8
        [3, 2, 4, b""],  # 1000 + unzigzag(0x0204) = 1258
        [4, 4, 6, b""],  # 70000 + unzigzag(1) = 69999
        # Rows (100, -100) times 16384 / 32768 and (3, -4) times 65535 / 32768; then 0, +1, 0, -1.
        [5, 4, 10, (16384).to_bytes(2, "little") + (65535).to_bytes(2, "little")],
    ]
    streams = [b"hi", bytes((3, 0, 2, 0, 1)), b"\x04", b"\x02", b"\x01", b"\x00", b"\x00", b"\x00"]
    header = zlib.compress(msgspec.msgpack.encode([pieces, [[0, len(stream)] for stream in streams]]))
    delta = b"FDL1" + len(header).to_bytes(4, "little") + header + b"".join(streams)
    new = b"hi" + bytes((20, 30, 40, 8)) + (1258).to_bytes(2, "little") + (69_999).to_bytes(4, "little")
    new += np.array([50, -49, 6, -9], np.int8).tobytes()
    assert restored(old, delta, new) == new


BOMB = zlib.compress(bytes(64 * 2**20), 9)[2:-4]


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        (b"FDL2" + bytes(20), "begins with"),
        (PREFIX.pack(MAGIC, 2**32 - 1), "does not fit"),
        (PREFIX.pack(MAGIC, len(BOMB) + 6) + zlib.compress(bytes(64 * 2**20), 9), "cut off, or longer"),
        (crafted((Piece(Kind.COPY, 100, 950),), {}), "ends at byte 1050 of 1000"),
        (crafted((Piece(Kind.WORDS, 99, 0),), {}), "whole numbers"),
        (crafted((Piece(Kind.COPY, 2**39, 0),), {}), "ends at byte"),
        (crafted((Piece(Kind.LITERAL, 2**39),), {}), "the manifest says 100"),
        (crafted((Piece(Kind.LITERAL, 100),), {0: (Coding.DEFLATE, BOMB)}), "has not the 100 bytes"),
        (crafted((Piece(Kind.LITERAL, 100),), {0: (Coding.STORED, bytes(99))}), "has not the 100 bytes"),
        (crafted((Piece(Kind.LITERAL, 100),), {0: (Coding.LZMA, bytes(99))}), "has not the 100 bytes"),
        (crafted((Piece(Kind.SCALED, 100, 0, b""),), {1: (Coding.STORED, bytes(100))}), "0 rows"),
        (crafted((Piece(Kind.SCALED, 100, 0, bytes(6)),), {1: (Coding.STORED, bytes(100))}), "3 rows"),
        (crafted((Piece(Kind.SCALED, 100, 0, bytes(3)),), {1: (Coding.STORED, bytes(100))}), "multiple"),
    ],
)  # fmt: skip
def test_a_hostile_delta_is_refused_before_it_takes_memory(delta: bytes, said: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ReleaseError, match=said) as refused:
            apply_delta(bytes(1000), delta, length=100, sha256="0" * 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.fault is ReleaseFault.MALFORMED
    assert peak < 2 * MAX_HEADER_BYTES + 2**20


def test_every_raw_initializer_is_found() -> None:
    arrays = weights(1) | {"counts": np.arange(4, dtype=np.int64)}
    content = model(arrays)
    found = {tensor.name.decode(): tensor for tensor in find_tensors(content)}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = found[name]
        assert tensor.dims == array.shape
        assert content[tensor.start : tensor.end] == array.tobytes()
        assert tensor.data_type == onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
