"""What a released model costs on a device beside PyTorch: latency, accuracy, memory, and the CPU that waiting takes.

Models are trained on real images and exported as the aggregator does it, with its gates; whatever they write is measured.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image

from benchmarks.fleets import START_S, Fleet, Run
from benchmarks.processes import Child, Children, module
from benchmarks.runner import BenchmarkError, Options, Results, main, middle, say
from benchmarks.trained import RECIPES, RGB, Trained, trained
from benchmarks.variants import release
from export.benchmark import Row, side_by_side
from export.benchmark_messages import Load
from export.benchmark_worker import CAMERA
from export.report import ExportReport
from federation.task.data import write_samples
from federation.wire.release import ModelFormat

QUESTION = "what does a released model cost on a device, beside PyTorch's eager mode?"
PARTS = ("latency", "accuracy", "memory", "cpu")

THREADS = 1
SECONDS, QUICK_SECONDS = 15.0, 4.0
"""For each model, in five bursts."""

QUICK_IMAGES = 500
"""Test images; all of them otherwise."""

WITH_MEMORY = ("cnn", "mobilenet_v3_small")
PICTURES = 200

FPS = 10
SETTLE_S = 5.0
"""Until imports, the first frames and the first connection are over."""

WATCH_S, QUICK_WATCH_S = 30.0, 15.0
REPEATS = 3

RUN_S = 300.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and its release.

    Attributes:
        model: As trained.
        report: Of its export.
    """

    model: Trained
    report: ExportReport

    def key(self, prefix: str) -> str:
        """Of a figure; one that was not measured on the real images is another."""
        return f"{prefix}_{self.model.name}{self.model.suffix}"


def measure(options: Options, results: Results) -> None:
    """Train or take from the cache, export, run the parts that were asked for."""
    wanted = tuple(RECIPES) if options.parts & {"latency", "accuracy"} else WITH_MEMORY
    if options.parts == {"cpu"}:
        wanted = WITH_MEMORY[:1]
    subjects = {name: _subject(name, options) for name in wanted}
    if "latency" in options.parts:
        for subject in subjects.values():
            latency(subject, options, results)
    if "accuracy" in options.parts:
        accuracy(list(subjects.values()), options, results)
    with Children(options.folder / "logs") as children:
        if "memory" in options.parts:
            for name in WITH_MEMORY:
                memory(children, subjects[name], options, results)
        if "cpu" in options.parts:
            cpu(children, subjects[WITH_MEMORY[0]], options, results)


def _subject(name: str, options: Options) -> Subject:
    model = trained(name, quick=options.quick)
    report = release(model, ModelFormat.INT8, options.folder)
    for reason in report.reasons:
        say(f"{name}: {reason}")
    return Subject(model, report)


def latency(subject: Subject, options: Options, results: Results) -> None:
    """From a raw frame to a label, and the model alone, in turn with torch."""
    model = str(subject.report.model)
    checkpoint = str(subject.model.checkpoint)
    say(f"latency: {subject.model.name}, {subject.report.written}, {THREADS} thread")
    loads = [
        Load(path=model, threads=THREADS, frame=None),
        Load(path=checkpoint, threads=THREADS, frame=None),
        Load(path=checkpoint, threads=THREADS, frame=None, tuned=True),
    ]
    seconds = QUICK_SECONDS if options.quick else SECONDS
    ours, eager, tuned = side_by_side(loads, data=None, limit=0, seconds=seconds)
    height, width, channels = ours.frame
    frame = f"{width}x{height}x{channels} bytes to label"
    how = f"{frame}, {ours.format} in {ours.runtime} against {eager.runtime} with transforms.v2; {THREADS} thread"
    _ratio(results, subject.key("speedup"), ours.burst_ms, eager.burst_ms, how)
    how = f"{frame}, against torch with frames prepared by hand"
    _ratio(results, subject.key("speedup_by_hand"), ours.burst_ms, tuned.burst_ms, how)
    how = "the model alone (ours with normalisation and top-k), on an input of its own size"
    _ratio(results, subject.key("speedup_model"), ours.model_burst_ms, eager.model_burst_ms, how)
    for key, row in (("ms", ours), ("ms_torch", eager), ("ms_torch_by_hand", tuned)):
        low, high = min(row.burst_ms), max(row.burst_ms)
        how = f"{frame}: median of 5 bursts of {low:.3g}-{high:.3g}; p99 {row.p99_ms:.3g}; {row.runtime}"
        results.add(subject.key(key), row.p50_ms, "ms", how)


def _ratio(results: Results, key: str, ours: Sequence[float], theirs: Sequence[float], how: str) -> None:
    """Of medians of bursts that are neighbours in time."""
    ratios = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
    results.add(
        key, middle(ratios), "x", f"{how}; {min(ratios):.3g}-{max(ratios):.3g} in {len(ratios)} bursts"
    )


