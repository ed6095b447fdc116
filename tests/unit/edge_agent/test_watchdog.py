"""edge_agent.watchdog: signs of life through a real socket, where systemd would listen."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from brokers import until
from linear_model import make_model
from release_authority import Authority
from stations import bundle_of

from edge_agent.inference_child import InferenceChild
from edge_agent.watchdog import ChildWatch, Notifier
from federation.bundle import write_bundle

PATIENCE_S = 60.0
TORCH_S = 240.0
"""Importing torch takes half a minute on two slow cores, and minutes beside other work."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Systemd:
    """What listens at ``NOTIFY_SOCKET``."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(address)

    def heard(self) -> list[list[str]]:
        """The lines of each datagram since the last look."""
        datagrams = []
        try:
            while True:
                datagrams.append(self.socket.recv(4096).decode().split("\n"))
        except BlockingIOError:
            return datagrams


@pytest.fixture(params=["path", "abstract"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """The value of ``NOTIFY_SOCKET``, and the address behind it."""
    if request.param == "path":
        return str(tmp_path / "notify"), str(tmp_path / "notify")
    return f"@fedge-test-{tmp_path}"[:90], f"\0fedge-test-{tmp_path}"[:90]


@pytest.fixture
def systemd(place: tuple[str, str]) -> Iterator[Systemd]:
    listening = Systemd(place[1])
    yield listening
    listening.socket.close()


def test_ready_comes_first_and_then_a_sign_four_times_a_limit(
    place: tuple[str, str], systemd: Systemd
) -> None:
    clock = Clock()
    notifier = Notifier(place[0], limit_s=40.0, clock=clock)
    assert notifier.period_s == 10.0
    notifier.alive(lambda: "waiting for\na first model")
    assert systemd.heard() == [["READY=1", "WATCHDOG=1", "STATUS=waiting for a first model"]]
    clock.now += 9.9
    notifier.alive(lambda: pytest.fail("nothing is due"))
    assert systemd.heard() == []
    clock.now += 0.1
    notifier.alive()
    assert systemd.heard() == [["WATCHDOG=1"]]
    notifier.stopping()
    assert systemd.heard() == [["STOPPING=1", "STATUS=stopping"]]
    notifier.close()


def test_ready_is_said_again_until_it_got_through(place: tuple[str, str]) -> None:
    notifier = Notifier(place[0], limit_s=40.0)
    notifier.alive()
    listening = Systemd(place[1])
    notifier.alive()
    assert listening.heard() == [["READY=1", "WATCHDOG=1"]]
    listening.socket.close()
    notifier.close()


def test_a_full_queue_does_not_hold_up_the_loop(place: tuple[str, str], systemd: Systemd) -> None:
    clock = Clock()
    notifier = Notifier(place[0], limit_s=1.0, clock=clock)
    for _ in range(10_000):  # far more than the kernel queues
        clock.now += 1
        notifier.alive()
    heard = systemd.heard()
    assert heard
    assert len(heard) < 10_000
    notifier.close()


@pytest.mark.parametrize("target", ["", "vsock:2:1234", "relative"])
def test_nobody_is_told_where_nobody_asked(target: str) -> None:
    notifier = Notifier(target)
    assert notifier.period_s is None
    notifier.alive(lambda: pytest.fail("nobody listens"))
    notifier.stopping()


@pytest.mark.parametrize(
    ("variables", "period_s"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": "@x"}, 10.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "8000000"}, 2.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())}, 2.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "1"}, 10.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "soon"}, 10.0),
    ],
)
def test_the_environment_says_whom_to_tell_and_children_do_not_see_it(
    variables: dict[str, str], period_s: float | None
) -> None:
    environment = {"PATH": "/bin", **variables}
    assert Notifier.from_environment(environment).period_s == period_s
    assert environment == {"PATH": "/bin"}


def test_a_child_is_hung_when_it_is_silent_and_has_time_to_start() -> None:
    clock = Clock()
    watch = ChildWatch(60.0, 300.0, clock)
    watch.started()
    environment = watch.environment({"PATH": "/bin", "WATCHDOG_PID": "1", "NOTIFY_SOCKET": "/ours"})
    assert environment["PATH"] == "/bin"
    child_clock = Clock()
    child = Notifier(environment["NOTIFY_SOCKET"], int(environment["WATCHDOG_USEC"]) / 1e6, child_clock)
    clock.now += 299
    assert not watch.hung()
    assert not watch.ready
    child.alive(lambda: "labelling frames")
    assert not watch.hung()
    assert (watch.ready, watch.status) == (True, "labelling frames")
    clock.now += 59
    child_clock.now += 59
    child.alive()
    assert not watch.hung()
    clock.now += 61
    assert watch.hung()
    child_clock.now += 61
    child.alive(lambda: "an earlier one")
    watch.started()
    assert not watch.hung()
    assert (watch.ready, watch.status) == (False, "")
    child.close()
    watch.close()


def test_what_a_stranger_sends_is_bounded_and_is_no_sign() -> None:
    clock = Clock()
    watch = ChildWatch(60.0, 300.0, clock)
    target = watch.environment({})["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.setblocking(False)
        for datagram in (b"", b"\xff" * 10_000, b"XREADY=1\n" * 200, b"STATUS=" + b"x" * 10_000):
            stranger.sendto(datagram, "\0" + target[1:])
    clock.now += 301
    assert watch.hung()
    assert not watch.ready
    assert len(watch.status) <= 200
    watch.close()


HANGS_ONCE = """
import pathlib, sys, time
from edge_agent.watchdog import Notifier
lives = pathlib.Path(sys.argv[1])
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
notifier = Notifier.from_environment()
notifier.alive()
def hangs():
    time.sleep(600)
