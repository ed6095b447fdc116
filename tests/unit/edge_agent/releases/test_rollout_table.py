"""edge_agent.releases.rollout: which release a device takes, and what it does with one that is no good."""

import msgspec
import pytest
from release_authority import DAY_S, Authority
from rollout_device import AGENT, GOOD, SETTINGS, Device, kinds

from edge_agent.inference.health import Health
from edge_agent.releases.channels import Known
from edge_agent.releases.rollout import SLOW_TESTS, WRONG_HASHES
from edge_agent.releases.rollout_events import (
    Activate,
    Activated,
    Adopt,
    Confirm,
    Fetch,
    Fetched,
    ManifestRefused,
    NotLoaded,
    Offer,
    Passed,
    Pin,
    Pinned,
    Quarantine,
    Remember,
    RollBack,
    RolledBack,
    SelfTest,
    StopWork,
    Tick,
)
from edge_agent.releases.rollout_work import Settings, Stage
from federation.errors import ReleaseFault
from federation.wire.release import Channel, Release, RolloutState, draw

FETCHING, PROBATION, CONFIRMED = RolloutState.FETCHING, RolloutState.PROBATION, RolloutState.CONFIRMED
REFUSED, ROLLED_BACK = RolloutState.REFUSED, RolloutState.ROLLED_BACK


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def settled(device: Device) -> Device:
    """It runs release 1, kept for good."""
    device.takes(device.authority.release(1))
    device.commands.clear()
    return device


def slot(release: Release, manifest: int = 1) -> Offer:
    return Offer(release, manifest)


# --- the good way -----------------------------------------------------------------------------------------------


def test_a_release_is_fetched_tested_activated_watched_and_kept(device: Device) -> None:
    release = device.authority.release(1)
    commands = device.arrives(device.authority.manifest(release))
    assert kinds(commands) == [Remember, Fetch]
    assert device.shown.busy
    assert kinds(device.feed(Fetched(release.model.sha256))) == [SelfTest]
    assert kinds(device.feed(Passed(release.model.sha256))) == [Activate]
    before = device.shown
    assert before.installed is None
    assert kinds(device.feed(Activated(release.model.sha256))) == []
    assert device.shown.installed == 1
    assert device.last == (1, PROBATION, None)
    assert kinds(device.seen(GOOD)) == []
    device.now += SETTINGS.probation_s
    assert kinds(device.seen(GOOD)) == [Confirm, Remember]
    assert [report.state for report in device.reports] == [
        FETCHING,
        RolloutState.TESTING,
        PROBATION,
        CONFIRMED,
    ]
    assert device.reports[-1].frames == GOOD.frames
    assert device.reports[-1].running == 1
    assert (device.shown.installed, device.shown.latest, device.shown.busy) == (1, 1, False)


def test_the_golden_set_is_fetched_first_and_a_delta_where_its_base_is_held(settled: Device) -> None:
    current = settled.table.current
    assert current is not None
    second = settled.authority.release(2, delta=(current.sha256, b"difference"))
    fetch = next(
        command
        for command in settled.arrives(settled.authority.manifest(second))
        if isinstance(command, Fetch)
    )
    assert second.delta is not None
    assert fetch.objects == (second.golden, second.delta.object)
    other = settled.authority.release(3, delta=("0" * 64, b"difference"))
    commands = settled.arrives(settled.authority.manifest(other))
    assert kinds(commands) == [Remember, StopWork, Fetch]
    fetch = next(command for command in commands if isinstance(command, Fetch))
    assert fetch.objects == (other.golden, other.model)


def test_what_a_delta_made_is_not_the_model_so_the_whole_is_fetched(settled: Device) -> None:
    current = settled.table.current
    assert current is not None
    second = settled.authority.release(2, delta=(current.sha256, b"difference"))
    settled.arrives(settled.authority.manifest(second))
    commands = settled.fails(second, ReleaseFault.WRONG_HASH)
    assert commands == [Fetch(commands[0].offer, None)]  # type: ignore[union-attr]  # a Fetch, as is asserted


