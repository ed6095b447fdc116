"""How fast a release reaches a running device and leaves it again, what that costs in frames, and a delta in bytes.

Everything runs as real processes on this machine: `aggregator serve --stay` with its own broker or with mosquitto, the
operator's commands `aggregator release` and `aggregator rollback`, and `edge-agent infer` at a network camera.
"""

import getpass
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from aggregator.enrolment import MOSQUITTO_FOLDER, Enrolment
from aggregator.mosquitto import mosquitto_conf
from benchmarks.fleets import FEDERATION, free_port
from benchmarks.live_camera import LiveCamera
from benchmarks.processes import Child, Children, module
from benchmarks.rollout_device import Frames, InferringDevice, Records, account, moment
from benchmarks.rollout_models import broken, delta_share, exported, head_change, train_rounds
from benchmarks.rounds import Data, find_data
from benchmarks.runner import BenchmarkError, Options, Results, main, middle, say
from federation.bundle import write_bundle
from federation.wire.release import ModelFormat

QUESTION = "how fast does a release reach a device and leave it again, and what does it cost?"
BROKERS = ("embedded", "mosquitto")
PARTS = (*BROKERS, "delta")

FPS = 20.0
REPEATS, QUICK_REPEATS = 7, 3

STEP_S = 120.0
"""Longest wait for one step; each takes seconds."""

CALM_FRAMES = 200
"""Labelled without a swap, for what is dropped anyway."""


