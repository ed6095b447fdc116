"""The doctor's checks on this device, and what it makes of what it hears."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from edge_agent import broker_checks, doctor
from edge_agent.findings import Finding, Level, render, report, skipped
from federation.bundle import Bundle, write_bundle
from federation.errors import ExitCode
from federation.task.inventory import Inventory
from federation.wire.messages import (
    STATE_INTERVAL_S,
    AggregatorState,
    FullModel,
    IdlePlan,
    ModelDelta,
    Plan,
    RoundPlan,
    TaskSpec,
    TrainSpec,
    encode_json,
)
from federation.wire.signing import AGGREGATOR, Purpose, public_key_hex, seal
from federation.wire.transfer import make_ref

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RUN = "0123456789abcdef"
TASK = TaskSpec(model="cnn", labels=("cat", "dog"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
IDLE = IdlePlan(run=RUN, round=3, finished=False, reason="waiting", issued_at=0.0)


def bundle_of(agent: str = "pi1", broker: str = "mqtt://127.0.0.1:1") -> Bundle:
    return Bundle(
        federation="home",
        agent=agent,
        private_key="11" * 32,
        aggregator_key=public_key_hex(KEY),
        broker=broker,
        username=agent,
        password="secret",
    )


def signed(plan: Plan, key: Ed25519PrivateKey = KEY) -> bytes:
    return seal(plan, purpose=Purpose.PLAN, federation="home", sender=AGGREGATOR, key=key)


def round_plan(
    *,
    model: str = "cnn",
    encoding: str = "int8",
    down_encoding: str = "int8",
    cohort: tuple[str, ...] = ("pi1",),
) -> RoundPlan:
    ref = make_ref(b"model", 64)
    return RoundPlan(
        run=RUN,
        round=4,
        attempt=1,
        task=TaskSpec(
            model=model, labels=TASK.labels, channels=1, height=8, width=8, mean=(0.5,), std=(0.5,)
        ),
        train=TrainSpec(),
        base="2" * 64,
        full=FullModel(version="1" * 64, object=ref),
        deltas=(ModelDelta(base="1" * 64, object=ref, encoding=down_encoding),),
        up_encoding=encoding,
        max_noise=0.0,
        cohort=cohort,
        deadline_s=60.0,
        issued_at=0.0,
        upload_chunk_bytes=1024,
    )


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)


def test_a_missing_bundle_fails_and_says_how_to_get_one(tmp_path: Path) -> None:
    finding, bundle = doctor.check_bundle(tmp_path / "none.json")
    assert bundle is None
    assert finding.failed
    assert "aggregator enroll" in finding.remedy


def test_a_bundle_that_others_can_read_is_a_warning_with_the_command_that_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "pi1.json"
    write_bundle(path, bundle_of())
    assert doctor.check_bundle(path)[0].level is Level.OK
    path.chmod(0o644)
    finding, bundle = doctor.check_bundle(path)
    assert bundle is not None
    assert finding.level is Level.WARN
    assert finding.remedy == f"chmod 600 {path}"


def test_a_state_folder_that_does_not_exist_is_judged_by_where_it_will_be_made(tmp_path: Path) -> None:
    finding = doctor.check_state_folder(tmp_path / "deep" / "state")
    assert finding.level is Level.OK
    assert str(tmp_path) in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_state_folder_that_takes_no_files_fails() -> None:
    finding = doctor.check_state_folder(Path("/proc/state"))
    assert finding.failed
    assert "--state" in finding.remedy


def test_little_room_on_the_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    levels = {}
    for free_mb in (doctor.LOW_DISK_MB, doctor.MIN_DISK_MB, doctor.MIN_DISK_MB - 1):
        free = free_mb << 20
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        levels[free_mb] = doctor.check_disk(tmp_path).level
    assert list(levels.values()) == [Level.OK, Level.WARN, Level.FAIL]


def test_every_unreadable_image_is_listed_at_once(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "cat" / f"{number}.png")
    picture(tmp_path / "dog" / "0.png")
    broken = [tmp_path / "cat" / "broken.png", tmp_path / "dog" / "torn.jpg"]
    broken[0].write_bytes(b"not a picture")
    broken[1].write_bytes(b"\xff\xd8\xff")
    finding = doctor.check_data(f"imagefolder:{tmp_path}", None)
    assert finding.failed
    assert "cat 4, dog 2" in finding.found
    assert all(str(path) in finding.found for path in broken)


def test_a_flood_of_unreadable_images_is_cut_and_counted() -> None:
    problems = tuple(f"image {number}" for number in range(doctor.UNREADABLE_SHOWN + 5))
    finding = doctor.judge_data(Inventory("here", {"a": 20, "b": 5}, problems))
    assert "25 cannot be read" in finding.found
    assert "and 5 more" in finding.found
    assert f"image {doctor.UNREADABLE_SHOWN}" not in finding.found


def test_one_class_fails_and_names_the_way_round(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "0.png")
    finding = doctor.check_data(f"imagefolder:{tmp_path}", None)
    assert finding.failed
    assert "--allow-single-class" in finding.remedy


def test_a_class_that_the_open_round_does_not_know_fails(tmp_path: Path) -> None:
    for name in ("cat", "dog", "emu"):
        picture(tmp_path / name / "0.png")
    spec = f"imagefolder:{tmp_path}"
    assert doctor.check_data(spec, None).level is Level.OK
    finding = doctor.check_data(spec, TASK)
    assert finding.failed
    assert "emu" in finding.found


def test_the_aggregators_clock_may_be_as_old_as_its_refresh() -> None:
    now = 1_750_000_000.0
    slack = broker_checks.ALLOWED_SKEW_S
    for told in (now, now - STATE_INTERVAL_S - slack, now + slack):
        assert broker_checks.check_clock(told, now).level is Level.OK
    behind = broker_checks.check_clock(now + slack + 1, now)
    ahead = broker_checks.check_clock(now - STATE_INTERVAL_S - slack - 1, now)
    assert (behind.level, ahead.level) == (Level.WARN, Level.WARN)
    assert "behind the aggregator" in behind.found
    assert "ahead of the aggregator" in ahead.found


def test_a_device_that_woke_up_in_1970_is_told_so() -> None:
    finding = broker_checks.check_clock(1_750_000_000.0, 100.0)
    assert "more than ten years behind" in finding.found
    assert "NTP" in finding.remedy


@pytest.mark.parametrize("payload", [b"", encode_json(AggregatorState(state="offline", session=RUN)), b"{"])
def test_without_an_aggregator_the_clock_is_skipped(payload: bytes) -> None:
    aggregator, clock = broker_checks.check_aggregator(payload, now=0.0)
    assert aggregator.level in (Level.WARN, Level.FAIL)
    assert aggregator.remedy
    assert clock.level is Level.SKIP


def test_a_plan_says_which_round_is_open_and_whether_this_agent_is_in_it() -> None:
    inside, _ = broker_checks.check_plan(signed(round_plan()), bundle_of())
    outside, plan = broker_checks.check_plan(signed(round_plan(cohort=("pi2",))), bundle_of())
    idle, _ = broker_checks.check_plan(signed(IDLE), bundle_of())
    assert "round 4 is open, 'pi1' is in its cohort" in inside.found
    assert "'pi1' is not among its cohort of 1" in outside.found
    assert isinstance(plan, RoundPlan)
    assert "no round is open after round 3: waiting" in idle.found
    assert {finding.level for finding in (inside, outside, idle)} == {Level.OK}


def test_a_plan_of_another_aggregator_fails() -> None:
    finding, plan = broker_checks.check_plan(signed(IDLE, Ed25519PrivateKey.generate()), bundle_of())
    assert plan is None
    assert finding.failed
    assert "bad_signature" in finding.found
    assert "enrol" in finding.remedy


def test_a_plan_that_this_device_cannot_carry_out_is_told() -> None:
    encoding, _ = broker_checks.check_plan(signed(round_plan(encoding="sq16")), bundle_of())
    down, _ = broker_checks.check_plan(signed(round_plan(down_encoding="sq17")), bundle_of())
    plugin, _ = broker_checks.check_plan(signed(round_plan(model="house.models:net")), bundle_of())
    assert encoding.failed
    assert "'sq16'" in encoding.found
    assert down.failed
    assert "'sq17'" in down.found
    assert plugin.level is Level.WARN
    assert "--allow-model house.models:net" in plugin.remedy


def test_the_first_failure_decides_the_exit_code() -> None:
    broker = Finding(check="login", level=Level.FAIL, found="no", exit_code=ExitCode.BROKER)
    data = Finding(check="data", level=Level.FAIL, found="no")
    warning = Finding(check="clock", level=Level.WARN, found="late", exit_code=ExitCode.BROKER)
    assert report([warning, *skipped(["plan"], "why")]).exit_code is ExitCode.OK
    assert report([warning, broker, data]).exit_code is ExitCode.BROKER
    assert report([data, broker]).exit_code is ExitCode.USAGE


def test_a_remedy_stands_on_the_next_line() -> None:
    lines = render(Finding(check="disk", level=Level.WARN, found="9 MiB", remedy="free some")).splitlines()
    assert lines[0].split() == ["warn", "disk", "9", "MiB"]
    assert lines[1].split(maxsplit=1) == ["->", "free some"]


def test_the_command_skips_what_depends_on_a_failure_and_exits_with_its_code(tmp_path: Path) -> None:
    path = tmp_path / "pi1.json"
    write_bundle(path, bundle_of(broker="mqtt://127.0.0.1:1"))  # nobody listens on port 1
    command = [sys.executable, "-m", "edge_agent.cli", "doctor", str(path), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == ExitCode.BROKER, done.stderr
    result = json.loads(done.stdout)
    levels = {finding["check"]: finding["level"] for finding in result["findings"]}
    assert result["exit_code"] == ExitCode.BROKER
    assert levels["network"] == "FAIL"
    assert levels["torch"] == "ok"
    assert {levels[check] for check in ("login", "rights", "aggregator", "clock", "plan", "data")} == {"skip"}
