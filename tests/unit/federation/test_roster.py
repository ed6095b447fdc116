"""Rosters: what an operator carries to devices, and what a device keeps of whom it has seen."""

import re
from pathlib import Path

import pytest

from aggregator import cli
from aggregator.enrolment import Enrolment
from edge_agent.identities import Identities
from federation.errors import ConfigError, PeerError, Rejection
from federation.roster import read_roster, write_roster

KEYS = {"a": bytes(range(32)), "b-1": bytes(32)}


def test_a_roster_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_roster(tmp_path / "roster", "home", KEYS)
    assert read_roster(tmp_path / "roster", "home") == KEYS
    assert (tmp_path / "roster").read_text().startswith("[home]\na = ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[home\n", "is damaged"),
        ("[other]\n", "is of other, not of home"),
        ("", "is of nobody, not of home"),
        ('[home]\na = "zz"\n', "is damaged"),
        ('[home]\na = "00"\n', r"is damaged \(key of a\)"),
        ('[home]\n"A b" = "00"\n', "is damaged"),
        ("[home]\na = 3\n", "is damaged"),
    ],
)
def test_a_broken_roster_is_refused_with_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "roster").write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_roster(tmp_path / "roster", "home")
    assert "aggregator roster FILE" in str(refused.value)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none"))):
        read_roster(tmp_path / "none", "home")


def test_the_command_writes_whom_the_aggregator_has_enrolled(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path / "state", "home")
    for name in ("pi1", "pi2"):
        enrolment.enroll(name, broker_url="mqtt://127.0.0.1:9")
    cli.roster(tmp_path / "roster", federation="home", state=str(tmp_path / "state"))
    written = read_roster(tmp_path / "roster", "home")
    assert {name: key.hex() for name, key in written.items()} == dict(enrolment.agents())


def test_without_a_roster_the_first_key_of_a_name_is_kept_for_good(tmp_path: Path) -> None:
    seen = tmp_path / "roster"
    Identities("home", seen=seen).check({"a": KEYS["a"]})
    again = Identities("home", seen=seen)
    again.check(KEYS)
    again.check_names(["a", "b-1", "stranger"])
    for identities in (again, Identities("home", seen=seen)):
        with pytest.raises(PeerError, match="the key of 'a' is another one than in") as refused:
            identities.check({"a": bytes(32)})
        assert refused.value.code is Rejection.BAD_SIGNATURE
    assert read_roster(seen, "home") == KEYS


def test_with_a_roster_nobody_else_is_known(tmp_path: Path) -> None:
    write_roster(tmp_path / "pinned", "home", KEYS)
    identities = Identities("home", seen=tmp_path / "roster", pinned=tmp_path / "pinned")
    identities.check(KEYS)
    for names in (["a", "c"], ["c"]):
        with pytest.raises(PeerError, match="c not in the roster") as refused:
            identities.check_names(names)
        assert refused.value.code is Rejection.UNKNOWN_AGENT
    with pytest.raises(PeerError, match=r"another one than in .*pinned"):
        identities.check({"a": bytes(32)})
    with pytest.raises(PeerError, match="c not in the roster"):
        identities.check({"c": bytes(32)})
    assert not (tmp_path / "roster").exists()
