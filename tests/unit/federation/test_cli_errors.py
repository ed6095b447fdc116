"""federation.cli: what a person sees when a command ends badly, tried in real processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from federation.cli import new_app, run
from federation.errors import *
from federation.logs import configure

app = new_app("A test command.")

@app.command()
def work(name: str) -> None:
    configure()
    import structlog
    log = structlog.get_logger()
    if name == "verification":
        raise VerificationError("the hash is wrong: fetch it again")
    if name == "broker":
        raise TransportError("no broker at mqtt://x: start one")
    if name == "peer":
        raise PeerError(Rejection.LATE, "round 3 is closed")
    if name == "missing":
        Path("/nowhere/at/all").read_bytes()
    if name == "folder":
        Path("/").read_bytes()
    if name == "defect":
        raise ZeroDivisionError
    if name == "log":
        secret = "hunter2"
        try:
            raise ValueError("wrong")
        except ValueError:
            log.exception("work_failed", attempt=3)
        log.debug("hidden")
    if name == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    if name == "flood":
        for number in range(200_000):
            print(number)

@app.command()
def other() -> None:
    print("buffered")

run(app)
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    return [sys.executable, str(script)]


def _work(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("verification", 5, "error: the hash is wrong: fetch it again\n"),
        ("broker", 3, "error: no broker at mqtt://x: start one\n"),
        ("peer", 5, "error: late: round 3 is closed\n"),
        ("missing", 2, "error: /nowhere/at/all: No such file or directory\n"),
        ("folder", 2, "error: /: Is a directory\n"),
        ("fine", 0, ""),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    program: list[str], name: str, code: int, message: str
) -> None:
    done = _work(program, "work", name)
    assert (done.returncode, done.stderr, done.stdout) == (code, message, "")


def test_a_defect_keeps_its_traceback(program: list[str]) -> None:
    done = _work(program, "work", "defect")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_wrong_option_is_a_usage_error(program: list[str]) -> None:
    done = _work(program, "work", "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def test_interrupt_ends_with_130_and_without_a_traceback(program: list[str]) -> None:
    with subprocess.Popen(
        [*program, "work", "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [("work", "flood"), ("other",)])
def test_a_closed_pipe_is_quiet(program: list[str], arguments: tuple[str, ...]) -> None:
    with subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        errors = child.stderr.read()
        child.wait(timeout=60)
    assert errors == b""
    assert child.returncode == 1


def test_events_are_json_lines_without_local_variables(program: list[str]) -> None:
    done = _work(program, "work", "log")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    event = json.loads(line)
    assert event["event"] == "work_failed"
    assert event["attempt"] == 3
    assert "ValueError: wrong" in event["exception"]
    assert "hunter2" not in event["exception"]
