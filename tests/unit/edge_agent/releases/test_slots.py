"""edge_agent.releases.slots: what is installed, current, on probation, in quarantine, and what is thrown away."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from brokers import until
from slot_releases import CHUNK_BYTES, Made, fetch, made, put

from edge_agent.releases import parts
from edge_agent.releases.probation import CRASHES
from edge_agent.releases.quarantine import Quarantine
from edge_agent.releases.slots import Slots
from federation.errors import ConfigError, ReleaseError, ReleaseFault
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.task.model_delta import make_delta
from federation.wire.transfer import chunk_span

ONE, TWO, THREE = made(1), made(2), made(3)


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[Slots]:
    with Slots(tmp_path / "models", clock=lambda: 10.0) as opened:
        yield opened


def again(slots: Slots) -> Slots:
    """What another process finds."""
    slots.close()
    return Slots(slots.folder, clock=lambda: 20.0)


def number(slots: Slots) -> int | None:
    return None if slots.current is None else slots.current.release.number


def upgrade(slots: Slots, *releases: Made) -> None:
    for one in releases:
        slots.activate(put(slots, one))
        slots.end_probation()


def test_a_release_is_installed_activated_and_found_again(slots: Slots) -> None:
    assert not any((slots.current, slots.previous, slots.trial))
    assert slots.missing(ONE.release) == (ONE.release.model, ONE.release.golden)
    slot = put(slots, ONE)
    assert slots.current is None, "installed is not active"
    assert slots.missing(ONE.release) == ()
    slots.check(slot)
    slots.activate(slot)
    with again(slots) as later:
        assert later.current == slot
        assert (slot.release, slot.manifest_version) == (ONE.release, 1)
        assert slot.model.read_bytes() == ONE.objects[ONE.sha256]
        assert later.find(ONE.sha256) == slot
        assert later.find(TWO.sha256) is None


def test_probation_lasts_over_restarts_until_it_ends(slots: Slots) -> None:
    slots.activate(put(slots, ONE))
    with again(slots) as later:
        assert later.trial is not None
        assert later.trial.since == 10.0
        assert not later.count_start()
        later.end_probation()
    with again(later) as last:
        assert last.trial is None
        assert not [last.count_start() for _ in range(CRASHES) if last.count_start()]


def test_crashes_in_a_row_are_a_loop_but_orderly_stops_are_not(slots: Slots) -> None:
    slots.activate(put(slots, ONE))
    opened = slots
    for _ in range(2 * CRASHES):
        opened = again(opened)
        assert not opened.count_start()
        opened.count_stop()
    seen = []
    for _ in range(CRASHES):
        opened = again(opened)
        seen.append(opened.count_start())
    opened.close()
    assert seen == [False] * (CRASHES - 1) + [True]


def test_a_bad_release_is_given_up_and_not_taken_again(slots: Slots) -> None:
    upgrade(slots, ONE)
    bad = put(slots, TWO)
    slots.activate(bad)
    assert slots.previous is not None
    slots.quarantine(TWO.sha256, ReleaseFault.NON_FINITE, "NaN at frame 7")
    assert slots.roll_back() == slots.current
    assert number(slots) == 1
    assert (slots.previous or slots.trial) is None
    with again(slots) as later:
        assert number(later) == 1
        assert later.quarantined(TWO.sha256) == "non_finite: NaN at frame 7"
        with pytest.raises(ReleaseError, match="NaN at frame 7") as refused:
            later.activate(bad)
        assert refused.value.fault is ReleaseFault.QUARANTINED
        Quarantine(later.folder, time.time).forgive(TWO.sha256)
        assert later.quarantined(TWO.sha256) is None
        later.activate(bad)
        assert number(later) == 2


def test_the_only_release_is_given_up_too(slots: Slots) -> None:
    slots.activate(put(slots, ONE))
    slots.quarantine(ONE.sha256, ReleaseFault.ERRORS, "")
    assert slots.roll_back() is None
    with again(slots) as later:
        assert later.current is None


def test_activating_what_is_current_changes_nothing(slots: Slots) -> None:
    upgrade(slots, ONE, TWO)
    assert slots.current is not None
    slots.activate(slots.current)
    assert slots.trial is None
    assert slots.previous is not None
    assert slots.previous.release == ONE.release


def test_the_same_model_under_another_number_needs_only_its_golden_set(slots: Slots) -> None:
    upgrade(slots, ONE)
    renamed = made(7, model=ONE.objects[ONE.sha256])
    assert slots.missing(renamed.release) == (renamed.release.golden,)
    put(slots, renamed)
    assert number(slots) == 7
    with again(slots) as later:
        assert number(later) == 7
        assert later.current is not None
        later.check(later.current)


@pytest.mark.parametrize("name", [MODEL_FILE, "manifest.signed"])
@pytest.mark.parametrize("content", [None, b"", b"rotten"])
def test_damage_to_the_current_slot_leads_to_the_previous_one(
    slots: Slots, name: str, content: bytes | None
) -> None:
    upgrade(slots, ONE, TWO)
    damaged = slots.folder / "current" / name
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with again(slots) as later:
        assert number(later) == 1
        assert later.quarantined(TWO.sha256) is None, "it is not the release's fault"
        upgrade(later, TWO)
        assert number(later) == 2


def test_a_damaged_golden_set_takes_no_model_away(slots: Slots) -> None:
    upgrade(slots, ONE)
    (slots.folder / "current" / GOLDEN_FILE).write_bytes(b"rotten")
    with again(slots) as later:
        assert number(later) == 1
        assert later.missing(ONE.release) == (ONE.release.golden,)


def test_without_any_good_slot_there_is_no_model_until_one_comes(slots: Slots) -> None:
    upgrade(slots, ONE, TWO)
    shutil.rmtree(slots.folder / "slots")
    with again(slots) as later:
        assert (later.current, later.previous) == (None, None)
        upgrade(later, THREE)
        assert number(later) == 3


def test_a_damaged_slot_is_neither_activated_nor_gone_back_to(slots: Slots) -> None:
    upgrade(slots, ONE, TWO)
    (slots.folder / "previous" / MODEL_FILE).write_bytes(b"rotten")
    slot = put(slots, THREE)
    slot.model.write_bytes(b"rotten too")
    with pytest.raises(ReleaseError) as refused:
        slots.activate(slot)
    assert refused.value.fault is ReleaseFault.WRONG_HASH
    assert number(slots) == 2
    assert slots.roll_back() is None


def test_a_fetch_goes_on_where_it_stopped(slots: Slots) -> None:
    ref = ONE.release.model
    with closing(slots.open_part(ref)) as part:
        part.write(1, ONE.objects[ref.sha256][CHUNK_BYTES:])
    with again(slots) as later, closing(later.open_part(ref)) as part:
        assert part.have == {1}


def test_what_is_not_whole_or_not_right_is_not_installed(slots: Slots) -> None:
    with closing(slots.open_part(ONE.release.model)) as part:
        part.write(0, ONE.objects[ONE.sha256][:CHUNK_BYTES])
    with pytest.raises(ReleaseError, match="1 of 2 chunks") as refused:
        slots.install(ONE.release, ONE.envelope)
    assert refused.value.fault is ReleaseFault.WRONG_HASH
    assert slots.find(ONE.sha256) is None
    upgrade(slots, ONE)


def test_a_model_is_made_from_the_one_before_and_its_difference(slots: Slots) -> None:
    upgrade(slots, ONE)
    old, new = ONE.objects[ONE.sha256], TWO.objects[TWO.sha256]
    short = made(2, delta=(ONE.sha256, make_delta(old, new)))
    assert short.release.delta is not None
    fetch(slots, short, short.release.delta.object)
    slots.make_from_delta(short.release)
    fetch(slots, short, short.release.golden)
    slots.activate(slots.install(short.release, short.envelope))
    assert slots.current is not None
    assert slots.current.model.read_bytes() == new
    assert not list((slots.folder / "parts").iterdir())


@pytest.mark.parametrize("fault", ["no base", "other base", "no delta", "broken delta"])
def test_a_delta_that_leads_nowhere_is_refused_and_deleted(slots: Slots, fault: str) -> None:
    upgrade(slots, ONE)
    old = ONE.objects[ONE.sha256]
    new = old[:-8] + b"all else"
    delta = b"no delta at all" if fault == "broken delta" else make_delta(old, new)
    base = "0" * 64 if fault == "no base" else ONE.sha256
    short = made(2, model=new, delta=(base, delta))
    assert short.release.delta is not None
    if fault == "other base":
        (slots.folder / "current" / MODEL_FILE).write_bytes(THREE.objects[THREE.sha256])
    if fault != "no delta":
        fetch(slots, short, short.release.delta.object)
    with pytest.raises(ReleaseError) as refused:
        slots.make_from_delta(short.release)
    assert refused.value.fault in (ReleaseFault.WRONG_HASH, ReleaseFault.MALFORMED)
    assert not list((slots.folder / "parts").iterdir())
    upgrade(slots, short)
    assert number(slots) == 2


def test_garbage_goes_and_what_is_needed_stays(slots: Slots) -> None:
    upgrade(slots, made(4), made(5))
    for one in (ONE, TWO, THREE):
        put(slots, one)
    slots.quarantine(THREE.sha256, ReleaseFault.TOO_SLOW, "")
    for ref in (made(8).release.model, made(9).release.model):
        slots.open_part(ref).close()
    slots.collect_garbage(3, {made(9).sha256})
    kept = {path.name for path in (slots.folder / "slots").iterdir()}
    assert kept == {made(5).sha256, made(4).sha256, TWO.sha256}
    assert [path.stem for path in (slots.folder / "parts").iterdir()] == [made(9).sha256]


def test_two_processes_cannot_have_the_same_models(slots: Slots) -> None:
    with pytest.raises(ConfigError, match=r"another `edge-agent infer`.*--state"):
        Slots(slots.folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").write_bytes(b"in the way")
    with pytest.raises(ConfigError, match=r"cannot write .*models"):
        Slots(tmp_path / "models")


# Disk full.


def test_a_release_that_does_not_fit_is_refused_before_it_is_fetched(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(slots, ONE, TWO)
    put(slots, THREE)
    abandoned = made(8)
    slots.open_part(abandoned.release.model).close()
    monkeypatch.setattr(parts, "MARGIN_BYTES", 2**60)
    slots.missing(made(9).release)
    with pytest.raises(ReleaseError, match="free some") as refused:
        slots.open_part(made(9).release.model)
    assert refused.value.fault is ReleaseFault.NO_SPACE
    assert (number(slots), slots.previous and slots.previous.release.number) == (2, 1)
    assert not list((slots.folder / "parts").iterdir()), "what was abandoned made room"
    assert slots.find(THREE.sha256) is None


@contextmanager
def small_files() -> Iterator[None]:
    """No file may be longer than a chunk: the kernel refuses to write, as on a full disk, to whoever runs the tests.

    Not a fixture: where output goes to a file, pytest itself could not write before its end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_is_full_in_mid_download_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Slots(tmp_path / "models") as slots:
        upgrade(slots, ONE)
        # A file system that reserves nothing: the disk is found to be full when a chunk is written.
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
        ref = TWO.release.model
        with closing(slots.open_part(ref)) as part:
            part.write(0, TWO.objects[TWO.sha256][:CHUNK_BYTES])
            offset, length = chunk_span(ref, 1)
            with small_files(), pytest.raises(ReleaseError, match="nothing was lost") as refused:
                part.write(1, TWO.objects[TWO.sha256][offset : offset + length])
        assert refused.value.fault is ReleaseFault.NO_SPACE
        assert number(slots) == 1


