"""`edge-agent install-service`: what stands in the unit, what systemd's own tools say of it, and what is refused."""

import grp
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from release_authority import Authority
from stations import bundle_of
from typer.testing import CliRunner

import edge_agent.cli
from edge_agent.service_command import DEFAULT_NAME
from edge_agent.service_setup import group_that_reads, own_executable, path_of_data, path_of_source
from edge_agent.service_unit import Camera, Service, command_line, render
from edge_agent.systemd import install
from federation.bundle import write_bundle
from federation.errors import ConfigError

DEPLOYED = Path(__file__).parents[3] / "deploy" / "fedge-agent.service"
APP = typer.main.get_group(edge_agent.cli.app)

TOO_EXPOSED = 3.0
"""Of systemd's 0 (no rights at all) to 10. The unit has 1.8 with a camera, in systemd 252."""


def service(**changes: Any) -> Service:
    settings: dict[str, Any] = {
        "name": DEFAULT_NAME,
        "executable": Path(sys.executable),
        "bundle": Path("/etc/fedge/pi1.bundle.json"),
        "memory_max": "512M",
        "infers": True,
        "flags": (("--source", "0"),),
        "camera": Camera.V4L,
    }
    return Service(**settings | changes)


SERVICES = {
    "camera": service(),
    "picamera": service(camera=Camera.LIBCAMERA, flags=(("--source", "picamera"),)),
    "trains": service(
        trains=True, infers=False, camera=Camera.NONE, flags=(("--data", "imagefolder:/srv/p"),)
    ),
    "all": service(
        trains=True,
        flags=(("--data", "imagefolder:/home/pi/my 100% $x"), ("--source", "0")),
        config=Path("/etc/fedge/agent.toml"),
        roster=Path("/etc/fedge/roster.toml"),
        readable=(Path("/home/pi/my 100% $x"), Path("/srv/a:b")),
        groups=("users", "video"),
        gpu=True,
        systemd=257,
    ),
    "user": service(user=True, config=Path("/home/pi/my agent.toml")),
}