def test_the_same_manifest_again_is_no_news_but_is_after_a_restart(settled: Device) -> None:
    release = settled.authority.release(2)
    manifest = settled.authority.manifest(release)
    assert Fetch in kinds(settled.arrives(manifest))
    assert settled.arrives(manifest) == []
    current = settled.table.current
    known = Known(settled.authority.keys, {Channel.STABLE: manifest.version}, manifest.version, 1.0)
    settled.restarts(known, current, None)
    assert kinds(settled.arrives(manifest)) == [Remember, Fetch]


def test_the_same_release_under_a_newer_manifest_changes_nothing(settled: Device) -> None:
    release = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(release))
    assert kinds(settled.arrives(settled.authority.manifest(release))) == [Remember]
    assert settled.table.stage is Stage.FETCHING


def test_the_same_model_under_another_number_is_not_loaded_again(settled: Device) -> None:
    current = settled.table.current
    assert current is not None
    again = settled.authority.release(2, model=settled.authority.objects[current.sha256])
    assert kinds(settled.arrives(settled.authority.manifest(again))) == [Remember, Adopt]
    assert settled.running == 2
    assert settled.last == (2, CONFIRMED, None)


def test_a_channel_without_a_release_leaves_the_model_alone(settled: Device) -> None:
    assert kinds(settled.arrives(settled.authority.manifest(None))) == [Remember]
    assert settled.running == 1


def test_a_newer_manifest_interrupts_the_fetch_and_the_test_of_an_older_one(settled: Device) -> None:
    second, third = settled.authority.release(2), settled.authority.release(3)
    settled.arrives(settled.authority.manifest(second))
    settled.feed(Fetched(second.model.sha256))
    assert kinds(settled.arrives(settled.authority.manifest(third))) == [Remember, StopWork, Fetch]
    assert settled.feed(Passed(second.model.sha256)) == []
    assert settled.fails(second, ReleaseFault.BROKEN) == []
    assert settled.table.target is not None
    assert settled.table.target.release == third


def test_going_back_to_an_earlier_release_needs_no_second_probation(settled: Device) -> None:
    first = settled.table.current
    assert first is not None
    settled.takes(settled.authority.release(2))
    commands = settled.arrives(settled.authority.manifest(first.release))
    assert Fetch in kinds(commands), "which finds the slot: nothing is downloaded"
    settled.feed(Fetched(first.sha256))
    activate = settled.feed(Passed(first.sha256))[-1]
    assert activate == Activate(settled.table.target or first, trial=False)
    settled.feed(Activated(first.sha256))
    assert settled.running == 1
    assert settled.last == (1, CONFIRMED, None)


# --- which of two channels --------------------------------------------------------------------------------------


def drawn(*, below: float) -> int:
    """A release number for which the test's device is drawn below, or not below, that share."""
    return next(number for number in range(2, 1000) if draw("garden", AGENT, number) < below)


def test_a_canary_is_taken_when_the_draw_says_so(settled: Device) -> None:
    canary = settled.authority.release(drawn(below=0.1))
    settled.goes_well(settled.arrives(settled.authority.manifest(canary, Channel.CANARY, share=0.1)))
    assert settled.running == canary.number


def test_a_canary_is_not_taken_by_a_device_that_is_not_drawn_until_its_share_grows(settled: Device) -> None:
    number = next(number for number in range(2, 1000) if draw("garden", AGENT, number) > 0.5)
    canary = settled.authority.release(number)
    settled.goes_well(settled.arrives(settled.authority.manifest(canary, Channel.CANARY, share=0.5)))
    assert settled.running == 1
    settled.goes_well(settled.arrives(settled.authority.manifest(canary, Channel.CANARY, share=1.0)))
    assert settled.running == number


