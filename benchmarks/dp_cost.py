"""Time and memory of an epoch under DP-SGD against a plain one with the same batches, by the product's trainer.

``python -m benchmarks.dp_cost DATA plain|private EPOCHS`` is one process of the comparison.
"""

import json
import sys
import time

from benchmarks.processes import Children, module
from benchmarks.rounds import AGENTS, find_data
from benchmarks.runner import Options, Results, middle, say

MODEL = "cnn"
BATCH = 256
EPOCHS = 3
"""In each process; the first, in which kernels are compiled and caches filled, is not counted."""

TIMEOUT_S = 600.0
_MIB = 1 << 20


def one_process(data: str, kind: str, epochs: int) -> None:
    """Train for some rounds of one epoch and print how long each took, and the peak of resident memory."""
    import msgspec
    import psutil
    import torch

    before = psutil.Process().memory_info().rss / _MIB
    from benchmarks.simulation import plan_of
    from edge_agent.training import TorchTrainer
    from federation.logs import configure
    from federation.task.data import task_from_data
    from federation.task.models import build, state_arrays
    from federation.wire.messages import TrainSpec
    from privacy.budget import PrivateRound, steps_of

    torch.set_num_threads(1)
    configure(level="warning")
    task = msgspec.structs.replace(task_from_data(data, MODEL), dp_ready=True)
    trainer = TorchTrainer(f"{data}@iid,agent=1/{AGENTS}", device="cpu", threads=1)
    plan = plan_of(1, task, TrainSpec(epochs=1, batch_size=BATCH, learning_rate=0.01))
    base = state_arrays(build(task))
    private = None
    if kind == "private":
        rate, steps = steps_of(trainer.samples(task), BATCH, 1, 0)
        private = PrivateRound(noise_multiplier=1.0, clip_norm=1.0, sample_rate=rate, steps=steps)
    seconds = []
    for _ in range(epochs):
        began = time.process_time()
        trainer.train(base, plan, "agent", lambda: False, private=private)
        seconds.append(time.process_time() - began)
    say(json.dumps({"seconds": seconds, "before_mb": before}))


def measure_cost(options: Options, results: Results) -> None:
    """The part ``cost`` of ``python -m benchmarks.dp``."""
    repeats = 3 if options.quick else 5
    data = find_data()
    say(f"cost: {MODEL}, batches of {BATCH}, {EPOCHS} epochs, private and plain in turn, {repeats} times")
    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    peaks: dict[str, list[float]] = {"plain": [], "private": []}
    before = []
    with Children(options.folder / "cost") as children:
        for repeat in range(repeats):
            for kind in ("plain", "private"):
                child = children.start(
                    f"{kind}-{repeat}", *module("benchmarks.dp_cost", data.spec, kind, str(EPOCHS))
                )
                children.wait(child, TIMEOUT_S)
                told = json.loads(child.log.read_text().splitlines()[-1])
                seconds[kind].append(middle(told["seconds"][1:]))
                peaks[kind].append(child.peak_mb)
                before.append(told["before_mb"])
    times = [one / other for one, other in zip(seconds["private"], seconds["plain"], strict=True)]
    memory = [one / other for one, other in zip(peaks["private"], peaks["plain"], strict=True)]
    suffix, note = data.suffix, f"median of {repeats} pairs"
    results.add(
        f"time_ratio{suffix}",
        middle(times),
        "",
        f"CPU time of a private epoch over a plain one, same batch of {BATCH}; {note}, {min(times):.2f} to {max(times):.2f}",
    )
    results.add(
        f"memory_ratio{suffix}",
        middle(memory),
        "",
        f"peak RSS of the private process over the plain one's; {note}, {min(memory):.2f} to {max(memory):.2f}",
    )
    for kind, values in seconds.items():
        results.add(
            f"{kind}_epoch_s{suffix}", middle(values), "s", f"CPU time of a {kind} epoch; median of {repeats}"
        )
        results.add(
            f"{kind}_peak_mb{suffix}",
            middle(peaks[kind]),
            "MB",
            f"peak RSS of that process; median of {repeats}",
        )
    results.add(f"torch_mb{suffix}", middle(before), "MB", "of which the import of torch takes; median")


if __name__ == "__main__":
    one_process(sys.argv[1], sys.argv[2], int(sys.argv[3]))
