import random
import resource
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from federation.errors import ConfigError, PeerError, Rejection, VerificationError
from federation.wire.messages import ObjectRef
from federation.wire.objects import PartialObject, read_chunk, ref_of_file
from federation.wire.transfer import chunk_span, make_ref

CHUNK = 64
DATA = random.Random(3).randbytes(10 * CHUNK + 17)
REF = make_ref(DATA, CHUNK)


def piece(index: int) -> bytes:
    offset, length = chunk_span(REF, index)
    return DATA[offset : offset + length]


def test_object_written_in_any_order_is_whole_at_its_target(tmp_path: Path) -> None:
    partial = PartialObject(tmp_path / "x.part", REF)
    for index in random.Random(1).sample(range(REF.chunks), REF.chunks):
        assert not partial.complete
        partial.write(index, memoryview(piece(index)))
    assert partial.complete
    target = partial.finish(tmp_path / "x")
    assert target.read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    partial.close()


def test_what_is_there_is_found_again_without_a_state_file(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    with closing(PartialObject(path, REF)) as partial:
        for index in (0, 3, 10):
            partial.write(index, piece(index))
    assert path.stat().st_size == REF.length
    with closing(PartialObject(path, REF)) as partial:
        assert partial.have == {0, 3, 10}


def test_torn_write_and_foreign_bytes_are_missing_chunks(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    path.write_bytes(DATA[: 4 * CHUNK + 7])
    with closing(PartialObject(path, REF)) as partial:
        assert partial.have == {0, 1, 2, 3}
    spoiled = bytearray(DATA + b"more")
    spoiled[2 * CHUNK] ^= 1
    path.write_bytes(spoiled)
    with closing(PartialObject(path, REF)) as partial:
        assert partial.have == set(range(11)) - {2}
        partial.write(2, piece(2))
        assert partial.finish(tmp_path / "x").read_bytes() == DATA


def test_whole_hash_is_checked_even_if_all_chunks_match(tmp_path: Path) -> None:
    lying = ObjectRef(sha256="0" * 64, length=REF.length, chunk_bytes=CHUNK, digests=REF.digests)
    partial = PartialObject(tmp_path / "x.part", lying)
    for index in range(REF.chunks):
        partial.write(index, piece(index))
    with pytest.raises(PeerError) as caught:
        partial.finish(tmp_path / "x")
    assert caught.value.code is Rejection.WRONG_HASH
    assert list(tmp_path.iterdir()) == []


def test_unfinished_object_is_not_finished_nor_lost(tmp_path: Path) -> None:
    with closing(PartialObject(tmp_path / "x.part", REF)) as partial:
        partial.write(1, piece(1))
        with pytest.raises(ValueError, match="10 chunks are missing"):
            partial.finish(tmp_path / "x")
        assert (tmp_path / "x.part").exists()


def test_chunks_without_a_place_are_refused(tmp_path: Path) -> None:
    with closing(PartialObject(tmp_path / "x.part", REF)) as partial:
        for index, payload, code in (
            (11, piece(0), Rejection.MALFORMED),
            (10, piece(0), Rejection.WRONG_LENGTH),
        ):
            with pytest.raises(PeerError) as caught:
                partial.write(index, payload)
            assert caught.value.code is code
        assert partial.have == set()


def test_discarded_object_leaves_nothing(tmp_path: Path) -> None:
    partial = PartialObject(tmp_path / "x.part", REF)
    partial.write(1, piece(1))
    partial.discard()
    partial.discard()
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        PartialObject(tmp_path / "no" / "x.part", REF)


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """The kernel refuses to write beyond this many bytes of any file of this process, as a full disk would."""
    limit = 5 * CHUNK + 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_refused_write_is_said_and_costs_only_its_chunk(tmp_path: Path, file_size_limit: int) -> None:
    short = make_ref(DATA[:file_size_limit], CHUNK)
    with closing(PartialObject(tmp_path / "x.part", short)) as partial:
        partial.write(4, piece(4))
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (2 * CHUNK + 5, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        partial.write(1, piece(1))
        with pytest.raises(ConfigError, match=r"cannot write .*x\.part"):
            partial.write(2, piece(2))  # half of it fits: torn
        assert partial.have == {1, 4}
    with closing(PartialObject(tmp_path / "x.part", short)) as partial:
        assert partial.have == {1, 4}


def test_object_larger_than_the_disk_allows_is_said_at_once(tmp_path: Path, file_size_limit: int) -> None:
    assert file_size_limit < REF.length
    with pytest.raises(ConfigError, match="cannot write"):
        PartialObject(tmp_path / "x.part", REF)


def test_file_is_described_and_read_as_it_would_be_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(DATA)
    assert ref_of_file(path, CHUNK) == REF
    assert [read_chunk(path, REF, index) for index in range(REF.chunks)] == [
        piece(i) for i in range(REF.chunks)
    ]
    with pytest.raises(PeerError):
        read_chunk(path, REF, REF.chunks)


def test_file_that_changed_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(DATA[: 5 * CHUNK])
    assert read_chunk(path, REF, 4) == piece(4)
    with pytest.raises(VerificationError, match="changed since it was hashed"):
        read_chunk(path, REF, 5)


def test_unreadable_and_empty_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        ref_of_file(tmp_path / "none", CHUNK)
    with pytest.raises(ConfigError, match="cannot read"):
        read_chunk(tmp_path / "none", REF, 0)
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty"):
        ref_of_file(tmp_path / "empty", CHUNK)


def test_what_is_set_aside_is_whole_and_a_part_of_it_is_not(tmp_path: Path) -> None:
    partial = PartialObject(tmp_path / "part", REF)
    partial.write(0, DATA[:CHUNK])
    with pytest.raises(ValueError, match="chunks are missing"):
        partial.set_aside(tmp_path / "x")
    for index in range(1, REF.chunks):
        partial.write(index, DATA[index * CHUNK : (index + 1) * CHUNK])
    assert partial.set_aside(tmp_path / "x").read_bytes() == DATA
    assert not partial.path.exists()