def test_a_device_on_the_canary_channel_does_not_wait_to_be_drawn() -> None:
    device = Device(settings=Settings(Channel.CANARY, 100.0, 60.0, 20))
    canary = device.authority.release(5)
    device.goes_well(device.arrives(device.authority.manifest(canary, Channel.CANARY, share=0.0)))
    assert device.running == 5


def test_a_canary_that_is_called_off_during_its_probation_is_left_at_once_and_without_blame(
    settled: Device,
) -> None:
    canary = settled.authority.release(drawn(below=0.1))
    stable = settled.table.current
    assert stable is not None
    settled.arrives(settled.authority.manifest(stable.release))
    settled.goes_well(settled.arrives(settled.authority.manifest(canary, Channel.CANARY, share=0.1)))
    assert settled.table.on_probation
    commands = settled.arrives(settled.authority.manifest(None, Channel.CANARY))
    assert kinds(commands) == [Remember, RollBack]
    settled.goes_well(commands)
    assert settled.running == 1
    assert settled.last == (1, CONFIRMED, None)
    assert not any(isinstance(command, Quarantine) for command in settled.commands)


def test_a_canary_that_failed_here_leaves_the_stable_release(settled: Device) -> None:
    stable = settled.table.current
    assert stable is not None
    settled.arrives(settled.authority.manifest(stable.release))
    canary = settled.authority.release(drawn(below=0.1))
    settled.goes_well(settled.arrives(settled.authority.manifest(canary, Channel.CANARY, share=0.1)))
    settled.goes_well(settled.seen(Health(frames=3, non_finite=1)))
    assert settled.running == 1
    settled.goes_well(settled.arrives(settled.authority.manifest(canary, Channel.CANARY, share=0.5)))
    assert settled.running == 1
    assert settled.last == (canary.number, REFUSED, ReleaseFault.QUARANTINED)


# --- bad manifests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [ReleaseFault.MALFORMED, ReleaseFault.BAD_SIGNATURE, ReleaseFault.WRONG_FEDERATION]
)
def test_what_no_pinned_key_has_signed_changes_nothing_but_what_people_see(
    settled: Device, fault: ReleaseFault
) -> None:
    commands = settled.feed(ManifestRefused(Channel.STABLE, fault, "not signed"))
    assert kinds(commands) == []
    assert not settled.reports, "of what a stranger has written nothing is told to the aggregator"
    assert fault.value in settled.shown.text
    assert settled.running == 1


def test_an_expired_manifest_brings_nothing_and_takes_nothing_away(settled: Device) -> None:
    release = settled.authority.release(2)
    manifest = settled.authority.manifest(release, lifetime_s=0.0)
    assert kinds(settled.arrives(manifest)) == [Remember]
    assert settled.last == (2, REFUSED, ReleaseFault.EXPIRED)
    assert settled.running == 1
    current = settled.table.current
    assert current is not None
    settled.commands.clear()
    settled.arrives(settled.authority.manifest(current.release, lifetime_s=0.0))
    assert not settled.reports, "what runs already is not refused"
    settled.wall += 400 * DAY_S
    assert settled.feed(Tick()) == []
    assert settled.running == 1


def test_a_manifest_that_expires_while_its_release_is_fetched_is_given_up(settled: Device) -> None:
    release = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(release, lifetime_s=DAY_S))
    settled.wall += DAY_S - 1
    assert settled.feed(Tick()) == []
    settled.wall += 1
    assert kinds(settled.feed(Tick())) == [StopWork]
    assert settled.last == (2, REFUSED, ReleaseFault.EXPIRED)


def test_a_clock_that_has_fallen_back_is_not_believed(settled: Device) -> None:
    """A board without a battery: after a restart it is 1970, and a manifest that is long over comes on the other channel."""
    current = settled.table.current
    old = settled.authority.manifest(settled.authority.release(2), Channel.CANARY, lifetime_s=DAY_S)
    settled.authority.issued_at += 10 * DAY_S
    newest = settled.authority.manifest(settled.authority.release(3))
    known = Known(settled.authority.keys, {Channel.STABLE: newest.version}, newest.version, newest.issued_at)
    settled.wall = 0.0
    settled.restarts(known, current, None)
    settled.arrives(old)
    assert settled.last == (2, REFUSED, ReleaseFault.EXPIRED)
    assert Fetch in kinds(settled.arrives(newest)), "while the newest one is valid"


