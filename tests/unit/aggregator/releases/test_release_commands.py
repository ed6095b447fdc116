"""``aggregator release | rollback | releases | release-key`` without a server: what is asked for, said and refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from release_folders import FEDERATION, exported, make_stable
from typer.testing import CliRunner

from aggregator.cli import app
from aggregator.releases.commands import share_of
from aggregator.releases.keys import ReleaseKeys
from aggregator.releases.records import ReleaseState, RequestKind, StoredRequest
from aggregator.releases.rollout_events import Announce, Mark
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.errors import ConfigError, VerificationError
from federation.release import MODEL_FILE
from federation.wire.release import Channel


class Desk:
    """An operator's desk: a state folder, and the commands that are typed."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.releases = ReleaseStore(store)

    def run(self, *arguments: object) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments), "--state", str(self.store.folder)])
        if done.exception is not None:
            raise done.exception
        return done.output

    def refused(self, *arguments: object) -> str:
        with pytest.raises(ConfigError) as refused:
            self.run(*arguments)
        return str(refused.value)

    def made(self, count: int, *, stable: tuple[int, ...] = ()) -> None:
        for number in range(1, count + 1):
            self.run("release", exported(self.folder / f"export-{number}", scale=float(number)), "--hold")
            if number in stable:
                row = self.releases.release(number)
                assert row is not None
                make_stable(self.releases, row)

    def requests(self) -> list[StoredRequest]:
        return self.releases.requests()

    def asked(self) -> tuple[RequestKind, int | None, float | None]:
        (request,) = self.requests()
        return request.kind, request.number, request.share


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Store(tmp_path / "state", FEDERATION, create=True) as store:
        yield Desk(tmp_path, store)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ((), (RequestKind.CANARY, 1, None)),
        (("--channel", "canary"), (RequestKind.CANARY, 1, None)),
        (("--canary", "25%"), (RequestKind.CANARY, 1, 0.25)),
        (("--channel", "stable"), (RequestKind.STABLE, 1, None)),
        (("--set", "release.canary=1.0"), (RequestKind.STABLE, 1, None)),
        (("--set", "release.canary=1.0", "--canary", "0.5"), (RequestKind.CANARY, 1, 0.5)),
    ],
)
def test_what_a_release_asks_of_the_server(
    desk: Desk, options: tuple[str, ...], asked: tuple[RequestKind, int | None, float | None]
) -> None:
    said = desk.run("release", exported(desk.folder / "export"), *options)
    assert desk.asked() == asked
    assert said.startswith("release  1: round 3, fp32")
    assert "no server is running; next: `aggregator serve --stay`" in said


def test_a_release_for_programs(desk: Desk) -> None:
    answer = json.loads(desk.run("release", exported(desk.folder / "export"), "--json", "--notes", "first"))
    assert answer["number"] == 1
    assert answer["channel"] == "canary"
    assert answer["server"] is None
    assert answer["model_bytes"] == (desk.folder / "export" / MODEL_FILE).stat().st_size


