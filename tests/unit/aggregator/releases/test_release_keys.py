import stat
import threading
from pathlib import Path

import pytest

from aggregator.enrolment import Enrolment
from aggregator.releases import keys as release_keys
from aggregator.releases.keys import PRESENT_FILE, SUCCESSOR_FILE, SUCCESSOR_PUBLIC_FILE, ReleaseKeys
from federation.errors import ConfigError
from federation.files import write_whole
from federation.wire.signing import public_key_hex


def folder_of(state: Path) -> Path:
    return state / "identity"


def test_keys_are_made_once_and_are_private(tmp_path: Path) -> None:
    first = ReleaseKeys(tmp_path).pair().pinned
    assert ReleaseKeys(tmp_path).pair().pinned == first
    assert first[0] != first[1]
    for name in (PRESENT_FILE, SUCCESSOR_FILE):
        assert stat.S_IMODE((folder_of(tmp_path) / name).stat().st_mode) == 0o600


def test_a_bundle_pins_both_keys_also_in_a_state_folder_of_before(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    for name in (PRESENT_FILE, SUCCESSOR_FILE, SUCCESSOR_PUBLIC_FILE):
        (folder_of(tmp_path) / name).unlink(missing_ok=True)
    bundle = enrolment.enroll("pi1", broker_url="mqtt://127.0.0.1:1883")
    assert bundle.release_keys == ReleaseKeys(tmp_path).pair().pinned
    assert enrolment.enroll("pi2", broker_url="mqtt://127.0.0.1:1883").release_keys == bundle.release_keys


def test_the_successor_takes_over_and_a_new_one_is_announced(tmp_path: Path) -> None:
    keys = ReleaseKeys(tmp_path)
    present, successor = keys.pair().pinned
    after = keys.rotate().pinned
    assert after[0] == successor
    assert after[1] not in (present, successor)
    assert ReleaseKeys(tmp_path).pair().pinned == after


def test_another_process_sees_a_rotation(tmp_path: Path) -> None:
    serving = ReleaseKeys(tmp_path)
    after = ReleaseKeys(tmp_path).rotate()
    assert public_key_hex(serving.present) == after.pinned[0]
    assert public_key_hex(serving.successor) == after.pinned[1]


def test_the_successors_private_key_may_be_kept_elsewhere(tmp_path: Path) -> None:
    state, safe = tmp_path / "state", tmp_path / "safe.key"
    keys = ReleaseKeys(state)
    before = keys.pair().pinned
    keys.successor_file.rename(safe)
    assert ReleaseKeys(state).pair().pinned == before
    with pytest.raises(ConfigError, match="bring it back"):
        keys.rotate()
    assert keys.pair().pinned == before
    safe.rename(keys.successor_file)
    assert keys.rotate().pinned[0] == before[1]


def test_another_successor_than_devices_have_pinned_is_refused(tmp_path: Path) -> None:
    keys, stranger = ReleaseKeys(tmp_path / "state"), ReleaseKeys(tmp_path / "other")
    write_whole(keys.successor_file, stranger.successor_file.read_bytes())
    with pytest.raises(ConfigError, match="not the successor that devices have pinned"):
        keys.rotate()


def test_a_lost_present_key_is_never_replaced_in_silence(tmp_path: Path) -> None:
    keys = ReleaseKeys(tmp_path)
    successor = keys.pair().pinned[1]
    (folder_of(tmp_path) / PRESENT_FILE).unlink()
    with pytest.raises(ConfigError, match="restore it from a backup, or copy"):
        ReleaseKeys(tmp_path)
    (folder_of(tmp_path) / PRESENT_FILE).write_bytes(keys.successor_file.read_bytes())
    assert ReleaseKeys(tmp_path).pair().pinned[0] == successor


def test_a_lost_successor_is_never_replaced_in_silence(tmp_path: Path) -> None:
    keys = ReleaseKeys(tmp_path)
    keys.successor_file.unlink()
    (folder_of(tmp_path) / SUCCESSOR_PUBLIC_FILE).unlink()
    with pytest.raises(ConfigError, match="has no successor beside it"):
        ReleaseKeys(tmp_path)


@pytest.mark.parametrize("name", [PRESENT_FILE, SUCCESSOR_FILE, SUCCESSOR_PUBLIC_FILE])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"abc\n", b"g" * 64])
def test_a_damaged_key_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    ReleaseKeys(tmp_path)
    (folder_of(tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        ReleaseKeys(tmp_path)


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    pair = ReleaseKeys(tmp_path).pair()
    secret = (folder_of(tmp_path) / PRESENT_FILE).read_text().strip()
    assert secret not in repr(pair)
    (folder_of(tmp_path) / PRESENT_FILE).write_text(secret[:-2])
    with pytest.raises(ConfigError) as refused:
        ReleaseKeys(tmp_path)
    assert secret[:16] not in str(refused.value)


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("writes", range(3))
def test_power_cut_while_the_keys_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    _cut_after(monkeypatch, writes)
    with pytest.raises(PowerCutError):
        ReleaseKeys(tmp_path)
    monkeypatch.undo()
    first = ReleaseKeys(tmp_path).pair().pinned
    assert ReleaseKeys(tmp_path).pair().pinned == first


@pytest.mark.parametrize("writes", range(3))
def test_power_cut_in_a_rotation_leaves_the_former_keys_or_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    keys = ReleaseKeys(tmp_path)
    before = keys.pair().pinned
    _cut_after(monkeypatch, writes)
    with pytest.raises(PowerCutError):
        keys.rotate()
    monkeypatch.undo()
    after = ReleaseKeys(tmp_path).pair().pinned
    if writes == 0:
        assert after == before
    else:
        assert after[0] == before[1]
        assert after[1] not in before
    assert ReleaseKeys(tmp_path).rotate().pinned[0] == after[1]


def test_two_processes_that_come_first_agree(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    together = threading.Barrier(4)

    def make() -> None:
        together.wait(timeout=30)
        seen.append(ReleaseKeys(tmp_path).pair().pinned)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(seen) == 4
    assert len(set(seen)) == 1


def _cut_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    done = 0

    def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
        nonlocal done
        if done == writes:
            raise PowerCutError
        done += 1
        write_whole(path, data, mode=mode)

    monkeypatch.setattr(release_keys, "write_whole", write)