def test_time_goes_on_from_the_newest_manifest_where_the_clock_stands_still(device: Device) -> None:
    device.wall = 0.0
    release = device.authority.release(1)
    device.arrives(device.authority.manifest(release, lifetime_s=DAY_S))
    device.now += DAY_S
    assert kinds(device.feed(Tick())) == [StopWork]


def test_one_manifest_from_the_future_does_not_outdate_all_that_follow(settled: Device) -> None:
    settled.authority.issued_at += 5000 * DAY_S
    settled.arrives(settled.authority.manifest(settled.authority.release(2)))
    settled.authority.issued_at -= 5000 * DAY_S
    commands = settled.arrives(settled.authority.manifest(settled.authority.release(3)))
    assert kinds(commands) == [Remember, StopWork, Fetch]


def test_a_downgrade_is_refused_once_with_a_report_and_an_operator_can_go_back(settled: Device) -> None:
    first = settled.table.current
    assert first is not None
    settled.takes(settled.authority.release(2))
    version = settled.authority.version
    old = settled.authority.manifest(first.release, version=version - 1)
    settled.commands.clear()
    assert kinds(settled.arrives(old)) == []
    assert settled.last == (1, REFUSED, ReleaseFault.DOWNGRADE)
    assert settled.arrives(old) == [], "a broker may play it for ever"
    assert settled.running == 2
    settled.authority.version = version
    settled.goes_well(settled.arrives(settled.authority.manifest(first.release)))
    assert settled.running == 1


def test_an_older_manifest_of_what_is_named_now_is_no_reason_to_speak_ill_of_it(settled: Device) -> None:
    """As when a canary is widened, and a broker delivers the retained manifest after the newer one."""
    canary = settled.authority.release(drawn(below=0.1))
    narrow = settled.authority.manifest(canary, Channel.CANARY, share=0.1)
    wide = settled.authority.manifest(canary, Channel.CANARY, share=0.5)
    settled.goes_well(settled.arrives(wide))
    settled.commands.clear()
    assert settled.arrives(narrow) == []
    assert settled.running == canary.number
    settled.arrives(settled.authority.manifest(None, Channel.CANARY, version=wide.version + 1))
    assert settled.arrives(wide) == [], "nor of what runs, whatever is named now"


def test_what_this_device_cannot_run_is_refused_before_it_is_fetched_until_it_is_named_again(
    settled: Device,
) -> None:
    settled.lacks = "onnxruntime is too old"
    release = settled.authority.release(2)
    assert kinds(settled.arrives(settled.authority.manifest(release))) == [Remember]
    assert settled.last == (2, REFUSED, ReleaseFault.INCOMPATIBLE)
    assert settled.feed(Tick()) == []
    settled.lacks = ""
    assert Fetch in kinds(settled.arrives(settled.authority.manifest(release)))


def test_a_quarantined_model_is_never_taken_again_also_under_another_number(settled: Device) -> None:
    bad = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(bad))
    settled.feed(Fetched(bad.model.sha256))
    commands = settled.fails(bad, ReleaseFault.NON_FINITE)
    assert commands[0] == Quarantine(bad.model.sha256, ReleaseFault.NON_FINITE, "it is so")
    again = settled.authority.release(3, model=settled.authority.objects[bad.model.sha256])
    assert kinds(settled.arrives(settled.authority.manifest(again))) == [Remember]
    assert settled.last == (3, REFUSED, ReleaseFault.QUARANTINED)
    assert "non_finite" in settled.reports[-1].detail
    known = Known(settled.authority.keys, quarantine={bad.model.sha256: "non_finite: it is so"})
    settled.restarts(known, settled.table.current, None)
    assert kinds(settled.arrives(settled.authority.manifest(bad))) == [Remember]


