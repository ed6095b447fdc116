"""How much memory the parts of a federation take: peaks of resident memory (Linux' VmHWM), process by process."""

from benchmarks.fleets import START_S, Fleet, Run
from benchmarks.processes import Children, module, python
from benchmarks.runner import Options, Results, middle, say

LARGE_MODEL = "resnet18"
"""11.2 million parameters, 45 MB."""

FEW, MANY = 10, 50
AGENTS_PER_PROCESS = 10

SAMPLES = 12_000
"""Of one of five agents on MNIST."""

BATCH, EPOCHS, RATE, MOMENTUM = 32, 1, 0.01, 0.9

PICTURES = 200

WRITE_PICTURES = """
import sys
from pathlib import Path
from federation.task.data import write_samples
write_samples(sys.argv[1], Path(sys.argv[2]), count=int(sys.argv[3]))
"""
"""In a process of its own: reading MNIST imports torch."""

RUN_TIMEOUT_S = 1200.0


def aggregator_memory(children: Children, options: Options, results: Results) -> None:
    """`aggregator serve` with few and with many agents in a round of the large model."""
    repeats, rounds = (1, 1) if options.quick else (3, 2)
    for agents in (FEW, MANY):
        say(f"aggregator's memory: {agents} light agents, {LARGE_MODEL}, {rounds} rounds, {repeats} times")
        peaks, brokers, seconds = [], [], []
        first_start = 0.0
        for repeat in range(repeats):
            fleet = Fleet(
                children,
                options.folder / f"memory-{agents}-{repeat}",
                Run(LARGE_MODEL, "mnist", rounds, agents),
            )
            first_start = _begin(children, fleet)
            bundles = [str(fleet.enroll(f"light-{number}")) for number in range(1, agents + 1)]
            light = [
                children.start(
                    f"{fleet.folder.name}-light-{start}",
                    *module("benchmarks.light_agents", *bundles[start : start + AGENTS_PER_PROCESS]),
                )
                for start in range(0, agents, AGENTS_PER_PROCESS)
            ]
            server = fleet.serve()
            done = fleet.finish(server, RUN_TIMEOUT_S)
            children.stop(server, *light)
            peaks.append(server.peak_mb)
            brokers.append(fleet.broker_peak_mb)
            seconds += [each.seconds for each in done]
        note = f"{agents} agents without torch, {LARGE_MODEL}, no hold-out; median of {repeats}"
        results.add(
            f"aggregator_peak_mb_{agents}", middle(peaks), "MB", f"peak RSS of `aggregator serve`; {note}"
        )
        results.add(f"broker_peak_mb_{agents}", middle(brokers), "MB", f"peak RSS of nats-server; {note}")
        results.add(f"round_s_{agents}", middle(seconds), "s", f"opening to closing of such a round; {note}")
    results.add(
        "aggregator_first_start_mb",
        first_start,
        "MB",
        "peak RSS of the server that begins the run; the initial model is built with torch in a process that ends",
    )


def agent_memory(children: Children, options: Options, data: str, suffix: str, results: Results) -> None:
    """`edge-agent run` against a bare training loop on the same images."""
    # One peak in three is 50 MB higher, of either process: a single one would say nothing, also when in a hurry.
    repeats, rounds = 3, 1 if options.quick else 2
    if suffix:
        say("the agent's memory is compared on MNIST only: left out")
        return
    say(
        f"agent's memory: cnn on {SAMPLES} MNIST images, {EPOCHS} epoch, against a bare loop, {repeats} times"
    )
    train = {"batch_size": BATCH, "epochs": EPOCHS, "learning_rate": RATE, "momentum": MOMENTUM}
    ours, bare = [], []
    for repeat in range(repeats):
        name = f"agent-memory-{repeat}"
        arguments = [str(value) for value in (SAMPLES, BATCH, EPOCHS, RATE, MOMENTUM)]
        plain = children.start(
            f"{name}-bare", *module("benchmarks.plain_training", data.partition(":")[2], *arguments)
        )
        children.wait(plain, RUN_TIMEOUT_S)
        bare.append(plain.peak_mb)
        fleet = Fleet(children, options.folder / name, Run("cnn", data, rounds, 1, train=train))
        (agent,) = fleet.join([f"{data}@iid,agent=1/5"])
        server = fleet.serve()
        fleet.finish(server, RUN_TIMEOUT_S)
        children.stop(server, agent)
        ours.append(agent.peak_mb)
    note = f"median of {repeats}"
    results.add("agent_mb", middle(ours), "MB", f"peak RSS of `edge-agent run`, {rounds} rounds; {note}")
    results.add(
        "plain_training_mb",
        middle(bare),
        "MB",
        f"the same of a script: torch, torchvision, images, loop; {note}",
    )
    results.add(
        "agent_mb_over_torch",
        middle(ours) - middle(bare),
        "MB",
        "the difference: all that fedge adds to torch",
    )


def inference_memory(children: Children, options: Options, data: str, suffix: str, results: Results) -> None:
    """`edge-agent infer` with the exported cnn."""
    repeats = 3
    say(f"inference's memory: `edge-agent infer` with cnn on {PICTURES} pictures, {repeats} times")
    fleet = Fleet(children, options.folder / "infer-memory", Run("cnn", data, 1, 1))
    _begin(children, fleet)
    model, pictures = fleet.folder / "cnn" / "model.onnx", fleet.folder / "pictures"
    export = children.start(
        "infer-memory-export", *module("export.cli", "onnx", str(fleet.state), "-o", str(model.parent))
    )
    children.wait(export, START_S)
    samples = children.start(
        "infer-memory-pictures", *python(WRITE_PICTURES, data, str(pictures), str(PICTURES))
    )
    children.wait(samples, START_S)
    peaks = []
    for repeat in range(repeats):
        infer = children.start(
            f"infer-memory-{repeat}",
            *module("edge_agent.cli", "infer", "--model", str(model), "--source", str(pictures)),
        )
        children.wait(infer, START_S)
        peaks.append(infer.peak_mb)
    results.add(
        "infer_rss_mb" + suffix,
        middle(peaks),
        "MB",
        f"peak RSS of `edge-agent infer` with cnn, {PICTURES} pictures; median of {repeats}",
    )


def _begin(children: Children, fleet: Fleet) -> float:
    """Make a run's initial model and stop. The server that is measured then starts on it, as after any restart."""
    server = fleet.serve()
    children.until(lambda: b'"broker_connected"' in server.log.read_bytes(), START_S, f"{server.name} is up")
    children.stop(server)
    return server.peak_mb
