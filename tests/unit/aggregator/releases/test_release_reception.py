"""aggregator.releases.reception: order among reports, who lives, and bounds on what a device may say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from releases import add_release

from aggregator.releases.reception import BURST, REFILL_S, ReleaseReception
from aggregator.releases.rollout_events import FollowerSeen, Reported
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.wire.messages import encode_json
from federation.wire.predictions import ModelState
from federation.wire.release import ReleaseReport, RolloutState
from federation.wire.signing import Purpose, private_key, seal

KEY = private_key("7" * 64)
FIRST, SECOND = "1" * 16, "2" * 16
CONFIRMED, ROLLED_BACK = RolloutState.CONFIRMED, RolloutState.ROLLED_BACK


class Door:
    """The reception of a server that knows one device, ``pi1``, and two releases."""

    def __init__(self, folder: Path) -> None:
        self.database = Store(folder / "state", "home", create=True)
        self.store = ReleaseStore(self.database)
        self.releases = [add_release(self.store, folder).release for _ in range(2)]
        self.now = 50.0
        self.enrolled = {"pi1"}
        self.open()

    def open(self) -> None:
        """As the next process."""
        keys = KEY.public_key()
        self.reception = ReleaseReception(
            self.database, self.store, "home", lambda agent: keys if agent in self.enrolled else None
        )

    def reports(
        self,
        state: RolloutState,
        *,
        number: int = 1,
        at: float = 10.0,
        session: str = FIRST,
        retained: bool = False,
        **fields: Any,
    ) -> Reported | FollowerSeen | None:
        report = ReleaseReport(
            session=session,
            number=number,
            sha256=self.releases[number - 1].model.sha256,
            manifest=5,
            state=state,
            time=at,
        )
        payload = seal(
            msgspec.structs.replace(report, **fields),
            purpose=Purpose.RELEASE_REPORT,
            federation="home",
            sender="pi1",
            key=KEY,
        )
        return self.reception.message("pi1", "release", payload, self.now, retained=retained)

    def shows(
        self, *, online: bool, session: str = FIRST, retained: bool = False
    ) -> Reported | FollowerSeen | None:
        model = ModelState(
            installed_version="1",
            latest_version="1",
            in_progress=False,
            title="home",
            online=online,
            session=session,
        )
        return self.reception.message("pi1", "model", encode_json(model), self.now, retained=retained)

    @property
    def kept(self) -> RolloutState:
        return self.store.reports(1)["pi1"].report.state

    @property
    def refused(self) -> dict[str, int]:
        return self.database.refusal_counts()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    one = Door(tmp_path)
    yield one
    one.database.close()


def test_a_report_is_on_disk_before_it_counts(door: Door) -> None:
    assert door.reports(CONFIRMED) == Reported("pi1", 1, 5, CONFIRMED)
    assert door.kept is CONFIRMED


def test_the_same_report_again_is_no_news_nor_a_fault(door: Door) -> None:
    """It is retained, and comes after each connect."""
    door.reports(CONFIRMED)
    assert door.reports(CONFIRMED, retained=True) is None
    door.open()
    assert door.reports(CONFIRMED, retained=True) is None
    assert door.refused == {}


def test_an_older_report_of_the_same_life_is_refused_also_by_the_next_process(door: Door) -> None:
    door.reports(CONFIRMED, at=10.0)
    door.reports(ROLLED_BACK, at=20.0)
    assert door.reports(CONFIRMED, at=10.0) is None
    door.open()
    assert door.reports(CONFIRMED, at=10.0) is None
    assert door.refused == {"duplicate": 2}
    assert door.kept is ROLLED_BACK


def test_a_failure_counts_though_the_clock_was_set_back(door: Door) -> None:
    door.reports(RolloutState.PROBATION, at=1000.0)
    assert door.reports(ROLLED_BACK, at=10.0) == Reported("pi1", 1, 5, ROLLED_BACK)


def test_a_report_of_an_earlier_life_is_refused_also_by_the_next_process(door: Door) -> None:
    door.reports(CONFIRMED, session=FIRST, at=1e9)
    door.reports(ROLLED_BACK, session=SECOND, at=5.0)
    assert door.kept is ROLLED_BACK, "a clock without a battery began anew"
    assert door.reports(CONFIRMED, session=FIRST, at=2e9) is None
    door.open()
    assert door.reports(CONFIRMED, session=FIRST, at=2e9) is None
    assert door.refused == {"duplicate": 2}


def test_what_a_life_said_that_ended_while_nobody_listened_counts(door: Door) -> None:
    """The device has come back meanwhile, and has nothing to add."""
    door.shows(online=True, session=SECOND)
    assert door.reports(ROLLED_BACK, session=FIRST, retained=True) == Reported("pi1", 1, 5, ROLLED_BACK)


def test_after_a_restart_a_device_may_speak_of_an_older_manifest(door: Door) -> None:
    """What it runs was brought by that one."""
    door.reports(CONFIRMED, manifest=9)
    assert door.reports(ROLLED_BACK, session=SECOND, manifest=5, at=3.0) is not None


def test_a_stranger_is_not_heard(door: Door) -> None:
    door.enrolled.clear()
    assert door.reports(ROLLED_BACK) is None
    assert door.shows(online=True) is None
    assert door.store.followers() == {}


def test_lives_and_deaths(door: Door) -> None:
    assert door.shows(online=True) == FollowerSeen("pi1", online=True)
    assert door.shows(online=True, session=SECOND) == FollowerSeen("pi1", online=True)
    assert door.shows(online=False, session=FIRST) is None, "the will of the earlier life"
    assert door.shows(online=False, session=SECOND) == FollowerSeen("pi1", online=False)
    follower = door.store.followers()["pi1"].model
    assert follower is not None
    assert not follower.online


def test_a_retained_birth_after_the_death_that_replaced_it_is_ignored(door: Door) -> None:
    """nats-server may deliver both to somebody who subscribes at that moment."""
    door.shows(online=False)
    assert door.shows(online=True, retained=True) is None
    door.reception.connected()
    assert door.shows(online=True, retained=True) == FollowerSeen("pi1", online=True)


def test_the_death_of_a_device_whose_birth_an_earlier_process_heard_counts(door: Door) -> None:
    door.shows(online=True, session=FIRST)
    door.open()
    assert door.shows(online=False, session=SECOND, retained=True) == FollowerSeen("pi1", online=False)


def test_what_a_device_writes_is_no_command_to_a_terminal(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    door.reports(ROLLED_BACK, detail="slow \x1b[2Jand\nsteady")
    shown = capsys.readouterr()
    assert "slow ?[2Jand?steady" in shown.out + shown.err


def test_a_flood_is_held_back_and_its_last_word_counts(door: Door) -> None:
    for number in range(BURST + 50):
        door.reports(RolloutState.FETCHING, at=float(number))
    door.reports(ROLLED_BACK, at=1000.0)
    assert door.kept is RolloutState.FETCHING
    assert door.reception.tick(door.now) == []
    door.now += REFILL_S
    assert door.reception.tick(door.now) == [Reported("pi1", 1, 5, ROLLED_BACK)]
    assert door.kept is ROLLED_BACK
    assert door.reception.tick(door.now + 100) == [], "once"


def test_rubbish_is_bounded_like_all_else(door: Door) -> None:
    for _ in range(BURST + 50):
        door.reception.message("pi1", "release", b"rubbish", door.now, retained=False)
        door.reception.message("pi1", "model", b"{}", door.now, retained=False)
    assert door.refused == {"malformed": BURST}


def test_a_device_that_is_forgotten_may_come_back(door: Door) -> None:
    door.reports(CONFIRMED)
    door.reception.forget("pi1")
    assert door.store.followers() == {}
    assert door.reports(CONFIRMED) == Reported("pi1", 1, 5, CONFIRMED)
