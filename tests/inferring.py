"""A real `edge-agent infer` that follows releases over a real broker, fed with pictures through its standard input."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from brokers import until
from fleets import DEADLINE_S, Client, Served
from PIL import Image
from release_authority import Authority, pictures
from stations import Server

from federation.bundle import Bundle, write_bundle
from federation.wire.link import Message
from federation.wire.signing import private_key

PATIENCE_S = 120.0
"""Starting Python and onnxruntime takes seconds on a busy machine."""

FRAME_S = 0.005

CONFIG = """
[inference]
source = "-"
probation_s = 0.3
probation_frames = 5
max_latency_ms = 10000.0
publish = "mqtt"
publish_interval_s = 0.0
"""
"""Latency is no matter here: nobody knows how busy the machine is."""


class BrokerServer(Server):
    """The aggregator's side on a real broker."""

    def __init__(self, served: Served, authority: Authority, bundle: Bundle) -> None:
        super().__init__(authority, bundle.agent, private_key(bundle.private_key).public_key())
        self.served = served
        self.client: Client = served.aggregator()

    def reconnect(self) -> None:
        """As the aggregator again, with what was heard so far, to a broker that may have forgotten everything."""
        self.client.link.stop()
        self.client.drain()
        heard, self.client = self.client.heard, self.served.aggregator()
        self.client.heard[:0] = heard

    def publish(self, topic: str, payload: bytes) -> None:
        self.client.link.publish_bulk(topic, payload, qos=1, retain=True, timeout_s=DEADLINE_S)

    def payloads(self, topic: str) -> list[bytes]:
        self.client.drain()
        return [
            event.payload
            for event in self.client.heard
            if isinstance(event, Message) and event.topic == topic and event.payload
        ]


class Inferring:
    """One life of a device's inference process.

    Args:
        folder: For its state, pictures and logs; the next life takes the same.
        bundle: Its identity.
        config: TOML.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        config: str = CONFIG,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.bundle = folder / f"{bundle.agent}.bundle.json"
        write_bundle(self.bundle, bundle)
        settings = folder / "device.toml"
        settings.write_text(config)
        self.pictures = [folder / f"{number}.png" for number in range(2)]
        for path, array in zip(self.pictures, pictures(), strict=True):
            Image.fromarray(array).save(path)
        lives = len(list(folder.glob("infer-*.log")))
        self.log, self.out = folder / f"infer-{lives}.log", folder / f"infer-{lives}.out"
        with self.log.open("wb") as log, self.out.open("wb") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "edge_agent.cli", "infer", self.bundle, "--config", settings],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(environment or {}),
            )
        self.fed = 0
        self._enough = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    @property
    def models(self) -> Path:
        """Its slots."""
        return self.bundle.with_name(f"{self.bundle.name.split('.')[0]}.state") / "models"

    @property
    def labelled(self) -> int:
        """Pictures that have a label."""
        return sum(line.count(b"  dark  ") + line.count(b"  bright  ") for line in self._lines())

    @property
    def failed(self) -> int:
        """Pictures without one."""
        return sum(line.startswith("failed ") for line in self.log.read_text().splitlines())

    def logged(self, event: str, **fields: object) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event and fields.items() <= line.items()]

    def until_logged(self, event: str, **fields: object) -> None:
        until(
            lambda: bool(self.logged(event, **fields)) or self.popen.poll() is not None,
            timeout_s=PATIENCE_S,
            what=f"{event} {fields}: {self.tail()}",
        )
        assert self.logged(event, **fields), self.tail()

    def labels_on(self, frames: int = 10) -> None:
        """Wait for so many more labels."""
        before = self.labelled
        until(lambda: self.labelled >= before + frames, timeout_s=PATIENCE_S, what=f"labels: {self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-25:])

    def kill(self) -> None:
        """As a power cut does."""
        self.popen.kill()
        self.popen.wait()
        self._end_feeding()

    def finish(self) -> int:
        """End the input, wait until all of it is labelled; the exit code."""
        self._end_feeding()
        return self.popen.wait(PATIENCE_S)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.popen.terminate()
        code = self.popen.wait(PATIENCE_S)
        self._end_feeding()
        return code

    def _lines(self) -> list[bytes]:
        return self.out.read_bytes().splitlines()

    def _end_feeding(self) -> None:
        self._enough.set()
        self._feeder.join(PATIENCE_S)

    def _feed(self) -> None:
        assert self.popen.stdin is not None
        try:
            while not self._enough.wait(FRAME_S):
                path = self.pictures[self.fed % len(self.pictures)]
                self.popen.stdin.write(f"{path}\n".encode())
                self.popen.stdin.flush()
                self.fed += 1
            self.popen.stdin.close()
        except OSError:
            return  # it ended first


def identity(served: Served, authority: Authority, name: str = "pi1") -> Bundle:
    """Enrol a device that pins the authority's release keys."""
    return msgspec.structs.replace(served.enroll(name), release_keys=authority.keys)
