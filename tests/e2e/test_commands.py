"""What an operator gets wrong at the command line: one line that names the remedy, the documented exit code."""

import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from brokers import Broker, free_port
from devices import Device
from PIL import Image
from processes import (
    FEDERATION,
    TINY_TASK,
    Federation,
    MakeFederation,
    Process,
    begin_tiny_run,
    run_command,
)

from aggregator.enrolment import Enrolment
from federation.bundle import Bundle, write_bundle
from federation.errors import ExitCode

pytestmark = pytest.mark.network


def assert_one_error(code: int, text: str, expected: ExitCode, *parts: str) -> None:
    """The last line is the error, with all these parts in it; there is no traceback."""
    assert "Traceback" not in text, text
    assert code == expected, text
    last = text.splitlines()[-1]
    assert last.startswith("error: "), text
    for part in parts:
        assert part in last, last


def fails(module: str, *arguments: object, expected: ExitCode, says: tuple[str, ...]) -> None:
    done = run_command(module, *arguments)
    assert_one_error(done.returncode, done.stderr, expected, *says)


def tiny_state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    state.mkdir()
    begin_tiny_run(state)
    return state


def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    port = free_port()
    fails(
        "aggregator.cli",
        *("serve", "--federation", FEDERATION, "--state", tiny_state(tmp_path), *TINY_TASK),
        *("--broker", f"mqtt://127.0.0.1:{port}", "--set", "broker.connect_timeout_s=1"),
        expected=ExitCode.BROKER,
        says=(str(port), "check that it runs"),
    )


def test_a_wrong_password(tmp_path: Path, make_broker: Callable[..., Broker]) -> None:
    broker = make_broker("mosquitto", accounts={"aggregator": "another password"})
    fails(
        "aggregator.cli",
        *("serve", "--federation", FEDERATION, "--state", tiny_state(tmp_path), *TINY_TASK),
        *("--broker", broker.url),
        expected=ExitCode.BROKER,
        says=("password",),
    )


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "fedge.toml"
    file.write_text("[rounds]\nqorum = 0.7\n")
    fails(
        "aggregator.cli",
        *("serve", "--config", file, "--state", tmp_path / "state"),
        expected=ExitCode.USAGE,
        says=("qorum", "quorum", str(file)),
    )
    assert not (tmp_path / "state").exists(), "nothing was begun"


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails(
            "aggregator.cli",
            *("serve", "--federation", FEDERATION, "--state", tiny_state(tmp_path), *TINY_TASK),
            *("--listen", f"127.0.0.1:{port}"),
            expected=ExitCode.USAGE,
            says=(str(port), "choose another"),
        )


def test_a_second_aggregator_on_the_same_state(make_federation: MakeFederation) -> None:
    federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    first = federation.serve(*TINY_TASK)
    first.until_logged("broker_connected")
    second = federation.serve(*TINY_TASK, "--listen", f"127.0.0.1:{free_port()}")
    assert_one_error(second.wait(), second.text, ExitCode.USAGE, "another aggregator is serving")
    assert first.alive()


def pictures(folder: Path, *classes: str) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def agents_fail(
    folder: Path, bundles: dict[str, Bundle], data: dict[str, str], expected: dict[str, tuple[ExitCode, str]]
) -> None:
    """Start one agent for each name at the same time, since each must import torch before it can fail."""
    agents = {}
    for name, bundle in bundles.items():
        write_bundle(folder / f"{name}.json", bundle)
        arguments = ("run", folder / f"{name}.json", "--data", data[name], "--give-up-after", "2")
        agents[name] = Process(name, "edge_agent.cli", arguments, folder)
    try:
        for name, agent in agents.items():
            code, part = expected[name]
            assert_one_error(agent.wait(), agent.text, code, part)
    finally:
        for agent in agents.values():
            if agent.alive():
                agent.kill()