if len(lives.read_text()) == 1:
    hangs()
while True:
    time.sleep(0.05)
    notifier.alive()
"""


def test_the_agent_starts_inference_again_that_hangs_and_leaves_alone_what_lives(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lives = tmp_path / "lives"
    silent_s = (
        8.0  # of a process that says something every two seconds; a loaded machine may take seconds for it
    )
    with (
        structlog.testing.capture_logs() as logs,
        InferenceChild(
            [str(lives)],
            command=(sys.executable, "-c", HANGS_ONCE),
            retry_min_s=0.01,
            silent_s=silent_s,
        ) as child,
    ):
        until(
            lambda: any(line["event"] == "inference_ended" for line in logs),
            timeout_s=PATIENCE_S,
            what="the end of what hung",
        )
        until(
            lambda: lives.read_text() == "xx" and child.pid is not None,
            timeout_s=PATIENCE_S,
            what="its successor",
        )
    assert [line["reason"] for line in logs if line["event"] == "inference_ended"] == ["it hung"]
    assert "in hangs" in capfd.readouterr().err, "nobody learns where it hung"


HANGS_AT_A_FRAME = """
import sys, threading, time
from pathlib import Path
import numpy as np
from edge_agent.inference.feed import Feed, Frame
from edge_agent.inference.loop import InferenceLoop
from edge_agent.watchdog import Notifier
from federation.task.engine import Engine

class Pictures(Feed):
    def start(self): pass
    def stop(self): pass
    def close(self): pass
    def take(self, timeout_s):
        time.sleep(0.02)
        return Frame(name="picture", image=np.zeros((6, 5), np.uint8))

class Hanging(Engine):
    frames = 0
    def predict(self, frame):
        self.frames += 1
        if self.frames == 50:
            print("hangs", flush=True)
            time.sleep(600)
        return super().predict(frame)

notifier = Notifier.from_environment()
loop = InferenceLoop(Pictures(), [], on_turn=lambda: notifier.alive(lambda: str(loop.awaits_model)))
threading.Thread(target=loop.run, daemon=True).start()
sys.stdin.readline()
loop.install(Hanging(Path(sys.argv[1])))
time.sleep(600)
"""

LIMIT_S = 2.0


def told(systemd: Systemd, signs: list[list[str]], line: str) -> bool:
    """Whether this line was ever heard; keeps all that was."""
    signs += systemd.heard()
    return any(line in datagram for datagram in signs)


def watched(place: tuple[str, str], limit_s: float = LIMIT_S) -> dict[str, str]:
    own = {"NOTIFY_SOCKET": place[0], "WATCHDOG_USEC": str(round(limit_s * 1e6))}
    return os.environ | own | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("place", ["path"], indirect=True)
def test_waiting_for_a_model_is_no_fault_and_a_model_that_hangs_is(
    place: tuple[str, str], systemd: Systemd, tmp_path: Path
) -> None:
    model = make_model(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HANGS_AT_A_FRAME, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=watched(place),
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            signs: list[list[str]] = []
            until(lambda: told(systemd, signs, "READY=1"), timeout_s=PATIENCE_S, what="ready")
            signs.clear()
            until(
                lambda: told(systemd, signs, "STATUS=True"),
                timeout_s=PATIENCE_S,
                what="a sign without a model",
            )
            process.stdin.write("\n")
            process.stdin.flush()
            until(
                lambda: told(systemd, signs, "STATUS=False"), timeout_s=PATIENCE_S, what="a sign with a model"
            )
            assert "hangs\n" in iter(process.stdout.readline, "")  # after the log's lines
            systemd.heard()
            assert not select.select([systemd.socket], [], [], LIMIT_S)[0], "it hangs and says that it lives"
        finally:
            process.kill()


@pytest.mark.parametrize("place", ["abstract"], indirect=True)
def test_an_agent_that_only_trains_tells_its_state_while_its_broker_is_away(
    systemd: Systemd, place: tuple[str, str], tmp_path: Path
) -> None:
    bundle = tmp_path / "pi1.bundle.json"
    write_bundle(bundle, bundle_of(Authority()))
    arguments = [str(bundle), "--data", "digits", "--telemetry", "0", "--log-format", "json"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "edge_agent.cli", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=watched(place),
        ) as process,
    ):
        try:
            signs: list[list[str]] = []
            until(lambda: told(systemd, signs, "READY=1"), timeout_s=TORCH_S, what="ready")
            assert signs == [["READY=1", "WATCHDOG=1", "STATUS=waiting for the broker"]]
            signs.clear()
            until(
                lambda: len(signs) > 1 or told(systemd, signs, ""),
                timeout_s=PATIENCE_S,
                what="two more signs",
            )
            assert "WATCHDOG=1" in signs[1]
            process.terminate()
            until(lambda: told(systemd, signs, "STOPPING=1"), timeout_s=PATIENCE_S, what="its goodbye")
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_a_process_without_the_variables_says_nothing() -> None:
    code = (
        "import socket\n"
        "from edge_agent.watchdog import Notifier\n"
        "socket.socket = None\n"
        "notifier = Notifier.from_environment()\n"
        "notifier.alive(); notifier.stopping(); notifier.close()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=PATIENCE_S)
