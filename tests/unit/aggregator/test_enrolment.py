import multiprocessing
import stat
from pathlib import Path

import bcrypt
import pytest
from structlog.testing import capture_logs

from aggregator.accounts import Account, new_account, rights
from aggregator.enrolment import Enrolment
from aggregator.nats import subjects
from federation.errors import ConfigError
from federation.wire.signing import private_key, public_key_hex
from federation.wire.topics import Topics

URL = "mqtt://broker.example:1883"


def test_a_bundle_and_the_aggregator_know_each_others_keys(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    bundle = enrolment.enroll("pi1", broker_url=URL)
    agent = private_key(bundle.private_key)
    assert bundle.aggregator_key == public_key_hex(enrolment.aggregator_key())
    assert enrolment.agents() == {"pi1": public_key_hex(agent)}
    pinned = enrolment.key_of("pi1")
    assert pinned is not None
    pinned.verify(agent.sign(b"letter"), b"letter")
    assert enrolment.key_of("pi2") is None
    assert enrolment.key_of("aggregator") is None


def test_identity_and_account_survive_a_restart(tmp_path: Path) -> None:
    first = Enrolment(tmp_path, "fleet")
    first.enroll("pi1", broker_url=URL)
    second = Enrolment(tmp_path, "fleet")
    assert public_key_hex(second.aggregator_key()) == public_key_hex(first.aggregator_key())
    assert second.aggregator_account() == first.aggregator_account()
    assert second.agents() == first.agents()


def test_the_password_of_an_agent_stands_in_its_bundle_alone(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with capture_logs() as logs:
        bundle = enrolment.enroll("pi1", broker_url=URL)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert bundle.password not in path.read_text()
            assert bundle.private_key not in path.read_text()
    assert bundle.password not in str(logs)
    account, password = new_account("aggregator", "00" * 32)
    assert password in account.password
    assert password not in repr(account)


def test_secrets_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    Enrolment(tmp_path / "state", "fleet").enroll("pi1", broker_url=URL)
    state = tmp_path / "state"
    for folder in ("identity", "broker/nats"):
        assert stat.S_IMODE((state / folder).stat().st_mode) == 0o700
        for path in (state / folder).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((state / "broker/mosquitto/passwd").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "1-63 of"), ("Pi", "1-63 of"), ("a/b", "1-63 of"), ("+", "1-63 of"), ("a" * 64, "1-63 of"), ("a\n", "1-63 of"), ("aggregator", "reserved")],
)  # fmt: skip
def test_a_bad_or_reserved_name_is_refused(tmp_path: Path, name: str, said: str) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with pytest.raises(ConfigError, match=said):
        enrolment.enroll(name, broker_url=URL)
    assert enrolment.agents() == {}


@pytest.mark.parametrize("url", ["http://x", "mqtt://", "mqtt://user:secret@host", "broker:1883"])
def test_a_broker_url_that_no_device_could_use_enrols_nobody(tmp_path: Path, url: str) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with pytest.raises(ConfigError) as refusal:
        enrolment.enroll("pi1", broker_url=url)
    assert "secret" not in str(refusal.value)
    assert enrolment.agents() == {}