# --- keys -------------------------------------------------------------------------------------------------------


def test_the_successor_takes_over_once_it_signs_and_nothing_is_believed_before_that_is_on_disk(
    device: Device,
) -> None:
    manifest = device.authority.manifest(device.authority.release(1))
    present, successor = device.authority.keys
    commands = device.arrives(manifest, signer=1)
    assert commands == [Pin((successor, manifest.next_key.hex()))]
    assert device.table.keys == (present, successor)
    assert device.feed(Tick()) == []
    wakeup = device.table.next_wakeup()
    assert wakeup is not None
    device.now = wakeup
    assert device.feed(Tick()) == commands, "the disk did not take them"
    assert kinds(device.feed(Pinned((successor, manifest.next_key.hex())))) == [Remember, Fetch]
    assert device.table.keys == (successor, manifest.next_key.hex())


def test_the_present_key_never_changes_pins(device: Device) -> None:
    keys = device.table.keys
    stranger = Authority().key
    manifest = device.authority.manifest(device.authority.release(1), next_key=stranger)
    assert Pin not in kinds(device.arrives(manifest))
    assert device.table.keys == keys


def test_a_thief_of_the_present_key_cannot_outrun_the_owner(settled: Device) -> None:
    authority = settled.authority
    own = authority.manifest(authority.release(2))
    authority.issued_at, year = settled.wall, 365 * 86400
    stolen = authority.manifest(authority.release(3), version=2**40, lifetime_s=100 * year)
    settled.arrives(msgspec.structs.replace(stolen, issued_at=settled.wall + 50 * year))
    assert settled.table.target is not None
    assert settled.table.target.release.number == 3
    commands = settled.arrives(own, signer=1)
    assert kinds(commands) == [Pin]
    settled.goes_well(commands)
    assert settled.running == 2
    assert settled.table.keys[0] == authority.keys[1]
    remembered = [command for command in settled.commands if isinstance(command, Remember)][-1]
    assert remembered.versions == {Channel.STABLE: own.version}
    assert remembered.issued_at == own.issued_at


def test_of_two_manifests_that_rotate_keys_the_newer_counts(settled: Device) -> None:
    authority = settled.authority
    older, newer = authority.manifest(authority.release(2)), authority.manifest(authority.release(3))
    settled.arrives(newer, signer=1)
    settled.goes_well(settled.arrives(older, signer=1))
    assert settled.running == 3


def test_manifests_of_both_channels_that_the_successor_signed_are_taken_with_one_rotation(
    device: Device,
) -> None:
    stable = device.authority.manifest(device.authority.release(1))
    canary = device.authority.manifest(device.authority.release(2), Channel.CANARY, share=1.0)
    device.arrives(stable, signer=1)
    commands = device.arrives(canary, signer=1)
    device.goes_well([command for command in commands if isinstance(command, Pin)])
    assert device.running == 2


# --- failures on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        ReleaseFault.BROKEN,
        ReleaseFault.WRONG_SHAPE,
        ReleaseFault.WRONG_ANSWER,
        ReleaseFault.NON_FINITE,
        ReleaseFault.TOO_BIG,
        ReleaseFault.CRASHED,
    ],
)
def test_a_release_that_fails_its_test_is_quarantined_and_the_current_one_runs_on(
    settled: Device, fault: ReleaseFault
) -> None:
    bad = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(bad))
    settled.feed(Fetched(bad.model.sha256))
    assert kinds(settled.fails(bad, fault)) == [Quarantine]
    assert settled.last == (2, REFUSED, fault)
    assert settled.reports[-1].running == 1
    assert settled.table.stage is None
    assert settled.running == 1