class Rollout:
    """A server of releases and one device at a camera.

    Args:
        children: Run the processes.
        folder: Of this federation; created.
        broker: One of :data:`BROKERS`.
        data: From which the server derives its task.
        camera: URL.
    """

    def __init__(self, children: Children, folder: Path, broker: str, data: Data, camera: str) -> None:
        folder.mkdir(parents=True)
        self.folder, self.state, self._children = folder, folder / "state", children
        enrolment = Enrolment(self.state, FEDERATION)
        port = free_port()
        url = f"mqtt://127.0.0.1:{port}"
        bundle = folder / "pi1.bundle.json"
        write_bundle(bundle, enrolment.enroll("pi1", broker_url=url))
        self._running: list[Child] = []
        where = ["--listen", f"127.0.0.1:{port}"]
        if broker == "mosquitto":
            self._start_mosquitto(port)
            where = ["--broker", url]
        self.server = self._start(
            *module(
                "aggregator.cli", "serve", "--federation", FEDERATION, "--state", str(self.state), *where
            ),
            *("--model", "cnn", "--data", data.spec, "--min-agents", "2", "--stay", "--log-format", "json"),
            name="aggregator",
        )
        self.log = Records(self.server.log)
        self.until(lambda: bool(self.log.events("broker_connected")), "the server is up")
        self.device = InferringDevice(children, folder, bundle, camera, FPS)
        self._running.append(self.device.child)

    def release(self, folder: Path) -> tuple[int, float]:
        """Release an exported model to all devices.

        Returns:
            Its number, and when its manifest was published.
        """
        before = len(self._manifests())
        self._run("release", str(folder), "--channel", "stable")
        return self._published(before)

    def announce(self, number: int) -> float:
        """Release to all what was released before; when its manifest was published."""
        before = len(self._manifests())
        self._run("release", "--number", str(number), "--channel", "stable")
        return self._published(before)[1]

    def roll_back(self) -> tuple[int, float]:
        """As the operator; to which release, and when its manifest was published."""
        before = len(self._manifests())
        self._run("rollback")
        return self._published(before)

    def labelled_by(self, release: int, after: float) -> float:
        """Wait for the first frame that a release labels after a moment; when that was."""
        found: list[float] = []

        def labelled() -> bool:
            at = self.device.first_by(release, after)
            found.extend([] if at is None else [at])
            return at is not None

        self.until(labelled, f"release {release} labels a frame")
        return found[0]

    def settled(self, number: int, after: float) -> None:
        """Wait until a release has passed the probation that began after a moment."""
        self.until(
            lambda: self.device.since("release_confirmed", number, after) is not None,
            f"release {number} is kept",
        )

    def fails(self, number: int, after: float) -> float:
        """Wait until a broken release is given up; when it was made to label frames, the first of which it failed on."""
        device = self.device
        self.until(
            lambda: device.since("release_rolled_back", number, after) is not None,
            f"release {number} is given up",
        )
        began = device.since("release_activated", number, after)
        if began is None:
            raise BenchmarkError(f"release {number} was rolled back and never ran, see {device.child.log}")
        return began

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait, while every process is well."""
        self._children.until(condition, STEP_S, f"{what}; see {self.folder.parent / 'logs'}")

    def stop(self) -> None:
        """End all, the device first."""
        for child in reversed(self._running):
            self._children.stop(child)

    def _manifests(self) -> list[dict[str, object]]:
        return self.log.events("manifest_published", channel="stable")

    def _published(self, before: int) -> tuple[int, float]:
        self.until(lambda: len(self._manifests()) > before, "a manifest is published")
        record = self._manifests()[before]
        return int(str(record["release"])), moment(record)

    def _run(self, *arguments: str) -> None:
        command = module("aggregator.cli", *arguments, "--state", str(self.state))
        self._children.wait(self._children.start(f"{self.folder.name}-command", *command), STEP_S)

    def _start(self, *command: str, name: str) -> Child:
        child = self._children.start(f"{self.folder.name}-{name}", *command)
        self._running.append(child)
        return child

    def _start_mosquitto(self, port: int) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise BenchmarkError("mosquitto is not installed: it is one of the two brokers")
        store = self.folder / "mosquitto"
        store.mkdir()
        config = self.folder / "mosquitto.conf"
        accounts = (self.state / MOSQUITTO_FOLDER).resolve()
        text = mosquitto_conf(accounts, data=store.resolve(), host="127.0.0.1", port=port)
        config.write_text(text + f"user {getpass.getuser()}\n")
        self._start(program, "-c", str(config.resolve()), name="broker")


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for."""
    data = find_data()
    repeats = QUICK_REPEATS if options.quick else REPEATS
    with Children(options.folder / "logs") as children:
        say(f"training the cnn for {repeats + 1} rounds")
        checkpoints = train_rounds(children, options.folder / "training", data, repeats + 1)
        models = [
            exported(path, options.folder / f"round-{number}", ModelFormat.FP32, data.spec)
            for number, path in enumerate(checkpoints, start=1)
        ]
        faulty = [broken(models[0], options.folder / f"broken-{each}", each) for each in range(repeats)]
        for broker in BROKERS:
            if broker in options.parts:
                suffix = data.suffix if broker == "embedded" else f"_{broker}{data.suffix}"
                with LiveCamera(FPS) as camera:
                    rollout = Rollout(children, options.folder / broker, broker, data, camera.url)
                    _roll_out(rollout, models, faulty, results, f"{suffix}")
                    rollout.stop()
        if "delta" in options.parts:
            _deltas(options.folder, checkpoints, models, data, results)


