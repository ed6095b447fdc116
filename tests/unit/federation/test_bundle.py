import stat
from pathlib import Path

import msgspec
import pytest
from rich.pretty import pretty_repr
from structlog.testing import capture_logs

from federation.bundle import Bundle, address, read_bundle, write_bundle
from federation.errors import ConfigError

SEED = "5e" * 32
PASSWORD = "very-secret-password"


def bundle(**changes: object) -> Bundle:
    fields: dict[str, object] = {
        "federation": "fleet",
        "agent": "pi1",
        "private_key": SEED,
        "aggregator_key": "ab" * 32,
        "broker": "mqtt://broker.example:1884?version=3&max_packet=2048",
        "username": "pi1",
        "password": PASSWORD,
    }
    return msgspec.convert(fields | changes, Bundle)


def test_a_bundle_comes_back_as_it_was_written_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "pi1.json"
    write_bundle(path, bundle())
    with capture_logs() as logs:
        assert read_bundle(path) == bundle()
    assert logs == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_address_carries_the_account_and_the_limits_of_the_broker() -> None:
    where = address(bundle())
    assert (where.host, where.port, where.tls, where.version, where.max_packet_bytes) == (
        "broker.example",
        1884,
        False,
        3,
        2048,
    )
    assert (where.username, where.password, where.ca_pem) == ("pi1", PASSWORD, None)


def test_nothing_that_prints_a_bundle_shows_its_secrets() -> None:
    for shown in (repr(bundle()), str(bundle()), f"{bundle()}", pretty_repr(bundle())):
        assert SEED not in shown
        assert PASSWORD not in shown
        assert "pi1" in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a bundle"),
        (b"\xff\xfe", "not a bundle"),
        (b"[1]", "not a bundle"),
        (b'{"format": 2, "new": true}', "format 2, this fedge reads 1"),
        (b'{"format": 1}', "missing required field"),
        (b" " * ((1 << 20) + 1), "larger than"),
        (msgspec.json.encode(bundle()).replace(b"5e5e", b"XX"), "private_key"),
        (msgspec.json.encode(bundle()).replace(b'"agent"', b'"spy":1,"agent"'), "spy"),
        (msgspec.json.encode(bundle()).replace(b"mqtt://", b"http://"), "mqtt://"),
        (msgspec.json.encode(bundle()).replace(b"mqtt://", b"mqtt://u:p@"), "user name"),
    ],
)
def test_anything_but_a_bundle_is_refused_with_what_is_wrong(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=said) as refusal:
        read_bundle(path)
    assert PASSWORD not in str(refusal.value)


def test_a_missing_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregator enroll"):
        read_bundle(tmp_path / "none.json")


def test_a_bundle_that_others_can_read_is_used_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_bundle(path, bundle())
    path.chmod(0o644)
    with capture_logs() as logs:
        read_bundle(path)
    assert [(entry["event"], entry["mode"]) for entry in logs] == [("bundle_exposed", "0o644")]


def test_a_bundle_that_systemd_hands_over_is_not_exposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.json"
    write_bundle(path, bundle())
    path.chmod(0o440)  # what the access list of a credential looks like
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with capture_logs() as logs:
        read_bundle(path)
    assert logs == []
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "other"))
    with capture_logs() as logs:
        read_bundle(path)
    assert [entry["event"] for entry in logs] == ["bundle_exposed"]


def test_certificates_for_a_broker_without_tls_are_refused() -> None:
    with pytest.raises(ConfigError, match="mqtts://"):
        address(bundle(ca_pem="-----BEGIN CERTIFICATE-----"))