def test_a_name_is_given_twice_only_on_request_and_then_the_old_bundle_is_void(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    old = enrolment.enroll("pi1", broker_url=URL)
    with pytest.raises(ConfigError, match="enrolled already"):
        enrolment.enroll("pi1", broker_url=URL)
    assert enrolment.agents() == {"pi1": public_key_hex(private_key(old.private_key))}
    new = enrolment.enroll("pi1", broker_url=URL, replace=True)
    assert enrolment.agents() == {"pi1": public_key_hex(private_key(new.private_key))}
    assert new.password != old.password


def test_a_revoked_agent_is_unknown_everywhere(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    enrolment.enroll("pi1", broker_url=URL)
    enrolment.revoke("pi1")
    assert enrolment.key_of("pi1") is None
    for file in ("mosquitto/passwd", "mosquitto/acl", "nats/accounts.conf"):
        text = (tmp_path / "broker" / file).read_text()
        assert "pi1" not in text
        assert "aggregator" in text
    with pytest.raises(ConfigError, match="enrolled: none"):
        enrolment.revoke("pi1")
    with pytest.raises(ConfigError, match="no agent 'aggregator'"):
        enrolment.revoke("aggregator")


def enroll_some(state: Path, start: int) -> None:
    enrolment = Enrolment(state, "fleet")
    for i in range(start, start + 8):
        enrolment.enroll(f"pi{i}", broker_url=URL)


def test_processes_that_enrol_at_once_lose_nothing_and_the_server_sees_it_while_it_runs(
    tmp_path: Path,
) -> None:
    server = Enrolment(tmp_path, "fleet")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=enroll_some, args=(tmp_path, start)) for start in (0, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    names = {f"pi{i}" for i in range(16)}
    assert server.key_of("pi15") is not None
    assert server.agents().keys() == names
    passwd = (tmp_path / "broker/mosquitto/passwd").read_text()
    assert {line.split(":")[0] for line in passwd.splitlines()} == names | {"aggregator"}


def test_the_broker_files_follow_the_accounts_after_a_crash_between_the_writes(tmp_path: Path) -> None:
    Enrolment(tmp_path, "fleet").enroll("pi1", broker_url=URL)
    acl = tmp_path / "broker/mosquitto/acl"
    whole = acl.read_text()
    acl.write_text("torn")
    Enrolment(tmp_path, "fleet")
    assert acl.read_text() == whole


def test_the_state_of_another_federation_is_not_touched(tmp_path: Path) -> None:
    Enrolment(tmp_path, "fleet")
    with pytest.raises(ConfigError, match="belongs to federation 'fleet'"):
        Enrolment(tmp_path, "other")
    with pytest.raises(ConfigError, match="federation name"):
        Enrolment(tmp_path, "No Name")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("accounts.json", b"{", "damaged"),
        ("accounts.json", b'{"format":2,"federation":"fleet","accounts":{}}', "format 2"),
        ("accounts.json", b'{"format":1,"federation":"fleet","accounts":{}}', "lack the aggregator"),
        ("aggregator.key", b"zz", "private key"),
        ("aggregator.key", b"5e" * 32, "not the key that devices were enrolled with"),
        ("aggregator.key", None, "cannot read the key file"),
    ],
)
def test_a_damaged_identity_is_said_and_never_replaced(
    tmp_path: Path, file: str, content: bytes | None, said: str
) -> None:
    Enrolment(tmp_path, "fleet")
    path = tmp_path / "identity" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        Enrolment(tmp_path, "fleet")
    assert not path.exists() if content is None else path.read_bytes() == content


def test_an_agent_may_do_exactly_what_the_protocol_gives_it() -> None:
    topics = Topics("fleet")
    account, _ = new_account("pi1", "00" * 32)
    own = "fedge/1/fleet/agent/pi1"
    granted = rights(account, topics)
    assert set(granted.publish) == {
        f"{own}/state",
        f"{own}/telemetry",
        f"{own}/up/#",
        f"{own}/predictions",
        f"{own}/model",
        "homeassistant/+/fedge-fleet-pi1/+/config",
    }
    assert set(granted.subscribe) == {
        "fedge/1/fleet/aggregator",
        "fedge/1/fleet/plan",
        "fedge/1/fleet/release/#",
        "fedge/1/fleet/object/#",
        f"{own}/down/#",
        f"{own}/state",
        f"{own}/model",
    }


def test_the_hashes_are_of_the_password() -> None:
    account: Account
    account, password = new_account("pi1", "00" * 32)
    assert bcrypt.checkpw(password.encode(), account.bcrypt_hash.encode())
    assert account.mosquitto_hash.startswith("$7$101$")
    assert account.password == ""


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [("a/b", ["a.b"]), ("a/+/state", ["a.*.state"]), ("a/b/#", ["a.b", "a.b.>"])],
)
def test_filters_become_subjects(filter_: str, expected: list[str]) -> None:
    assert subjects(filter_) == expected
