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

IDLE_S = 10.0
"""For which the devices wait for the last one to join: what they take then is what an idle device takes."""

SETTLE_S = 5.0
"""After which a started device has loaded what it loads."""

TIMEOUT_S = 1200.0

_SERVER = "server"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of one side.

    Attributes:
        overhead_s: Round by round, the first left out: its period less its longest training, seconds.
        up: Bytes of one device in one round, mean over devices and rounds but the first.
        down: The same, towards the device.
        first_down: Bytes towards one device until the end of the first round.
        idle_mb: Resident memory of a device that waits, before it ever trained.
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
            rounds_theirs, rounds_ours = (4, 20) if options.quick else (7, 30)
            say(f"{model}: Flower {environment.version}, {AGENTS} devices, {rounds_theirs} rounds")
            run = Run(model, data.spec, rounds_theirs, AGENTS, train=TRAIN)
            theirs = flower(
                children, options.folder / f"{model}-flower", environment, run, shares, SIDE[name]
            )
            say(f"{model}: fedge, {AGENTS} devices, {rounds_ours} rounds")
            run = Run(model, data.spec, rounds_ours, AGENTS, train=TRAIN)
            ours = fedge(children, options.folder / f"{model}-fedge", run, shares)
            suffix = ("" if model == "cnn" else f"_{model}") + data.suffix
            compare(theirs, ours, torch_mb, suffix, f"Flower {environment.version}", results)


def bare_torch_mb(children: Children) -> float:
    """Peak of a process that imports torch and nothing else, median of three; how it ends, 100 MB more, is left out."""
    peaks = []
    for repeat in range(3):
        child = children.start(f"torch-{repeat}", *python("import os, torch; os._exit(0)"))
        children.wait(child, START_S)
        peaks.append(child.peak_mb)
    return middle(peaks)


def flower(
    children: Children, folder: Path, environment: Environment, run: Run, shares: Sequence[Path], side: int
) -> Side:
    """Run SuperLink, SuperNodes and app."""
    deployment = Deployment(children, folder, environment)
    with Observer() as observer, ExitStack() as proxies:
        server = deployment.serve()
        observer.follow(_SERVER, server.process.pid)
        nodes = []
        for number, share in enumerate(shares, 1):
            if number == len(shares):
                idle = wait_idle(children, observer)
            proxy = proxies.enter_context(CountingProxy(deployment.port))
            nodes.append(deployment.join(number, proxy.port, share))
            watch(observer, number, nodes[-1], proxy)
        marks = deployment.run(run, side, TIMEOUT_S)
        overheads = [mark.at - before.at - mark.longest_train_s for before, mark in pairwise(marks[1:])]
        measured = taken(observer, run, idle, overheads, marks[1].at, marks[-1].at)
        children.stop(*nodes, server)
    return measured


def fedge(children: Children, folder: Path, run: Run, shares: Sequence[Path]) -> Side:
    """Run `aggregator serve` with its embedded broker, and `edge-agent run` processes, as they are by default."""
    fleet = Fleet(children, folder, run)
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
                idle = wait_idle(children, observer)
            agents.append(fleet.start(bundle, f"imagefolder:{share}"))
            watch(observer, number, agents[-1], way)
        done = fleet.finish(server, TIMEOUT_S)
        ends = [each.row.closed_at for each in done]
        assert ends[0] is not None
        assert ends[-1] is not None
        measured = taken(observer, run, idle, beyond_training(done), ends[0], ends[-1])
        children.stop(*agents, server)
    return measured


def is_connected(log: Path) -> bool:
    """Whether an agent has reached its broker."""
    return b'"broker_connected"' in log.read_bytes()


def watch(observer: Observer, number: int, child: Child, proxy: CountingProxy) -> None:
    """Follow a device."""
    observer.follow(f"device-{number}", child.process.pid, pss=number == 1)
    observer.count(f"device-{number}", proxy)