def test_a_busy_device_tests_a_slow_release_again_before_it_refuses_it(settled: Device) -> None:
    slow = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(slow))
    for _ in range(SLOW_TESTS - 1):
        settled.feed(Fetched(slow.model.sha256))
        assert kinds(settled.fails(slow, ReleaseFault.TOO_SLOW)) == []
        wakeup = settled.table.next_wakeup()
        assert wakeup is not None
        assert settled.feed(Tick()) == []
        settled.now = wakeup
        assert kinds(settled.feed(Tick())) == [Fetch]
    settled.feed(Fetched(slow.model.sha256))
    assert kinds(settled.fails(slow, ReleaseFault.TOO_SLOW)) == [Quarantine]


def test_a_full_disk_is_reported_once_and_tried_again_less_and_less_often(settled: Device) -> None:
    release = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(release))
    waits = []
    for _ in range(12):
        settled.fails(release, ReleaseFault.NO_SPACE, "no space left")
        wakeup = settled.table.next_wakeup()
        assert wakeup is not None
        waits.append(wakeup - settled.now)
        settled.now = wakeup
        assert kinds(settled.feed(Tick())) == [Fetch]
    assert waits[:3] == [30.0, 60.0, 120.0]
    assert waits[-1] == 3600.0
    told = [report for report in settled.reports if report.fault is ReleaseFault.NO_SPACE]
    assert len(told) == 1
    settled.goes_well(settled.feed(Fetched(release.model.sha256)))
    assert settled.running == 2


def test_a_fault_of_the_device_is_no_blame_on_the_release(settled: Device) -> None:
    release = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(release))
    settled.feed(Fetched(release.model.sha256))
    assert kinds(settled.fails(release, None, "cannot start a process")) == []
    assert "tried again" in settled.shown.text
    assert settled.table.stage is Stage.WAITING


def test_a_whole_that_is_not_what_was_signed_is_fetched_anew_a_few_times(settled: Device) -> None:
    release = settled.authority.release(2)
    settled.arrives(settled.authority.manifest(release))
    for _ in range(WRONG_HASHES - 1):
        assert kinds(settled.fails(release, ReleaseFault.WRONG_HASH)) == [Fetch]
    assert kinds(settled.fails(release, ReleaseFault.WRONG_HASH)) == []
    assert settled.last == (2, REFUSED, ReleaseFault.WRONG_HASH)
    assert Fetch in kinds(settled.arrives(settled.authority.manifest(release))), "a newer manifest, a new try"


# --- probation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "fault"),
    [
        (Health(frames=1, non_finite=1), ReleaseFault.NON_FINITE),
        (Health(frames=500, errors=1), ReleaseFault.ERRORS),
        (Health(frames=20, p50_ms=101.0, p99_ms=300.0), ReleaseFault.TOO_SLOW),
    ],
)
def test_a_release_that_fails_on_probation_gives_way_to_the_one_before(
    settled: Device, health: Health, fault: ReleaseFault
) -> None:
    second = settled.authority.release(2)
    settled.goes_well(settled.arrives(settled.authority.manifest(second)))
    commands = settled.seen(health)
    assert kinds(commands) == [Quarantine, RollBack]
    assert settled.last == (2, ROLLED_BACK, fault)
    assert settled.reports[-1].running == 1
    assert settled.reports[-1].frames == health.frames
    settled.goes_well(commands)
    assert settled.running == 1
    assert settled.last == (2, ROLLED_BACK, fault), "the last word about it stays on the broker"
    assert settled.seen(health) == []


def test_a_late_percentile_counts_at_the_end_of_probation(settled: Device) -> None:
    settled.goes_well(settled.arrives(settled.authority.manifest(settled.authority.release(2))))
    late = Health(frames=100, p50_ms=5.0, p99_ms=101.0)
    assert kinds(settled.seen(late)) == [], "one hiccup in few frames"
    settled.now += SETTINGS.probation_s
    assert kinds(settled.seen(late)) == [Quarantine, RollBack]
    assert settled.last == (2, ROLLED_BACK, ReleaseFault.TOO_SLOW)


