"""``edge-agent infer`` as a process in front of a network camera, a video, a broker: what it says, survives and ends with."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from brokers import free_port
from fleets import Served, mosquitto_served
from linear_model import make_model
from network_camera import NetworkCamera
from PIL import Image
from processes import Process, run_command
from slot_releases import made, put

from aggregator.enrolment import Enrolment
from edge_agent.places import MODELS, default_state
from edge_agent.releases.slots import Slots
from federation.bundle import write_bundle
from federation.wire.link import Message
from federation.wire.messages import decode_json
from federation.wire.predictions import PredictionMessage
from federation.wire.topics import Topics

pytestmark = pytest.mark.network

AGENT = "pi1"
StartInfer = Callable[..., Process]


@pytest.fixture
def camera() -> Iterator[NetworkCamera]:
    camera = NetworkCamera()
    yield camera
    camera.vanish()


@pytest.fixture
def infer(tmp_path: Path) -> Iterator[StartInfer]:
    """Start ``edge-agent infer``; ended with the test."""
    started: list[Process] = []

    def start(*arguments: object) -> Process:
        log = ("--log-format", "json")
        started.append(
            Process(f"infer-{len(started)}", "edge_agent.cli", ["infer", *arguments, *log], tmp_path)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()


def predictions(process: Process) -> list[dict[str, Any]]:
    """What it has printed with --json."""
    lines = (line for line in process.text.splitlines() if line.startswith('{"label"') and line.endswith("}"))
    return [json.loads(line) for line in lines]


def until_label(process: Process, label: str) -> None:
    """Wait until the newest prediction has this label."""
    process.until(lambda: bool(found := predictions(process)) and found[-1]["label"] == label, label)


def test_a_camera_vanishes_and_comes_back(tmp_path: Path, camera: NetworkCamera, infer: StartInfer) -> None:
    process = infer("--model", make_model(tmp_path), "--source", camera.url, "--json", "--fps", 50)
    until_label(process, "bright")
    camera.brightness = 0
    until_label(process, "dark")
    camera.vanish()
    process.until_logged("source_lost")
    process.until_logged("source_unavailable")
    camera.brightness = 255
    camera.come_back()
    until_label(process, "bright")
    assert process.terminate() == 0
    summary = json.loads(process.text.splitlines()[-1])["summary"]
    assert summary["images"] == len(predictions(process))
    assert len(process.logged("source_opened")) == 2
    sources = [prediction["source"] for prediction in predictions(process)]
    assert len(set(sources)) == len(sources)
    assert sources[0] == camera.url.replace("viewer:geheim@", "").replace("?token=geheim", "") + " #1"
    assert "geheim" not in process.text
    unreachable = process.logged("source_unavailable")[0]
    assert "cannot be reached" in unreachable["reason"]


def test_a_camera_that_sends_rubbish_harms_nobody(
    tmp_path: Path, camera: NetworkCamera, infer: StartInfer
) -> None:
    camera.brightness = -1
    process = infer("--model", make_model(tmp_path), "--source", camera.url, "--json")
    process.until_logged("source_unavailable")
    camera.brightness = 255
    until_label(process, "bright")
    assert process.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_camera_that_was_never_there_is_waited_for_until_the_end(
    tmp_path: Path, infer: StartInfer, number: signal.Signals
) -> None:
    process = infer("--model", make_model(tmp_path), "--source", f"rtsp://127.0.0.1:{free_port()}/1")
    process.until_logged("source_unavailable")
    process.popen.send_signal(number)
    assert process.wait() == 0
    assert process.text.splitlines()[-1].startswith("0 images")


def test_text_of_a_camera_in_a_journal_is_only_what_changes(
    tmp_path: Path, camera: NetworkCamera, infer: StartInfer
) -> None:
    saved = tmp_path / "seen.jsonl"
    process = infer(
        *("--model", make_model(tmp_path), "--source", camera.url, "--limit", 30, "--save", saved),
        *("--config", write(tmp_path / "agent.toml", "[inference]\npublish_interval_s = 1e6\nfps = 50\n")),
    )
    assert process.wait() == 0
    told = [line for line in process.text.splitlines() if "  bright  " in line]
    assert len(told) == 1
    assert "30 images" in process.text
    assert len(saved.read_text().splitlines()) == 30


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Ten bright frames, then ten dark ones, and an end."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(20):
        writer.write(np.full((48, 64, 3), 255 * (number < 10), np.uint8))
    writer.release()
    return path


def test_a_video_is_labelled_frame_by_frame_to_its_end(tmp_path: Path, video: Path) -> None:
    done = run_command(
        "edge_agent.cli", "infer", "--model", make_model(tmp_path), "--source", video, "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    *frames, end = map(json.loads, done.stdout.splitlines())
    assert [frame["source"] for frame in frames] == [f"{video} #{number}" for number in range(1, 21)]
    assert [frame["label"] for frame in frames] == ["bright"] * 10 + ["dark"] * 10
    assert (end["summary"]["images"], end["summary"]["dropped"]) == (20, 0)


def test_a_video_that_was_cut_off_ends_where_it_was(tmp_path: Path, video: Path) -> None:
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) * 3 // 4])
    done = run_command(
        "edge_agent.cli", "infer", "--model", make_model(tmp_path), "--source", video, "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    end = json.loads(done.stdout.splitlines()[-1])
    assert 0 < end["summary"]["images"] < 20


def test_a_process_without_stdin_reads_files(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    command = shlex.join(
        [sys.executable, "-m", "edge_agent.cli", "infer", "--model", str(make_model(tmp_path))]
    )
    done = subprocess.run(
        ["sh", "-c", f"exec {command} --source {shlex.quote(str(tmp_path))} <&-"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 image" in done.stdout


def test_a_folder_keeps_the_pace_that_was_asked_for_and_ends_at_a_signal(
    tmp_path: Path, infer: StartInfer
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "abc":
        Image.new("L", (8, 8)).save(pictures / f"{name}.png")
    model = make_model(tmp_path)
    process = infer("--model", model, "--source", pictures, "--json", "--fps", 0.001)
    process.until(lambda: bool(predictions(process)), "the first picture")
    assert process.terminate() == 0
    assert json.loads(process.text.splitlines()[-1])["summary"]["images"] == 1


def test_paths_that_never_come_are_waited_for_until_a_signal(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(picture)
    command = [sys.executable, "-m", "edge_agent.cli", "infer", "--model", make_model(tmp_path)]
    with subprocess.Popen(
        [*map(str, command), "--source", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{picture}\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["label"] == "dark"
        process.terminate()
        assert json.loads(process.stdout.readline())["summary"]["images"] == 1
        assert process.wait(60) == 0


def test_nothing_that_only_cameras_need_is_loaded_for_files(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    code = """
import sys
from edge_agent.cli import main
try:
    main()
