"""The same work done by fedge and by Flower's real deployment: overhead of a round, bytes, memory.

Both sides run here as real processes, one after the other: a server, and five devices that each hold a few images in
a folder and train the same model in the same way. A counting proxy stands before every device's connection.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.fleets import START_S, Fleet, Run
from benchmarks.flower import Deployment, Environment, prepare
from benchmarks.observer import Observer
from benchmarks.processes import Child, Children, module, python
from benchmarks.proxy import CountingProxy
from benchmarks.rounds import AGENTS, beyond_training, find_data
from benchmarks.runner import Options, Results, main, middle, say

QUESTION = (
    "what do a round and a device cost with fedge, and what with Flower's deployment, on the same work?"
)
PARTS = ("cnn", "resnet18")

TRAIN = {"epochs": 1, "batch_size": 32, "learning_rate": 0.01, "momentum": 0.9}

IMAGES = {"cnn": 96, "resnet18": 32}
"""For each device: three steps, and one. How long training takes is not the point, and it is taken off."""

SIDE = {"mnist": 28, "digits": 8}

QUICK_IDLE_S, IDLE_S = 10.0, 65.0
"""For which the devices wait for the last one to join; the longer one is longer than any side's keepalive."""

TELEMETRY_S = 60.0
"""The agent's default."""

SETTLE_S = 5.0
"""After which a started device has loaded what it loads."""

TIMEOUT_S = 1200.0

IDLE = "a device that is connected and waits, before its first round"
AFTER = "a device that waits again, after its last round"

_SERVER = "server"


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of one side.

    Attributes:
        overhead_s: Round by round, the first left out: its period less its longest training, seconds.
        up: Bytes of one device in one round, mean over devices and rounds but the first.
        down: The same, towards the device.
        first_down: Bytes towards one device until the end of the first round.
        idle_mb: Resident memory of a device that waits, before it ever trained.
        after_mb: Of a device that waits again, after its last round.
        device_mb: Peak over the run, median over the devices.
        device_pss_mb: The same of the first device's proportional set size.
        server_mb: Peak of the server after the first round.
        server_start_mb: Peak of it before.
        idle_bytes_s: Of a waiting device, both directions, bytes a second.
    """

    overhead_s: Sequence[float]
    up: float
    down: float
    first_down: float
    idle_mb: float
    after_mb: float
    device_mb: float
    device_pss_mb: float
    server_mb: float
    server_start_mb: float
    idle_bytes_s: float


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for; ``--quick`` leaves the large model out."""
    data = find_data()
    name = data.spec.partition(":")[0]
    environment = prepare()
    parts = [part for part in PARTS if part in options.parts and not (options.quick and part != "cnn")]
    with Children(options.folder / "logs") as children:
        torch_mb = bare_torch_mb(children)
        results.add(
            "torch_mb" + data.suffix, torch_mb, "MB", "peak RSS of a process that only imports torch; of 3"
        )
        for model in parts:
            images = options.folder / f"{model}-images"
            arguments = [data.spec, str(images), str(AGENTS), str(IMAGES[model])]
            children.wait(
                children.start(f"{model}-images", *module("benchmarks.pictures", *arguments)), START_S
            )
            shares = [images / str(number) for number in range(1, AGENTS + 1)]
            rounds_theirs, rounds_ours, idle_s = (4, 20, QUICK_IDLE_S) if options.quick else (7, 30, IDLE_S)
            say(f"{model}: Flower {environment.version}, {AGENTS} devices, {rounds_theirs} rounds")
            run = Run(model, data.spec, rounds_theirs, AGENTS, train=TRAIN)
            folder = options.folder / f"{model}-flower"
            theirs = flower(children, folder, environment, run, shares, SIDE[name], idle_s)
            say(f"{model}: fedge, {AGENTS} devices, {rounds_ours} rounds")
            run = Run(model, data.spec, rounds_ours, AGENTS, train=TRAIN)
            ours = fedge(children, options.folder / f"{model}-fedge", run, shares, idle_s)
            suffix = ("" if model == "cnn" else f"_{model}") + data.suffix
            comparison = Comparison(theirs, ours, suffix, f"Flower {environment.version}", results)
            comparison.overhead_and_bytes()
            comparison.memory(torch_mb)
            if idle_s == IDLE_S:
                comparison.both("idle_bytes_s", "B/s", lambda side: side.idle_bytes_s, IDLE)