def _roll_out(
    rollout: Rollout, models: list[Path], faulty: list[Path], results: Results, suffix: str
) -> None:
    """Activate, roll back and activate again, then have broken releases rolled back; frames are counted all the while."""
    say(
        f"{rollout.folder.name}: {len(models) - 1} releases, taken back and announced again, then {len(faulty)} broken ones"
    )
    device = rollout.device
    number, at = rollout.release(models[0])
    rollout.labelled_by(number, at)
    rollout.settled(number, at)
    activated, again, operator = [], [], []
    for model in models[1:]:
        number, at = rollout.release(model)
        activated.append(rollout.labelled_by(number, at) - at)
        rollout.settled(number, at)
        former, at = rollout.roll_back()
        operator.append(rollout.labelled_by(former, at) - at)
        at = rollout.announce(number)
        again.append(rollout.labelled_by(number, at) - at)
        rollout.settled(number, at)
    swapping = account(device.labels(), device.failed())
    rolled_back = []
    for each in faulty:
        bad, at = rollout.release(each)
        failing_at = rollout.fails(bad, at)
        rolled_back.append(rollout.labelled_by(number, failing_at) - failing_at)
    swaps = 3 * len(activated) + 2 * len(rolled_back)
    whole = account(device.labels(), device.failed())
    calm = _calm(rollout)
    every = f"median of {len(activated)}, over {rollout.folder.name}"
    _timed(
        results,
        "activate_s" + suffix,
        activated,
        f"manifest published -> first frame labelled by it; {every}",
    )
    _timed(
        results,
        "rollback_s" + suffix,
        rolled_back,
        f"a broken release is made to label frames, and fails on each -> first frame labelled by the release before; {every}",
    )
    _timed(
        results,
        "operator_rollback_s" + suffix,
        operator,
        f"manifest of `aggregator rollback` -> first frame labelled; {every}",
    )
    _timed(
        results,
        "announce_again_s" + suffix,
        again,
        f"manifest of a release that is still on the device's disk -> first frame labelled; {every}",
    )
    results.add(
        "frames_lost" + suffix,
        whole.lost,
        "",
        f"of {whole.captured} in {swaps} swaps: {_told(whole)}; counted by number",
    )
    results.add(
        "frames_dropped_share" + suffix,
        _dropped(swapping),
        "%",
        f"replaced by newer ones, in {3 * len(activated)} swaps: {_told(swapping)}",
    )
    results.add(
        "frames_dropped_calm_share" + suffix, _dropped(calm), "%", f"the same without swaps: {_told(calm)}"
    )


def _calm(rollout: Rollout) -> Frames:
    """Frames of a while in which nothing is rolled out."""
    device = rollout.device
    begun = len(device.labels())
    rollout.until(lambda: len(device.labels()) >= begun + CALM_FRAMES, "frames without a swap")
    return account(device.labels()[begun:], device.failed())


def _timed(results: Results, key: str, values: list[float], how: str) -> None:
    results.add(key, middle(values), "s", f"{how}; {min(values):.2f} to {max(values):.2f}")


def _dropped(frames: Frames) -> float:
    return 100 * frames.dropped / frames.captured


def _told(frames: Frames) -> str:
    return f"{frames.captured} captured, {frames.labelled} labelled, {frames.failed} failed, {frames.dropped} dropped"


def _deltas(folder: Path, checkpoints: list[Path], models: list[Path], data: Data, results: Results) -> None:
    """What a delta saves, in bytes of files: chunks carry nothing else but their topics."""
    began = time.monotonic()
    pairs = list(pairwise(models))
    how = f"bytes of the delta / of the model file; cnn, next round, median of {len(pairs)} rounds"
    results.add(
        "delta_share" + data.suffix, middle(delta_share(*pair) for pair in pairs), "%", f"{how}, fp32"
    )
    small = [
        exported(path, folder / f"int8-{number}", ModelFormat.INT8, data.spec)
        for number, path in enumerate(checkpoints)
    ]
    shares = [delta_share(*pair) for pair in pairwise(small)]
    results.add("delta_share_int8" + data.suffix, middle(shares), "%", f"{how}, int8")
    heads = [
        exported(path, folder / f"head-{number}", ModelFormat.FP32, "digits")
        for number, path in enumerate(head_change(folder))
    ]
    results.add(
        "delta_share_head", delta_share(*heads), "%", "mobilenet_v3_small, fp32, its last layer changed"
    )
    say(f"  deltas took {time.monotonic() - began:.0f} s, exports included")


if __name__ == "__main__":
    main("rollout", QUESTION, measure, PARTS)