def test_a_release_may_be_held_back_and_announced_later(desk: Desk) -> None:
    said = desk.run("release", exported(desk.folder / "export"), "--hold")
    assert desk.requests() == []
    assert "next: aggregator release --number 1" in said
    desk.run("release", "--number", 1, "--channel", "stable")
    assert desk.asked() == (RequestKind.STABLE, 1, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("release", "--number", 7), "no release 7; there is 1, 2"),
        (("release", "--number", 1, "--round", 3), "leave FOLDER, --round and --hold away"),
        (("release", "--number", 1, "--hold"), "leave FOLDER, --round and --hold away"),
        (("release", "nowhere"), "not a release folder"),
        (("release", "nowhere", "--round", 3), "leave one away"),
        (("release", "--channel", "stable", "--canary", "10%"), "leave one away"),
        (("release", "--canary", "110%"), "at most 100%"),
        (("release",), "no checkpoint yet"),
        (("rollback", "--to", 7), "no release 7; there is 1, 2"),
        (("rollback", "--to", 1, "--channel", "stable"), "leave --channel away"),
        (("rollback",), "no release was announced yet"),
        (("rollback", "--channel", "stable"), "no release was announced yet"),
        (("rollback", "--channel", "canary"), "no canary is under way"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_asked_for(
    desk: Desk, arguments: tuple[object, ...], said: str
) -> None:
    desk.made(2)
    assert said in desk.refused(*arguments)
    assert desk.requests() == []


def test_before_the_first_release(desk: Desk) -> None:
    assert "no release yet" in desk.refused("rollback")
    assert "no release yet; next: aggregator release" in desk.run("releases")
    assert json.loads(desk.run("releases", "--json"))["releases"] == []
    assert "there is none yet" in desk.refused("release", "--number", 1)


def test_a_folder_that_is_no_state_folder_stays_as_it_was(tmp_path: Path) -> None:
    for command in (["release"], ["rollback"], ["releases"], ["release-key"]):
        done = CliRunner().invoke(app, [*command, "--state", str(tmp_path / "nowhere")])
        assert isinstance(done.exception, ConfigError)
    assert not (tmp_path / "nowhere").exists()


def test_rolling_back_goes_to_the_release_before(desk: Desk) -> None:
    desk.made(3, stable=(1, 2, 3))
    desk.run("rollback")
    assert desk.asked() == (RequestKind.ROLLBACK, 2, None)


def test_rolling_back_to_a_release_that_is_named(desk: Desk) -> None:
    desk.made(3, stable=(1, 2, 3))
    desk.run("rollback", "--to", 1)
    assert desk.asked() == (RequestKind.ROLLBACK, 1, None)


def test_the_first_release_has_none_before_it(desk: Desk) -> None:
    desk.made(1, stable=(1,))
    assert "no release before 1 to go back to" in desk.refused("rollback")


def test_a_canary_is_taken_back_first(desk: Desk) -> None:
    desk.made(3, stable=(1, 2))
    desk.releases.carry_out([Announce(Channel.CANARY, 3, 0.5, 1), Mark(3, ReleaseState.CANARY, "")])
    desk.run("rollback")
    assert desk.asked() == (RequestKind.ROLLBACK, None, None)
    desk.releases.answer(desk.requests()[0].id, "done")
    desk.run("rollback", "--channel", "stable")
    assert desk.asked() == (RequestKind.ROLLBACK, 1, None)


def test_a_release_whose_files_are_gone_cannot_be_announced(desk: Desk) -> None:
    desk.made(2, stable=(1, 2))
    (desk.store.folder / "releases" / "1" / MODEL_FILE).unlink()
    for arguments in (("rollback",), ("rollback", "--to", 1), ("release", "--number", 1)):
        assert "release round 3 again" in desk.refused(*arguments)


def test_the_list_says_what_became_of_each(desk: Desk) -> None:
    desk.made(2, stable=(1,))
    desk.run("release", "--number", 2)
    said = desk.run("releases")
    assert "stable" in said
    assert "stored" in said
    assert "1 request waits for a server" in said
    found: dict[str, Any] = json.loads(desk.run("releases", "--json"))
    assert (found["stable"], found["canary"], found["waiting"]) == (1, None, 1)
    first, second = found["releases"]
    assert first["status"]["state"] == "stable"
    assert second["delta_bytes"] > 0
    assert second["release"]["round"] == 3
    assert "digests" not in json.dumps(found), "a list of chunks is of no use to anybody"


def test_why_nothing_was_released_by_itself_is_kept_until_something_is(desk: Desk) -> None:
    desk.made(1, stable=(1,))
    worse = exported(desk.folder / "worse", scale=-1.0)
    with pytest.raises(VerificationError, match="cannot be compared with release 1"):
        desk.run("release", worse, "--auto")
    assert "cannot be compared with release 1" in desk.run("releases")
    assert "cannot be compared" in json.loads(desk.run("releases", "--json"))["refused"]
    desk.run("release", worse)
    assert json.loads(desk.run("releases", "--json"))["refused"] == ""


def test_the_keys_are_shown_and_rotated(desk: Desk) -> None:
    keys = ReleaseKeys(desk.store.folder)
    present, successor = keys.pair().pinned
    said = desk.run("release-key")
    assert f"release key  {present}\nsuccessor    {successor}" in said
    assert f"move {keys.successor_file} to a safe place" in said
    said = desk.run("release-key", "--rotate")
    assert keys.pair().pinned[0] == successor
    assert f"release key  {successor}" in said
    assert "Devices enrolled before take the new key's manifest" in said
    assert "start `aggregator serve --stay`" in said


def test_a_rotation_wants_the_successor_back(desk: Desk) -> None:
    keys = ReleaseKeys(desk.store.folder)
    keys.successor_file.rename(desk.folder / "safe.key")
    assert "kept elsewhere" in desk.run("release-key")
    assert "bring it back" in desk.refused("release-key", "--rotate")


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), ("0.1", 0.1), ("100%", 1.0), ("1", 1.0), ("0.5%", 0.005)]
)
def test_shares_as_people_write_them(text: str, share: float) -> None:
    assert share_of(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "0", "-1", "1.1", "101%", "ten", "nan", "10 %x"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ConfigError, match="write a share of the devices"):
        share_of(text)