def bare_torch_mb(children: Children) -> float:
    """Peak of a process that imports torch and nothing else, median of three; how it ends, 100 MB more, is left out."""
    peaks = []
    for repeat in range(3):
        child = children.start(f"torch-{repeat}", *python("import os, torch; os._exit(0)"))
        children.wait(child, START_S)
        peaks.append(child.peak_mb)
    return middle(peaks)


def flower(
    children: Children,
    folder: Path,
    environment: Environment,
    run: Run,
    shares: Sequence[Path],
    side: int,
    idle_s: float,
) -> Side:
    """Run SuperLink, SuperNodes and app."""
    deployment = Deployment(children, folder, environment)
    with Observer() as observer, ExitStack() as proxies:
        server = deployment.serve()
        observer.follow(_SERVER, server.process.pid)
        nodes = []
        for number, share in enumerate(shares, 1):
            if number == len(shares):
                idle = wait_idle(children, observer, idle_s)
            proxy = proxies.enter_context(CountingProxy(deployment.port))
            nodes.append(deployment.join(number, proxy.port, share))
            watch(observer, number, nodes[-1], proxy)
        marks = deployment.run(run, side, TIMEOUT_S)
        overheads = [mark.at - before.at - mark.longest_train_s for before, mark in pairwise(marks[1:])]
        after_mb = wait_idle(children, observer, SETTLE_S)[0]
        measured = taken(observer, run, idle, after_mb, overheads, marks[1].at, marks[-1].at)
        children.stop(*nodes, server)
    return measured


def fedge(children: Children, folder: Path, run: Run, shares: Sequence[Path], idle_s: float) -> Side:
    """Run `aggregator serve` with its embedded broker, and `edge-agent run` processes, as they are by default."""
    fleet = Fleet(children, folder, run, telemetry_s=TELEMETRY_S)
    with Observer() as observer, ExitStack() as proxies:
        ways = [proxies.enter_context(CountingProxy(fleet.port)) for _ in shares]
        bundles = [fleet.enroll(f"agent-{number}", port=way.port) for number, way in enumerate(ways, 1)]
        server = fleet.serve()
        observer.follow(_SERVER, server.process.pid)
        agents: list[Child] = []
        for number, (bundle, share, way) in enumerate(zip(bundles, shares, ways, strict=True), 1):
            if number == len(shares):
                for agent in agents:
                    children.until(partial(is_connected, agent.log), START_S, f"{agent.name} is connected")
                idle = wait_idle(children, observer, idle_s)
            agents.append(fleet.start(bundle, f"imagefolder:{share}"))
            watch(observer, number, agents[-1], way)
        done = fleet.finish(server, TIMEOUT_S)
        after_mb = wait_idle(children, observer, SETTLE_S)[0]
        ends = [each.row.closed_at for each in done]
        assert ends[0] is not None
        assert ends[-1] is not None
        measured = taken(observer, run, idle, after_mb, beyond_training(done), ends[0], ends[-1])
        children.stop(*agents, server)
    return measured


def is_connected(log: Path) -> bool:
    """Whether an agent has reached its broker."""
    return b'"broker_connected"' in log.read_bytes()


def watch(observer: Observer, number: int, child: Child, proxy: CountingProxy) -> None:
    """Follow a device."""
    observer.follow(f"device-{number}", child.process.pid, pss=number == 1)
    observer.count(f"device-{number}", proxy)


def wait_idle(children: Children, observer: Observer, idle_s: float) -> tuple[float, float]:
    """Let the devices wait; returns the first one's peak memory, MiB, and its bytes a second."""
    began = time.time()
    children.until(
        lambda: time.time() > began + SETTLE_S + idle_s, 2 * (SETTLE_S + idle_s), "devices are idle"
    )
    since, until = began + SETTLE_S, began + SETTLE_S + idle_s
    traffic = observer.bytes_between("device-1", since, until)
    return observer.peak_mb("device-1", since, until), (traffic.up + traffic.down) / idle_s


