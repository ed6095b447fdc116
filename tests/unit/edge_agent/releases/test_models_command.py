"""``edge-agent models``: what is on the device, beside a process that owns it; forgiving what failed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slot_releases import made, put
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.places import MODELS
from edge_agent.releases.slots import Slots
from federation.errors import ConfigError, ReleaseFault
from federation.release import MODEL_FILE

BAD = made(4)


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[Slots]:
    """A device on probation with release 3, which has given up release 4; it holds its folder."""
    with Slots(tmp_path / "pi1.state" / MODELS, clock=lambda: 1_800_000_000.0) as opened:
        for number in (1, 2):
            opened.activate(put(opened, made(number)))
            opened.end_probation()
        put(opened, BAD)
        opened.quarantine(BAD.sha256, ReleaseFault.TOO_SLOW, "120.0 ms from frame to label")
        opened.activate(put(opened, made(3)))
        opened.count_start()
        yield opened


def shown(folder: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["models", str(folder / "pi1.bundle.json"), *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def report(folder: Path, *arguments: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(shown(folder, "--json", *arguments))
    return loaded


@pytest.mark.usefixtures("slots")
def test_it_tells_what_is_there_while_the_device_runs(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert (found["current"], found["previous"]) == (3, 2)
    assert found["probation"] == {"since": 1_800_000_000.0, "starts": 1}
    places = [(one["number"], one["place"]) for one in found["releases"]]
    assert places == [(3, "current"), (2, "previous"), (4, ""), (1, "")]
    assert [one["damage"] for one in found["releases"]] == [""] * 4
    (record,) = found["quarantine"]
    assert (record["number"], record["sha256"], record["fault"]) == (4, BAD.sha256, "too_slow")


@pytest.mark.usefixtures("slots")
def test_people_read_the_same(tmp_path: Path) -> None:
    text = shown(tmp_path)
    (current,) = [line for line in text.splitlines() if line.startswith("current")]
    assert made(3).sha256[:12] in current
    assert "on probation since 2027-01-15 08:00:00 UTC, 1 starts" in current
    assert "too_slow: 120.0 ms from frame to label" in text


@pytest.mark.parametrize("which", ["4", BAD.sha256, BAD.sha256[:6]])
def test_a_release_is_forgiven_by_number_or_hash(slots: Slots, tmp_path: Path, which: str) -> None:
    assert shown(tmp_path, "--forgive", which).startswith("forgiven: release 4")
    assert slots.quarantined(BAD.sha256) is None
    assert report(tmp_path)["quarantine"] == []


@pytest.mark.parametrize("which", ["5", "x", ""])
def test_nothing_else_is_forgiven(slots: Slots, tmp_path: Path, which: str) -> None:
    with pytest.raises(ConfigError, match=r"means nothing in quarantine; there is release 4"):
        shown(tmp_path, "--forgive", which)
    assert slots.quarantined(BAD.sha256) is not None


def test_two_that_are_meant_are_both_named(slots: Slots, tmp_path: Path) -> None:
    twin = made(4, model=b"another model")
    put(slots, twin)
    slots.quarantine(twin.sha256, ReleaseFault.ERRORS, "")
    with pytest.raises(ConfigError, match="means 2 models"):
        shown(tmp_path, "--forgive", "4")
    shown(tmp_path, "--forgive", twin.sha256)
    assert slots.quarantined(BAD.sha256) is not None


def test_damage_is_told(slots: Slots, tmp_path: Path) -> None:
    (slots.folder / "current" / MODEL_FILE).write_bytes(b"rotten")
    found = report(tmp_path)
    assert found["current"] is None
    assert "SHA-256" in found["releases"][0]["damage"]
    assert "no model runs" in shown(tmp_path)
    assert "damaged: " in shown(tmp_path)


def test_after_the_last_release_was_given_up_nothing_runs(slots: Slots, tmp_path: Path) -> None:
    slots.quarantine(made(3).sha256, ReleaseFault.CRASHED, "")
    assert report(tmp_path)["current"] is None, "not before it has gone back"
    slots.roll_back()
    found = report(tmp_path)
    assert (found["current"], found["previous"], found["probation"]) == (2, None, None)


def test_a_device_that_never_followed_releases_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not there.*`edge-agent infer`"):
        shown(tmp_path)
    with pytest.raises(ConfigError, match="BUNDLE, or --state"):
        CliRunner().invoke(app, ["models"], catch_exceptions=False)


@pytest.mark.usefixtures("slots")
def test_the_state_may_be_elsewhere(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["models", "--state", str(tmp_path / "pi1.state"), "--json"])
    assert json.loads(done.stdout)["current"] == 3


def test_it_costs_the_other_commands_nothing() -> None:
    code = (
        "import sys, edge_agent.cli; "
        "assert not {'cryptography', 'edge_agent.releases.models_report'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