def test_probation_lasts_until_there_were_enough_frames(settled: Device) -> None:
    settled.goes_well(settled.arrives(settled.authority.manifest(settled.authority.release(2))))
    settled.now += 100 * SETTINGS.probation_s
    assert kinds(settled.seen(Health(frames=19, p50_ms=5.0, p99_ms=5.0))) == []
    assert settled.table.on_probation
    assert kinds(settled.seen(Health(frames=20, p50_ms=5.0, p99_ms=5.0))) == [Confirm, Remember]


def test_a_release_that_crashes_the_process_is_given_up_at_the_next_start(settled: Device) -> None:
    second = settled.authority.release(2)
    known = Known(settled.authority.keys)
    commands = settled.restarts(known, slot(second, 2), settled.table.current, trial=True, crashes=True)
    assert kinds(commands) == [Quarantine, RollBack]
    assert settled.last == (2, ROLLED_BACK, ReleaseFault.CRASHED)


def test_a_restart_in_the_middle_of_probation_begins_it_anew(settled: Device) -> None:
    second = settled.authority.release(2)
    settled.restarts(Known(settled.authority.keys), slot(second, 2), settled.table.current, trial=True)
    assert settled.last == (2, PROBATION, None)
    settled.passes_probation()
    assert settled.last == (2, CONFIRMED, None)


def test_what_cannot_be_loaded_any_more_is_given_up_but_not_blamed_for_a_bad_disk(settled: Device) -> None:
    first = settled.table.current
    second = settled.authority.release(2)
    for fault, blamed in ((ReleaseFault.WRONG_HASH, False), (ReleaseFault.BROKEN, True)):
        settled.restarts(Known(settled.authority.keys), slot(second), first)
        commands = settled.feed(NotLoaded(fault, "it is so"))
        assert (Quarantine in kinds(commands)) is blamed
        assert kinds(commands)[-1] is RollBack
        assert settled.last == (2, ROLLED_BACK, fault)


def test_the_first_release_has_nothing_to_go_back_to_and_says_so(device: Device) -> None:
    first = device.authority.release(1)
    device.goes_well(device.arrives(device.authority.manifest(first)))
    commands = device.seen(Health(frames=1, errors=1))
    assert kinds(commands) == [Quarantine, RollBack]
    assert "no earlier release" in device.reports[-1].detail
    assert device.reports[-1].running is None
    device.goes_well(commands)
    assert device.running is None
    device.goes_well(device.arrives(device.authority.manifest(device.authority.release(2))))
    assert device.running == 2


def test_a_newer_release_cuts_a_trial_short_so_that_what_it_replaces_never_becomes_the_way_back(
    settled: Device,
) -> None:
    settled.goes_well(settled.arrives(settled.authority.manifest(settled.authority.release(2))))
    third = settled.authority.release(3)
    settled.arrives(settled.authority.manifest(third))
    settled.feed(Fetched(third.model.sha256))
    assert kinds(settled.feed(Passed(third.model.sha256))) == [RollBack]
    assert kinds(settled.feed(RolledBack(settled.table.previous))) == [Activate]
    settled.feed(Activated(third.model.sha256))
    assert settled.running == 3
    assert settled.table.previous is not None
    assert settled.table.previous.release.number == 1


def test_a_newer_release_waits_for_the_trial_of_the_first_one(device: Device) -> None:
    device.goes_well(device.arrives(device.authority.manifest(device.authority.release(1))))
    second = device.authority.release(2)
    device.goes_well(device.arrives(device.authority.manifest(second)))
    assert device.running == 1
    assert device.table.stage is Stage.READY
    device.now += SETTINGS.probation_s
    device.goes_well(device.seen(GOOD))
    assert device.running == 2
    assert device.table.previous is not None
    assert device.table.previous.release.number == 1


def test_a_newer_release_takes_over_when_the_first_one_fails_its_trial(device: Device) -> None:
    device.goes_well(device.arrives(device.authority.manifest(device.authority.release(1))))
    device.goes_well(device.arrives(device.authority.manifest(device.authority.release(2))))
    device.goes_well(device.seen(Health(frames=1, errors=1)))
    assert device.running == 2