def test_space_is_reserved_when_a_fetch_begins(slots: Slots) -> None:
    with small_files(), pytest.raises(ReleaseError) as refused:
        slots.open_part(TWO.release.model)
    assert refused.value.fault is ReleaseFault.NO_SPACE


@pytest.mark.parametrize(
    ("step", "times"),
    [
        *(("fsync", times) for times in range(4)),
        *(("replace", times) for times in range(3)),
        *(("symlink", times) for times in range(2)),
    ],
)
def test_a_disk_that_is_full_in_mid_activation_loses_nothing(
    slots: Slots, monkeypatch: pytest.MonkeyPatch, step: str, times: int
) -> None:
    upgrade(slots, ONE)
    slot = put(slots, TWO)
    real, left = getattr(os, step), [times]

    def full(*arguments: object, **options: object) -> object:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ReleaseError) as refused:
        slots.activate(slot)
    monkeypatch.undo()
    assert refused.value.fault is ReleaseFault.NO_SPACE
    assert number(slots) == 1
    slots.activate(slot)
    assert (number(slots), slots.previous and slots.previous.release.number) == (2, 1)
    with again(slots) as later:
        assert number(later) == 2


def test_a_full_disk_keeps_no_device_from_going_back(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade(slots, ONE)
    slots.activate(put(slots, TWO))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ("replace", "symlink", "unlink"):
        monkeypatch.setattr(os, step, full)
    slots.quarantine(TWO.sha256, ReleaseFault.ERRORS, "each frame")
    assert slots.roll_back() is not None
    assert number(slots) == 1
    assert slots.quarantined(TWO.sha256) == "errors: each frame"
    monkeypatch.undo()
    with again(slots) as later:
        assert number(later) == 2, "the disk knows nothing of it"
        assert later.trial is not None, "but the probation goes on"


# kill -9.

ACTIVATIONS = """
import sys
from pathlib import Path
from slot_releases import made, put
from edge_agent.releases.slots import Slots
from federation.errors import ReleaseFault
number = int(sys.argv[2])
with Slots(Path(sys.argv[1])) as slots:
    print("ready", flush=True)
    while True:
        number += 1
        one = made(number)
        slots.activate(put(slots, one))
        if number % 3:
            slots.end_probation()
        else:
            slots.quarantine(one.sha256, ReleaseFault.ERRORS, "")
            slots.roll_back()
        slots.collect_garbage(2)
"""


def test_kill_at_any_instant_leaves_a_good_model(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    with Slots(folder) as slots:
        upgrade(slots, ONE)
    newest = 1
    for kill in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", ACTIVATIONS, folder, str(newest)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        assert child.stdout is not None
        with child.stdout:
            assert child.stdout.readline() == b"ready\n"
            moved = (folder / "current").readlink()
            until(lambda: (folder / "current").readlink() != moved, timeout_s=60, what="an activation")  # noqa: B023
            child.kill()
            assert child.wait() == -signal.SIGKILL
        with Slots(folder) as slots:
            assert slots.current is not None, kill
            slots.check(slots.current)
            assert slots.current.release.number >= newest
            newest = max(newest, slots.current.release.number) + 3
            upgrade(slots, made(newest))