def test_an_agents_data_that_cannot_be_learned_from(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "one", "cat")
    pictures(tmp_path / "broken", "cat", "dog")
    (tmp_path / "broken" / "dog" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    bundle = Enrolment(tmp_path / "state", FEDERATION).enroll("a", broker_url="mqtt://127.0.0.1:9")
    expected = {
        "missing": (ExitCode.USAGE, str(tmp_path / "missing")),
        "empty": (ExitCode.USAGE, str(tmp_path / "empty")),
        "one": (ExitCode.USAGE, "--allow-single-class"),
        "broken": (ExitCode.USAGE, "x.png"),
    }
    agents_fail(
        tmp_path,
        dict.fromkeys(expected, bundle),
        {name: f"imagefolder:{tmp_path / name}" for name in expected},
        expected,
    )


def test_a_cap_in_a_unit_that_is_not_known(tmp_path: Path) -> None:
    for rate, remedy in {"200kB": "200 kB a second are 1.6mbit", "9kbit": "16kbit or more"}.items():
        fails(
            "edge_agent.cli",
            "run",
            tmp_path / "a.json",
            *("--data", "digits", "--max-rate", rate),
            expected=ExitCode.USAGE,
            says=(repr(rate), remedy),
        )


def test_an_agent_with_one_class_takes_part_if_it_is_allowed_to(make_federation: MakeFederation) -> None:
    federation = make_federation("mosquitto")
    pictures(federation.folder / "one", "cat")
    agent = federation.agent("a", f"imagefolder:{federation.folder / 'one'}", "--allow-single-class")
    agent.until_logged("broker_connected")
    assert agent.logged("data_opened", samples=3)
    assert agent.terminate() == 0


def test_an_agent_that_cannot_get_in(tmp_path: Path, make_federation: MakeFederation) -> None:
    federation = make_federation("mosquitto")
    bundle = federation.enroll("a")
    bundles = {
        "nowhere": msgspec.structs.replace(bundle, broker=f"mqtt://127.0.0.1:{free_port()}"),
        "password": msgspec.structs.replace(bundle, password="wrong"),
    }
    expected = {
        "nowhere": (ExitCode.BROKER, "check that it runs"),
        "password": (ExitCode.BROKER, "password"),
    }
    agents_fail(tmp_path, bundles, dict.fromkeys(bundles, "digits"), expected)


def test_of_two_agents_with_one_name_the_earlier_stops_and_the_later_goes_on(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation("embedded")
    for name in ("twin", "other"):
        federation.enroll(name)
    server = federation.serve("--data", "digits", "--rounds", 1, "--min-agents", 2, "--cohort-size", 2)
    first = federation.agent("twin", "digits@iid,agent=1/2", "--state", federation.folder / "first")
    server.until_logged("agent_online", agent="twin")
    second = federation.agent("twin", "digits@iid,agent=1/2", "--state", federation.folder / "second")
    assert_one_error(first.wait(), first.text, ExitCode.USAGE, "another process runs as 'twin'")
    other = Device(federation.enrolment_of("other")).connected()
    try:
        other.in_round(1)
        federation.until(lambda: federation.delivered(1) == 1, "the later one delivers")
    finally:
        other.stop()
    second.until_logged("update_accepted")
    assert second.terminate() == 0


def test_nothing_is_printed_but_help_for_no_command() -> None:
    for module in ("aggregator.cli", "edge_agent.cli", "export.cli"):
        done = run_command(module, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage" in done.stdout


def test_status_of_something_that_is_no_state(tmp_path: Path) -> None:
    fails("aggregator.cli", "status", tmp_path, expected=ExitCode.USAGE, says=(str(tmp_path), "state folder"))


def test_a_state_of_another_federation(make_federation: MakeFederation) -> None:
    federation: Federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    fails(
        "aggregator.cli",
        *("serve", "--federation", "other", "--state", federation.state, *TINY_TASK),
        *("--listen", f"127.0.0.1:{federation.port}"),
        expected=ExitCode.USAGE,
        says=("'fleet'", "'other'"),
    )


def test_a_name_that_no_agent_can_have_leaves_nothing_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = run_command("aggregator.cli", "enroll", "Bad Name", "--state", state)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.splitlines() == [
        "error: agent name 'Bad Name': use 1-63 of a-z, 0-9, _ and -, starting with a letter or digit"
    ]
    assert not state.exists()


def test_the_first_enrolment_says_that_it_makes_a_new_identity(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for name, expected in (("pi1", True), ("pi2", False)):
        done = run_command("aggregator.cli", "enroll", name, "--state", state, "-o", tmp_path / name)
        assert done.returncode == ExitCode.OK, done.stderr
        assert ("the identity of a new aggregator" in done.stdout) is expected
