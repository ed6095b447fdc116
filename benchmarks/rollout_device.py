"""A real `edge-agent infer` at a camera, and what its output says: which release labelled which frame, and when."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.processes import Child, Children, module

CONFIG = """
[inference]
channel = "stable"
probation_s = 2.0
probation_frames = 10
max_latency_ms = 10000.0
"""
"""Short probation, so that releases may follow each other; and no latency gate, for a busy machine is not the question."""


@dataclass(frozen=True, slots=True)
class Label:
    """One labelled frame.

    Attributes:
        frame: Its number, from the camera's first on.
        time: Unix seconds.
        release: That labelled it.
        dropped: Frames that newer ones had replaced by then.
    """

    frame: int
    time: float
    release: int
    dropped: int


class Records:
    """The JSON lines of a process's log, read as they come.

    Args:
        log: The file.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._read = log, 0
        self.all: list[dict[str, Any]] = []

    def update(self) -> list[dict[str, Any]]:
        """Everything so far."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        self.all += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        return self.all

    def events(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """Log lines of that event with these fields."""
        return [
            record
            for record in self.update()
            if record.get("event") == event and fields.items() <= record.items()
        ]


def moment(record: dict[str, Any]) -> float:
    """Unix seconds of a log line."""
    return datetime.fromisoformat(record["timestamp"]).timestamp()


class InferringDevice:
    """One device that labels a camera's frames with what is rolled out.

    Args:
        children: Run the process.
        folder: For its settings.
        bundle: Of the device.
        url: Of the camera.
        fps: Frames a second to label.
    """

    def __init__(self, children: Children, folder: Path, bundle: Path, url: str, fps: float) -> None:
        config = folder / "device.toml"
        config.write_text(CONFIG)
        self.child: Child = children.start(
            f"{folder.name}-infer",
            *module("edge_agent.cli", "infer", str(bundle), "--source", url, "--fps", f"{fps:g}"),
            *("--config", str(config), "--json", "--log-format", "json"),
        )
        self.records = Records(self.child.log)

    def labels(self) -> list[Label]:
        """All labelled frames so far, in order."""
        return [
            Label(_number(line["source"]), line["time"], line["release"], line["dropped"])
            for line in self.records.update()
            if "label" in line
        ]

    def failed(self) -> list[int]:
        """Numbers of the frames on which a model failed."""
        return [
            _number(line["source"]) for line in self.records.update() if "error" in line and "source" in line
        ]

    def since(self, event: str, number: int, after: float) -> float | None:
        """When it last logged something of a release after that moment; None if it has not."""
        found = [moment(record) for record in self.records.events(event, number=number)]
        return max((at for at in found if at > after), default=None)

    def first_by(self, release: int, after: float) -> float | None:
        """When a release labelled its first frame after that moment; None if it has not."""
        return next((one.time for one in self.labels() if one.release == release and one.time > after), None)


@dataclass(frozen=True, slots=True)
class Frames:
    """What became of the frames of a camera.

    Attributes:
        captured: Frames that came.
        labelled: Frames with a label.
        failed: Frames on which a model failed.
        dropped: Frames that newer ones replaced, as the device counts them.
    """

    captured: int
    labelled: int
    failed: int
    dropped: int

    @property
    def lost(self) -> int:
        """Frames of which nothing is known: neither labelled nor failed nor counted as dropped."""
        return self.captured - self.labelled - self.failed - self.dropped


def account(labels: list[Label], failed: list[int]) -> Frames:
    """Count by the frames' numbers, from the first label to the last one after which no frame is under way.

    A frame that is dropped while another is being labelled is counted in that one's message already. So the count ends at a
    label whose follower has the next number: between the two nothing was dropped.
    """
    last = next(
        one
        for one, after in zip(reversed(labels[:-1]), reversed(labels[1:]), strict=True)
        if after.frame == one.frame + 1
    )
    first = labels[0]
    seen = {one.frame for one in labels if one.frame <= last.frame}
    wrong = {number for number in failed if first.frame < number < last.frame}
    return Frames(
        captured=last.frame - first.frame + 1,
        labelled=len(seen),
        failed=len(wrong),
        dropped=last.dropped - first.dropped,
    )


def _number(source: str) -> int:
    return int(source.rpartition("#")[2])