def wait_idle(children: Children, observer: Observer) -> tuple[float, float]:
    """Let the devices wait; returns the first one's peak memory, MiB, and its bytes a second."""
    began = time.time()
    children.until(
        lambda: time.time() > began + SETTLE_S + IDLE_S, 2 * (SETTLE_S + IDLE_S), "devices are idle"
    )
    since, until = began + SETTLE_S, began + SETTLE_S + IDLE_S
    traffic = observer.bytes_between("device-1", since, until)
    return observer.peak_mb("device-1", since, until), (traffic.up + traffic.down) / IDLE_S


def taken(
    observer: Observer,
    run: Run,
    idle: tuple[float, float],
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
        device_mb=middle(observer.peak_mb(device, until=last) for device in devices),
        device_pss_mb=observer.peak_pss_mb(devices[0], until=last),
        server_mb=observer.peak_mb(_SERVER, first, last),
        server_start_mb=observer.peak_mb(_SERVER, until=first),
        idle_bytes_s=idle[1],
    )


def compare(theirs: Side, ours: Side, torch_mb: float, suffix: str, peer: str, results: Results) -> None:
    """Add both sides' figures and their ratios, theirs / ours."""

    def both(key: str, unit: str, of: Callable[[Side], float], how: str) -> float:
        results.add(f"{key}_theirs{suffix}", of(theirs), unit, f"{peer}: {how}")
        results.add(f"{key}_ours{suffix}", of(ours), unit, f"fedge: {how}")
        return of(theirs) / of(ours)

    def ratio(key: str, value: float, how: str) -> None:
        results.add(f"{key}{suffix}", value, "x", f"theirs / ours: {how}")

    period = "a round's period less its longest training; median over all rounds but the first"
    overhead = both("overhead_s", "s", lambda side: middle(side.overhead_s), period)
    spread = " and ".join(
        f"{min(side.overhead_s):.3g}-{max(side.overhead_s):.3g} s" for side in (theirs, ours)
    )
    ratio("overhead_ratio", overhead, f"{period}; {spread}")
    mean = "TCP payload of one device in one round, mean over devices and all rounds but the first"
    up = both("up_kb", "KB", lambda side: side.up / 1000, f"{mean}, from the device")
    down = both("down_kb", "KB", lambda side: side.down / 1000, f"{mean}, to the device")
    ratio("bytes_ratio", (theirs.up + theirs.down) / (ours.up + ours.down), f"{mean}, both directions")
    ratio("up_bytes_ratio", up, "from the device")
    ratio("down_bytes_ratio", down, "to the device")
    both(
        "first_down_kb",
        "KB",
        lambda side: side.first_down / 1000,
        "to a device until the first round's end; median",
    )
    peak = "peak sum of the RSS of a device's processes over the run, median over the devices"
    ratio("device_memory_ratio", both("device_mb", "MB", lambda side: side.device_mb, peak), peak)
    beyond = "the same, beyond what `import torch` takes"
    ratio("device_over_torch_ratio", (theirs.device_mb - torch_mb) / (ours.device_mb - torch_mb), beyond)
    pss = "the same as proportional set size, of one device: what several processes of this machine share is divided"
    ratio("device_pss_ratio", both("device_pss_mb", "MB", lambda side: side.device_pss_mb, pss), pss)
    idle = "a device that is connected and waits, before its first round: sum of its processes' RSS"
    ratio("device_idle_ratio", both("device_idle_mb", "MB", lambda side: side.idle_mb, idle), idle)
    server = "peak sum of the RSS of the server's processes (with the broker) after the first round"
    ratio("server_memory_ratio", both("server_mb", "MB", lambda side: side.server_mb, server), server)
    both(
        "server_start_mb",
        "MB",
        lambda side: side.server_start_mb,
        "the same until the end of the first round",
    )
    both("idle_bytes_s", "B/s", lambda side: side.idle_bytes_s, "a waiting device, both directions")


if __name__ == "__main__":
    main("peer_flwr", QUESTION, measure, PARTS)