finally:
    unwanted = {"torch", "onnx", "cv2", "picamera2", "structlog", "paho", "cryptography", "ssl", "rich"}
    print(sorted(unwanted & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "infer", "--model", make_model(tmp_path), "--source", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "fleet"
    folder.mkdir()
    yield from mosquitto_served(folder)


def test_predictions_go_to_the_broker_when_the_label_changes(
    tmp_path: Path, broker: Served, camera: NetworkCamera, infer: StartInfer
) -> None:
    bundle = tmp_path / "pi1.bundle.json"
    write_bundle(bundle, broker.enroll(AGENT))
    aggregator = broker.aggregator()
    topic = Topics("fleet").predictions(AGENT)

    def hear(label: str) -> PredictionMessage:
        def is_it(event: object) -> bool:
            return (
                isinstance(event, Message)
                and event.topic == topic
                and decode_json(event.payload, PredictionMessage).label == label
            )

        message = aggregator.wait(is_it, f"a prediction {label!r}")
        assert isinstance(message, Message)
        return decode_json(message.payload, PredictionMessage)

    process = infer(bundle, "--model", make_model(tmp_path), "--source", camera.url, "--publish", "mqtt")
    assert hear("bright").release is None
    camera.brightness = 0
    assert hear("dark").source.startswith("http://127.0.0.1:")
    assert process.terminate() == 0


def test_a_device_labels_with_its_release_when_no_broker_can_be_reached(
    tmp_path: Path, infer: StartInfer
) -> None:
    bundle = tmp_path / "pi1.bundle.json"
    enrolment = Enrolment(tmp_path / "state", "garden")
    write_bundle(bundle, enrolment.enroll(AGENT, broker_url=f"mqtt://127.0.0.1:{free_port()}"))
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    process = infer(bundle, "--source", tmp_path, "--json")
    process.until_logged("model_awaited")
    assert process.terminate() == 0

    with Slots(default_state(bundle) / MODELS) as slots:
        slots.activate(put(slots, made(3, model=make_model(tmp_path).read_bytes())))
        slots.end_probation()
    done = infer(bundle, "--source", tmp_path, "--json")
    assert done.wait() == 0
    (prediction,) = predictions(done)
    assert (prediction["label"], prediction["release"]) == ("bright", 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to look at: give --source"),
        (("--source", "0"), "give the device's BUNDLE"),
        (("--source", "0", "--model", "m.onnx", "--publish", "mqtt"), "give its BUNDLE"),
        (("--source", "0", "--model", "m.onnx", "--publish", "kafka"), "Invalid enum value 'kafka'"),
        (("m.onnx", "--source", "0"), "m.onnx is a model: name it with --model m.onnx"),
        (("missing.json", "--source", "/"), "no bundle at missing.json"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = run_command("edge_agent.cli", "infer", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
