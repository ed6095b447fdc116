"""edge_agent.releases.rollout_memory: what must survive, and what becomes of a file that did not."""

from pathlib import Path

import pytest
import structlog

from edge_agent.releases.channels import Known
from edge_agent.releases.rollout_events import Remember
from edge_agent.releases.rollout_memory import RolloutMemory
from federation.errors import ConfigError
from federation.wire.release import Channel

ENROLLED = ("a" * 64, "b" * 64)
ROTATED = ("b" * 64, "c" * 64)
REMEMBER = Remember({Channel.STABLE: 7, Channel.CANARY: 9}, 9, 123.5, ("d" * 64,))


def memory(path: Path, enrolled: tuple[str, ...] = ENROLLED) -> RolloutMemory:
    return RolloutMemory(path, enrolled)


def test_it_begins_with_the_keys_of_the_bundle(tmp_path: Path) -> None:
    assert memory(tmp_path / "file").known({}) == Known(ENROLLED)


def test_other_keys_begin_anew_but_for_what_has_proven_itself(tmp_path: Path) -> None:
    kept = memory(tmp_path / "file")
    kept.remember(REMEMBER)
    kept.pin(ROTATED)
    assert memory(tmp_path / "file").known({}) == Known(ROTATED, proven=REMEMBER.proven)


def test_keys_and_versions_survive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first = memory(path)
    first.pin(ROTATED)
    first.remember(REMEMBER)
    quarantine = {"e" * 64: "broken: it is so"}
    expected = Known(ROTATED, REMEMBER.versions, 9, 123.5, REMEMBER.proven, quarantine)
    assert memory(path).known(quarantine) == expected
    assert path.stat().st_mode & 0o077 == 0


def test_another_enrolment_begins_anew(tmp_path: Path) -> None:
    memory(tmp_path / "file").remember(REMEMBER)
    other = ("f" * 64, "0" * 64)
    assert memory(tmp_path / "file", other).known({}) == Known(other)


@pytest.mark.parametrize("content", [b"", b"{", b'{"enrolled": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_told_and_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with structlog.testing.capture_logs() as logs:
        assert memory(tmp_path / "file").known({}) == Known(ENROLLED)
    assert [line["event"] for line in logs] == ["rollout_memory_damaged"]


def test_what_could_not_be_written_is_written_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    kept = memory(path)
    path.mkdir()  # nothing can be renamed to it
    with pytest.raises(ConfigError):
        kept.pin(ROTATED)
    assert kept.known({}).keys == ENROLLED, "not pinned before it is on disk"
    with pytest.raises(ConfigError):
        kept.remember(REMEMBER)
    path.rmdir()
    kept.pin(ROTATED)
    assert memory(path).known({}).proven == REMEMBER.proven