def accuracy(subjects: Sequence[Subject], options: Options, results: Results) -> None:
    """Of the released file, through the whole path, against torch in float32, on the same test images."""
    drops = []
    for subject in subjects:
        say(f"accuracy: {subject.model.name}, {subject.report.written}")
        loads = [
            Load(path=str(path), threads=THREADS, frame=None)
            for path in (subject.report.model, subject.model.checkpoint)
        ]
        limit = QUICK_IMAGES if options.quick else 0
        ours, eager = side_by_side(loads, data=subject.model.data, limit=limit, seconds=0.1)
        released, reference = _top1(ours), _top1(eager)
        how = f"of {ours.images} test images, {ours.format}; torch in float32 {reference:.2f}"
        results.add(subject.key("top1"), released, "%", how)
        drops.append(reference - released)
    suffix = "".join(sorted({subject.model.suffix for subject in subjects}))
    how = "largest loss of accuracy of a released file against its float32 model in torch: " + ", ".join(
        f"{subject.model.name} ({subject.report.written}) {drop:+.2f}"
        for subject, drop in zip(subjects, drops, strict=True)
    )
    results.add("worst_drop_points" + suffix, max(drops), "points", how)


def _top1(row: Row) -> float:
    assert row.top1 is not None  # data was named
    return 100 * row.top1


def memory(children: Children, subject: Subject, options: Options, results: Results) -> None:
    """Peak of a whole `edge-agent infer` process, alone and with its link to a broker."""
    name = subject.model.name
    pictures = _pictures(subject, options)
    command = ["--model", str(subject.report.model), "--source", str(pictures)]
    alone = [_peak(children, f"memory-{name}-{repeat}", command) for repeat in range(REPEATS)]
    how = f"peak RSS of `edge-agent infer`, {PICTURES} pictures; median of {REPEATS}"
    results.add(subject.key("rss_mb"), middle(alone), "MB", how)
    fleet = Fleet(children, options.folder / f"memory-{name}", Run("cnn", "digits", 1, 1))
    bundle = str(fleet.enroll("camera"))
    server = fleet.serve()
    children.until(lambda: b'"broker_connected"' in server.log.read_bytes(), START_S, "the broker is up")
    linked = [
        _peak(children, f"memory-{name}-mqtt-{repeat}", [bundle, *command, "--publish", "mqtt"])
        for repeat in range(REPEATS)
    ]
    children.stop(server)
    results.add(subject.key("rss_mb_mqtt"), middle(linked), "MB", f"{how}; with --publish mqtt")


def _peak(children: Children, name: str, arguments: Sequence[str]) -> float:
    child = children.start(name, *module("edge_agent.cli", "infer", *arguments))
    children.wait(child, RUN_S)
    return child.peak_mb


def _pictures(subject: Subject, options: Options) -> Path:
    """Test images as files; those for models of photographs in a camera's size."""
    folder = options.folder / f"{subject.model.name}-pictures"
    if not folder.exists():
        write_samples(subject.model.data, folder, count=PICTURES)
        if subject.report.info.task.channels == RGB:
            for path in folder.iterdir():
                with Image.open(path) as image:
                    large = image.resize(CAMERA[::-1])
                large.save(path)
    return folder


def cpu(children: Children, subject: Subject, options: Options, results: Results) -> None:
    """Of a whole `edge-agent infer` process that labels ten frames a second."""
    pictures = _pictures(subject, options)
    watch_s = QUICK_WATCH_S if options.quick else WATCH_S
    shown = options.folder / "shown"
    shown.mkdir()
    originals = sorted(pictures.iterdir())
    for number in range(int(FPS * (SETTLE_S + watch_s) * 2)):  # enough of them, whatever is in the folder
        original = originals[number % len(originals)]
        (shown / f"{number:06d}{original.suffix}").symlink_to(original)
    shares = []
    for repeat in range(REPEATS):
        child = children.start(
            f"cpu-{repeat}",
            *module("edge_agent.cli", "infer", "--model", str(subject.report.model)),
            *("--source", str(shown), "--fps", str(FPS)),
        )
        shares.append(_share(children, child, watch_s))
        children.stop(child)
    how = f"CPU time of `edge-agent infer --fps {FPS}` in {watch_s:.0f} s, reading files included, of one CPU; median of {REPEATS}"
    results.add(
        "idle_cpu_percent" + subject.model.suffix, middle(shares), "%", f"{how}; {subject.model.name}"
    )


def _share(children: Children, child: Child, watch_s: float) -> float:
    """Percent of one CPU, once it has settled."""
    children.until(lambda: child.log.stat().st_size > 0, START_S, "the first label")
    process = psutil.Process(child.process.pid)
    begins = time.monotonic() + SETTLE_S
    children.until(lambda: time.monotonic() >= begins, 2 * SETTLE_S, "it has settled")
    before, began = process.cpu_times(), time.monotonic()
    children.until(lambda: time.monotonic() >= began + watch_s, 2 * watch_s, "it was watched")
    if child.ended:
        raise BenchmarkError(f"{child.name} had no more frames: {child.failure()}")
    after = process.cpu_times()
    spent_s = after.user + after.system - before.user - before.system
    return 100 * spent_s / (time.monotonic() - began)


if __name__ == "__main__":
    main("inference", QUESTION, measure, PARTS)
