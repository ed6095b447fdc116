"""What ``--source`` may be, and cameras without a camera: colours, reasons, secrets, what is not installed."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from brokers import free_port

from edge_agent.inference.cameras import (
    CameraLostError,
    DeviceCamera,
    PiCamera,
    StreamCamera,
    from_picamera,
    without_secrets,
)
from edge_agent.inference.opencv import to_rgb
from edge_agent.inference.pictures import FolderFeed, StdinFeed
from edge_agent.inference.sources import open_feed
from edge_agent.inference.videos import VideoFeed
from federation.errors import ConfigError


def opened(source: object) -> Any:
    return open_feed(str(source), fps=10, file_fps=0, stdin=0)


def test_colours_come_out_in_the_order_that_models_take() -> None:
    blue_first = np.zeros((2, 3, 3), np.uint8)
    blue_first[..., 0] = 200
    assert to_rgb(blue_first)[0, 0].tolist() == [0, 0, 200]
    grey = np.full((2, 3), 7, np.uint8)
    assert to_rgb(grey).tolist() == to_rgb(grey[..., None]).tolist() == np.full((2, 3, 3), 7).tolist()


def test_the_pi_cameras_arrays_lose_their_padding() -> None:
    padded = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    rgb = from_picamera(padded)
    assert rgb is not None
    assert rgb.flags.c_contiguous
    assert rgb.tolist() == padded[..., :3].tolist()
    assert from_picamera(rgb) is not None
    assert from_picamera(np.zeros((2, 3), np.uint8)) is None
    assert from_picamera(np.zeros((2, 3, 3), np.float32)) is None


class FakePicamera2:
    """The part of picamera2 that is used, as its manual describes it; the real one needs a Raspberry Pi."""

    broken = ""

    def __init__(self) -> None:
        if self.broken:
            raise IndexError(self.broken)
        self.running = False

    def create_video_configuration(self, **wanted: Any) -> dict[str, Any]:
        return wanted

    def configure(self, wanted: dict[str, Any]) -> None:
        self.wanted = wanted

    def start(self) -> None:
        self.running = True

    def capture_array(self, name: str) -> np.ndarray:
        if not self.running:
            raise RuntimeError("Camera frontend has timed out!")
        width, height = self.wanted[name]["size"]
        return np.full((height, width, 3), 9, np.uint8)

    def close(self) -> None:
        self.running = False


def test_the_pi_camera_is_asked_for_red_first_and_for_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "picamera2", SimpleNamespace(Picamera2=FakePicamera2))
    camera = PiCamera(7)
    camera.open()
    assert camera._camera.wanted == {
        "main": {"size": (640, 480), "format": "BGR888"},
        "controls": {"FrameRate": 7},
    }
    camera.grab()
    pixels = camera.retrieve()
    assert pixels is not None
    assert pixels.shape == (480, 640, 3)
    camera._camera.running = False
    with pytest.raises(CameraLostError, match="timed out"):
        camera.grab()
    camera.close()
    camera.close()
    monkeypatch.setattr(FakePicamera2, "broken", "list index out of range")
    with pytest.raises(CameraLostError, match="list index out of range"):
        camera.open()
    camera.close()


def test_each_source_has_its_feed(tmp_path: Path) -> None:
    assert isinstance(opened("-"), StdinFeed)
    assert isinstance(opened(tmp_path), FolderFeed)
    (tmp_path / "clip").write_bytes(b"")
    assert isinstance(opened(tmp_path / "clip"), FolderFeed)
    for live in ("0", "/dev/null", "rtsp://camera/1", "HTTP://camera/stream"):
        assert opened(live).live
    with pytest.raises(ConfigError, match="does not exist: name a camera's number"):
        opened(tmp_path / "missing")
    with pytest.raises(ConfigError, match="ftp:// is not read, only http, https"):
        opened("ftp://me:secret@host/clip.mp4")


def test_a_video_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"clip\.mp4 is not a video"):
        VideoFeed(tmp_path / "clip.mp4", opened(tmp_path)._pace)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://admin:geheim@10.0.0.7:554/h264", "rtsp://10.0.0.7:554/h264"),
        ("rtsp://a:p@ss@host/1", "rtsp://host/1"),
        ("http://host/stream?user=admin&pwd=geheim", "http://host/stream"),
        ("rtsp://host:554/user=admin&password=geheim&channel=1.sdp", "rtsp://host:554/..."),
    ],
)
def test_no_secret_of_a_url_is_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == StreamCamera(url).name == shown


def test_why_a_device_cannot_be_opened(tmp_path: Path) -> None:
    missing = DeviceCamera(tmp_path / "video7", "camera 7")
    with pytest.raises(CameraLostError, match="is the camera plugged in"):
        missing.open()
    missing.close()
    other = tmp_path / "video8"
    other.write_bytes(b"")
    with pytest.raises(CameraLostError, match="another program may use it, or it is no camera"):
        DeviceCamera(other, "camera 8").open()
    other.chmod(0)
    if not os.access(other, os.R_OK):  # not so for root
        with pytest.raises(CameraLostError, match="no permission"):
            DeviceCamera(other, "camera 8").open()


def test_why_a_stream_cannot_be_opened() -> None:
    with pytest.raises(CameraLostError, match="cannot be reached: Connection refused"):
        StreamCamera(f"rtsp://127.0.0.1:{free_port()}/1").open()
    with pytest.raises(ConfigError, match="names no host"):
        StreamCamera("rtsp:///1")
    with pytest.raises(ConfigError, match="Port out of range"):
        StreamCamera("rtsp://host:99999/1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.listen()
        camera = StreamCamera(f"http://127.0.0.1:{silent.getsockname()[1]}/1")
        assert "answers, but gives no video" in camera._why_not()


@pytest.mark.parametrize(
    ("source", "missing", "remedy"),
    [("0", "cv2", "fedge[camera]"), ("picamera", "picamera2", "apt install python3-picamera2")],
)
def test_what_is_not_installed_is_named_at_once(source: str, missing: str, remedy: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from edge_agent.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "infer", "--model", "no.onnx", "--source", source],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert remedy in done.stderr
    assert len(done.stderr.splitlines()) == 1