def settings_of(unit: str) -> dict[str, list[str]]:
    """Each directive's values, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        if line and not line.startswith(("#", "[")):
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(key, []).append(value)
    return found


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(edge_agent.cli.app, ["install-service", *map(str, arguments)])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "pi1.bundle.json"
    write_bundle(path, bundle_of(Authority()))
    return path


@pytest.mark.parametrize("each", SERVICES.values(), ids=SERVICES)
def test_every_service_is_watched_bounded_and_started_for_ever(each: Service) -> None:
    unit = settings_of(render(each))
    assert unit["Type"] == ["notify"]
    assert int(unit["WatchdogSec"][0]) >= 60
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["MemoryMax"] == ["512M"]
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert ("RestartSteps" in unit) == (each.systemd >= 254)


@pytest.mark.parametrize("kind", ["camera", "picamera", "trains", "all"])
def test_the_systems_service_has_no_rights_and_its_secrets_stay_roots(kind: str) -> None:
    unit = settings_of(render(SERVICES[kind]))
    assert unit["DynamicUser"] == ["yes"]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["LoadCredential"][0] == "bundle.json:/etc/fedge/pi1.bundle.json"
    assert "${CREDENTIALS_DIRECTORY}/bundle.json" in unit["ExecStart"][0]
    assert "/etc/fedge" not in unit["ExecStart"][0]


def test_devices_are_opened_for_cameras_and_gpus_only() -> None:
    camera, picamera = (settings_of(render(SERVICES[kind])) for kind in ("camera", "picamera"))
    trains, everything = (settings_of(render(SERVICES[kind])) for kind in ("trains", "all"))
    assert camera["DeviceAllow"] == ["char-video4linux rw"]
    assert "char-media rw" in picamera["DeviceAllow"]
    assert camera["SupplementaryGroups"] == ["video"]
    assert trains["PrivateDevices"] == ["yes"]
    assert not trains.keys() & {"DeviceAllow", "SupplementaryGroups"}
    assert everything["SupplementaryGroups"] == ["users video render"]
    assert not everything.keys() & {"DeviceAllow", "DevicePolicy", "PrivateDevices"}


def test_what_lies_in_a_home_is_bound_into_an_empty_one() -> None:
    unit = settings_of(render(SERVICES["all"]))
    assert unit["ProtectHome"] == ["tmpfs"]
    assert unit["BindReadOnlyPaths"] == ['"/home/pi/my 100%% $x"', '"/srv/a:b"']
    assert settings_of(render(SERVICES["camera"]))["ProtectHome"] == ["yes"]


@pytest.mark.parametrize("each", SERVICES.values(), ids=SERVICES)
def test_the_command_of_the_unit_is_one_of_ours(each: Service) -> None:
    line = settings_of(render(each))["ExecStart"][0].replace("$$", "$").replace("%%", "%")
    program, command, *words = shlex.split(line)
    assert program == str(each.executable)
    assert command == ("run" if each.trains else "infer")
    context = APP.commands[command].make_context(command, words)
    for flag, value in each.flags:
        assert context.params[flag.removeprefix("--")] == value


@pytest.mark.parametrize("each", SERVICES.values(), ids=SERVICES)
def test_systemd_understands_every_line(each: Service, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    said = subprocess.run([analyze, "--version"], capture_output=True, text=True, check=True).stdout
    if each.systemd > int(said.split()[1]):
        pytest.skip("the unit is for a newer systemd")
    file = tmp_path / f"{each.name}.service"
    file.write_text(render(each))
    scope = ["--user"] if each.user else []
    verified = subprocess.run(
        [analyze, *scope, "verify", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    complaints = [line for line in verified.stderr.splitlines() if file.name in line]
    assert (verified.returncode, complaints) == (0, [])
    if not each.user:
        rated = subprocess.run(
            [analyze, "security", "--offline=true", str(file)], capture_output=True, text=True, check=True
        )
        level = re.search(r"exposure level for \S+: ([0-9.]+)", rated.stdout)
        assert level is not None
        assert float(level[1]) < TOO_EXPOSED


def test_the_deployed_unit_is_what_the_command_prints() -> None:
    unit = render(
        service(
            executable=Path("/opt/fedge/bin/edge-agent"),
            trains=True,
            memory_max="80%",
            flags=(("--data", "imagefolder:/srv/pictures"), ("--source", "0"), ("--publish", "mqtt")),
            readable=(Path("/srv/pictures"),),
        )
    )
    assert DEPLOYED.read_text() == unit, "write it anew with the command below"
    printed = run(
        *("/etc/fedge/pi1.bundle.json", "--data", "imagefolder:/srv/pictures", "--source", "0"),
        *("--publish", "mqtt", "--executable", "/opt/fedge/bin/edge-agent", "--print"),
    )
    assert printed.exit_code == 0, printed.output
    newer = [line for line in printed.stdout.splitlines() if line.startswith(("RestartSteps", "RestartMax"))]
    assert [line for line in printed.stdout.splitlines() if line not in newer] == unit.splitlines()


def test_paths_become_full_ones_and_settings_may_come_from_the_file(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(bundle, "--data", "imagefolder:./imagefolder@iid,agent=1/2", "--print")
    assert f"--data imagefolder:{tmp_path}/imagefolder@iid,agent=1/2" in printed.stdout
    config = tmp_path / "agent.toml"
    config.write_text('[inference]\nsource = "rtsp://admin:secret@camera/1"\n')
    printed = run(bundle, "--config", config, "--print")
    assert "edge-agent infer ${CREDENTIALS_DIRECTORY}/bundle.json" in printed.stdout
    assert "secret" not in printed.stdout
    assert f"LoadCredential=agent.toml:{config}" in printed.stdout
    config.write_text('[inference]\nmodel = "/home/pi/model.onnx"\n')
    printed = run(bundle, "--config", config, "--source", "0", "--print")
    assert "BindReadOnlyPaths=/home/pi/model.onnx" in printed.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no BUNDLE"),
        (["b.json"], "give --data to train"),
        (["b.json", "--source", "-"], "stdin"),
        (["b.json", "--source", "rtsp://admin:secret@camera/1"], "--config"),
        (["b.json", "--source", "0", "--name", "../x"], "--name"),
        (["b.json", "--source", "0", "--memory-max", "lots"], "--memory-max"),
        (["b.json", "--source", "a\nb"], "unit file"),
        (["b.json", "--config", "relative.toml"], "full path"),
        (["b.json", "--config", "absolute.toml"], "own folder"),
        (["b.json", "--config", "model.toml", "--source", "0"], "full path"),
    ],
)
def test_what_no_service_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative.toml").write_text('data = "imagefolder:pictures"\n')
    (tmp_path / "absolute.toml").write_text('data = "digits"\n[inference]\nsave = "/srv/labels.jsonl"\n')
    (tmp_path / "model.toml").write_text('[inference]\nmodel = "model.onnx"\n')
    refused = run(*arguments, "--print")
    assert isinstance(refused.exception, ConfigError)
    assert said in str(refused.exception)
    assert "secret" not in str(refused.exception)
    assert refused.output == ""


def test_an_old_systemd_cannot_hand_over_the_bundle() -> None:
    with pytest.raises(ConfigError, match="247 or newer"):
        service(systemd=245)
    assert service(systemd=245, user=True).user


def test_a_machine_without_systemd_is_told_of_print(bundle: Path) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd runs this machine")
    refused = run(bundle, "--source", "0")
    assert isinstance(refused.exception, ConfigError)
    assert "--print" in str(refused.exception)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and a ``systemctl`` that writes down what it was told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_installing_twice_changes_nothing_and_another_unit_stays(home: Path) -> None:
    unit = render(service(user=True))
    file = home / ".config/systemd/user/fedge-agent.service"
    first = install("fedge-agent", unit, user=True)
    assert file.read_text() == unit
    assert first[0].startswith("wrote")
    assert any("enable --now fedge-agent" in line for line in first)
    assert "as it should be" in install("fedge-agent", unit, user=True)[0]
    assert any("restart" in line for line in install("fedge-agent", unit.replace("512M", "1G"), user=True))
    assert (home / "told").read_text() == "--user daemon-reload\n" * 3
    file.write_text("[Service]\n")
    with pytest.raises(ConfigError, match="another --name"):
        install("fedge-agent", unit, user=True)
    assert file.read_text() == "[Service]\n"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("imagefolder:/a/b", "/a/b"),
        ("mnist:x@shards(2),agent=1/3", "x"),
        ("digits", None),
        ("package.module:factory", None),
        ("module:factory", None),
    ],
)
def test_data_is_a_folder_or_a_name(spec: str, path: str | None) -> None:
    assert path_of_data(spec) == (None if path is None else Path(path))


@pytest.mark.parametrize("source", ["", "0", "picamera", "rtsp://camera/1", "/dev/v4l/by-id/x"])
def test_a_camera_is_no_folder(source: str) -> None:
    assert path_of_source(source) is None


def test_who_may_read_the_pictures(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pictures.chmod(0o755)
    assert group_that_reads(pictures) is None
    pictures.chmod(0o700)
    with pytest.raises(ConfigError, match=r"chmod -R o\+rX"):
        group_that_reads(pictures)
    pictures.chmod(0o750)
    if os.geteuid() == 0:
        with pytest.raises(ConfigError, match="group other than root's"):
            group_that_reads(pictures)
        users = grp.getgrnam("users")
        os.chown(pictures, 0, users.gr_gid)
        assert group_that_reads(pictures) == "users"


def test_the_program_is_the_one_of_this_installation() -> None:
    assert own_executable() == Path(sys.executable).parent / "edge-agent"
    assert command_line(service(executable=own_executable()))[0] == str(own_executable())