def taken(
    observer: Observer,
    run: Run,
    idle: tuple[float, float],
    after_mb: float,
    overheads: Sequence[float],
    first: float,
    last: float,
) -> Side:
    """What was observed until the end of the first round, and from there to the end of the last."""
    devices = [f"device-{number}" for number in range(1, run.agents + 1)]
    traffic = [observer.bytes_between(device, first, last) for device in devices]
    rounds = len(devices) * (run.rounds - 1)
    return Side(
        overhead_s=overheads,
        up=sum(each.up for each in traffic) / rounds,
        down=sum(each.down for each in traffic) / rounds,
        first_down=middle(observer.bytes_between(device, 0, first).down for device in devices),
        idle_mb=idle[0],
        after_mb=after_mb,
        device_mb=middle(observer.peak_mb(device, until=last) for device in devices),
        device_pss_mb=observer.peak_pss_mb(devices[0], until=last),
        server_mb=observer.peak_mb(_SERVER, first, last),
        server_start_mb=observer.peak_mb(_SERVER, until=first),
        idle_bytes_s=idle[1],
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Adds both sides' figures, and their ratios: theirs / ours.

    Attributes:
        theirs: The peer's.
        ours: fedge's.
        suffix: Of the keys.
        peer: Its name and version.
        results: Take the figures.
    """

    theirs: Side
    ours: Side
    suffix: str
    peer: str
    results: Results

    def both(self, key: str, unit: str, of: Callable[[Side], float], how: str) -> None:
        """Add a figure of each side."""
        self.results.add(f"{key}_theirs{self.suffix}", of(self.theirs), unit, f"{self.peer}: {how}")
        self.results.add(f"{key}_ours{self.suffix}", of(self.ours), unit, f"fedge: {how}")

    def ratio(self, key: str, of: Callable[[Side], float], how: str) -> None:
        """Add their quotient."""
        self.results.add(f"{key}{self.suffix}", of(self.theirs) / of(self.ours), "x", f"theirs / ours: {how}")

    def overhead_and_bytes(self) -> None:
        """What a round costs beyond training."""
        how = "a round's period less its longest training; median over all rounds but the first"
        self.both("overhead_s", "s", lambda side: middle(side.overhead_s), how)
        spread = " and ".join(
            f"{min(side.overhead_s):.3g}-{max(side.overhead_s):.3g} s" for side in (self.theirs, self.ours)
        )
        self.ratio("overhead_ratio", lambda side: middle(side.overhead_s), f"{how}; {spread}")
        how = "TCP payload of one device in one round, mean over devices and all rounds but the first"
        self.both("up_kb", "KB", lambda side: side.up / 1000, f"{how}, from the device")
        self.both("down_kb", "KB", lambda side: side.down / 1000, f"{how}, to the device")
        self.ratio("bytes_ratio", lambda side: side.up + side.down, f"{how}, both directions")
        how = "TCP payload to a device until the end of the first round, median over the devices"
        self.both("first_down_kb", "KB", lambda side: side.first_down / 1000, how)

    def memory(self, torch_mb: float) -> None:
        """What devices and server hold."""
        how = "peak sum of the RSS of a device's processes over the run, median over the devices"
        self.both("device_mb", "MB", lambda side: side.device_mb, how)
        self.ratio("device_memory_ratio", lambda side: side.device_mb, how)
        how = "the same, beyond what `import torch` takes"
        self.ratio("device_over_torch_ratio", lambda side: side.device_mb - torch_mb, how)
        how = "one device's proportional set size: what several processes of this machine share is divided"
        self.both("device_pss_mb", "MB", lambda side: side.device_pss_mb, how)
        self.ratio("device_pss_ratio", lambda side: side.device_pss_mb, how)
        self.both("device_idle_mb", "MB", lambda side: side.idle_mb, IDLE)
        self.ratio("device_idle_ratio", lambda side: side.idle_mb, IDLE)
        self.both("device_after_mb", "MB", lambda side: side.after_mb, AFTER)
        how = "peak sum of the RSS of the server's processes (with the broker) after the first round"
        self.both("server_mb", "MB", lambda side: side.server_mb, how)
        self.ratio("server_memory_ratio", lambda side: side.server_mb, how)
        how = "the same until the end of the first round"
        self.both("server_start_mb", "MB", lambda side: side.server_start_mb, how)


if __name__ == "__main__":
    main("peer_flwr", QUESTION, measure, PARTS)
