"""The whole road of a release: `aggregator release`, `aggregator serve`, and devices that run it, each a real process."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from inferring import CONFIG, Inferring
from processes import TINY_TASK, Federation, MakeFederation, begin_tiny_run, run_command
from release_folders import exported
from releases import in_order, share_between

from aggregator.releases.records import ReleaseState, RequestKind
from aggregator.releases.store import ReleaseStore
from aggregator.status import collect
from aggregator.store import Store
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.wire.objects import ref_of_file

CHUNK_BYTES = 1024

SETTINGS = (
    *("--set", "release.step_s=1.0", "--set", "release.widen=100.0"),
    *("--set", "rounds.min_agents=9", "--log-format", "json"),
)
"""Rounds never begin: there is nobody to train."""

DEVICE = CONFIG + "home_assistant = false\n"


class Road:
    """A server and two devices that run models."""

    def __init__(self, folder: Path, federation: Federation) -> None:
        self.folder, self.federation = folder, federation
        begin_tiny_run(federation.state)
        self.database = Store(federation.state)
        self.store = ReleaseStore(self.database)
        self.server = federation.serve(*TINY_TASK, *SETTINGS)
        self.server.until_logged("waiting_for_agents")
        self.devices = {}
        for name in ("pi1", "pi2"):
            (folder / name).mkdir()
            self.devices[name] = Inferring(folder / name, federation.enroll(name), DEVICE)

    def release(self, folder: Path, *arguments: object) -> None:
        done = run_command("aggregator.cli", "release", folder, "--state", self.federation.state, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def state(self, number: int) -> ReleaseState | None:
        row = self.store.release(number)
        return None if row is None else row.state

    def becomes(self, number: int, state: ReleaseState) -> None:
        self.federation.until(lambda: self.state(number) is state, f"release {number} is {state.value}")

    def runs(self, number: int) -> None:
        """Wait until both devices label with it, as `aggregator status` says."""
        self.federation.until(
            lambda: [row.running for row in collect(self.federation.state).followers] == [number] * 2,
            f"both devices run release {number}",
        )

    def close(self) -> None:
        for device in self.devices.values():
            device.kill()
        self.database.close()


@pytest.fixture
def road(tmp_path: Path, make_federation: MakeFederation) -> Iterator[Road]:
    one = Road(tmp_path, make_federation("embedded"))
    yield one
    one.close()


@pytest.mark.network
@pytest.mark.timeout(900)
def test_a_good_release_reaches_all_devices_and_a_bad_one_only_the_first(tmp_path: Path, road: Road) -> None:
    first = exported(tmp_path / "first", federation="fleet")
    road.release(first, "--channel", "stable")
    road.runs(1)

    road.release(exported(tmp_path / "second", federation="fleet", scale=1.5), "--canary", "0.5")
    road.becomes(2, ReleaseState.STABLE)
    road.runs(2)

    # Signed as it should be, but its answers are not those of its golden set: no command of ours would release it.
    bad = exported(tmp_path / "bad", federation="fleet", scale=-1.0, answers_of=first)
    good = road.store.release(2)
    assert good is not None
    release = msgspec.structs.replace(
        good.release,
        number=3,
        model=ref_of_file(bad / MODEL_FILE, CHUNK_BYTES),
        golden=ref_of_file(bad / GOLDEN_FILE, CHUNK_BYTES),
        delta=None,
    )
    road.store.add(release, bad)
    early, late = in_order("fleet", 3, ["pi1", "pi2"])
    road.store.request(RequestKind.CANARY, 3, share_between("fleet", 3, early, late))
    road.becomes(3, ReleaseState.HALTED)
    halted = collect(road.federation.state).releases[2]
    assert halted.faults == {"wrong_answer": 1}
    assert set(road.store.reports(3)) == {early}, "the other device never saw it"
    road.runs(2)
    for device in road.devices.values():
        device.labels_on()
        assert device.failed == 0
