"""edge_agent.inference_child: the process that labels frames beside the agent."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import structlog
from brokers import until
from fleets import gone

from edge_agent.inference_child import InferenceChild, inference_beside
from federation.errors import ConfigError

PATIENCE_S = 60.0

COUNTS = """
import pathlib, sys, time
lives = pathlib.Path(sys.argv[1])
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
"""


def lives(path: Path) -> int:
    return len(path.read_text()) if path.exists() else 0


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_it_is_started_again_when_it_crashes_and_ends_with_the_agent(tmp_path: Path) -> None:
    counter = tmp_path / "lives"
    code = COUNTS + "time.sleep(600) if len(lives.read_text()) > 2 else sys.exit(7)"
    with structlog.testing.capture_logs() as logs:
        with InferenceChild([str(counter)], command=python(code), retry_min_s=0.01) as child:
            until(lambda: lives(counter) == 3 and child.pid is not None, timeout_s=PATIENCE_S, what="3 lives")
            pid = child.pid
        assert gone(pid)
    crashes = [line for line in logs if line["event"] == "inference_ended"]
    assert [line["reason"] for line in crashes] == ["exit code 7"] * 2
    assert crashes[0]["retry_s"] < crashes[1]["retry_s"]


def test_a_kill_is_a_crash_too(tmp_path: Path) -> None:
    counter = tmp_path / "lives"
    with InferenceChild(
        [str(counter)], command=python(COUNTS + "time.sleep(600)"), retry_min_s=0.01
    ) as child:
        until(lambda: lives(counter) == 1 and child.pid is not None, timeout_s=PATIENCE_S, what="a life")
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: lives(counter) == 2, timeout_s=PATIENCE_S, what="another")


def test_it_may_end_by_itself_when_its_source_does(tmp_path: Path) -> None:
    counter = tmp_path / "lives"
    with structlog.testing.capture_logs() as logs:
        with InferenceChild([str(counter)], command=python(COUNTS), retry_min_s=0.01):
            until(
                lambda: any(line["event"] == "inference_source_ended" for line in logs),
                timeout_s=PATIENCE_S,
                what="its end",
            )
        assert lives(counter) == 1


def test_what_cannot_be_started_is_told_and_tried_again() -> None:
    with (
        structlog.testing.capture_logs() as logs,
        InferenceChild([], command=("/no/such/program",), retry_min_s=0.01),
    ):
        until(
            lambda: sum(line["event"] == "inference_ended" for line in logs) > 1,
            timeout_s=PATIENCE_S,
            what="two tries",
        )


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_it_does_not_outlive_an_agent_that_is_killed() -> None:
    code = (
        "import sys, time\n"
        "from edge_agent.inference_child import InferenceChild\n"
        "with InferenceChild([], command=(sys.executable, '-c', 'import time; time.sleep(600)')) as child:\n"
        "    while child.pid is None: time.sleep(0.01)\n"
        "    print('pid', child.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        said = next(line for line in agent.stdout if line.startswith("pid "))
        pid = int(said.split()[1])
        agent.kill()
    until(lambda: gone(pid), timeout_s=PATIENCE_S, what="its end")


def test_nothing_is_started_without_a_source_and_stdin_is_refused(tmp_path: Path) -> None:
    assert isinstance(inference_beside(tmp_path, "", {}), nullcontext)
    with pytest.raises(ConfigError, match="stdin"):
        inference_beside(tmp_path, "-", {})
