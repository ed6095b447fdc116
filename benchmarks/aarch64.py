"""Does a device with an Arm processor see what this machine sees? The base install and its predictions, emulated.

`edge-agent infer` runs on the same pictures here and on an emulated device that has nothing but fedge's base install.
Emulation says nothing about speed.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.emulation import PROCESSORS, emulated
from benchmarks.runner import BenchmarkError, Options, Results, main, say
from benchmarks.trained import trained
from benchmarks.variants import forced
from federation.task.data import write_samples
from federation.wire.release import ModelFormat

QUESTION = "does an emulated aarch64 device say what this machine says?"
PARTS = ("cnn", "mobilenet_v3_small")

PICTURES = 200
FORMATS = (ModelFormat.FP32, ModelFormat.INT8)
CLASSES = 10

RUN_S = 3000.0
"""Emulated, a picture takes the photo models seconds."""

NO_TORCH = "import importlib.util as u; print([n for n in ('torch', 'onnx') if u.find_spec(n)])"

Answers = Mapping[str, Mapping[str, float]]
"""Of each picture the probability of each label, the most likely first."""


def measure(options: Options, results: Results) -> None:
    """Install, export, classify, compare."""
    processors = PROCESSORS[:1] if options.quick else PROCESSORS
    devices = [emulated(options.folder / "device", processor) for processor in processors]
    there = devices[0].python("-c", NO_TORCH, timeout_s=RUN_S).strip()
    if there != "[]":
        raise BenchmarkError(f"the base install brought {there}: a device that only infers needs none of it")
    for name in PARTS:
        if name not in options.parts:
            continue
        model = trained(name, quick=options.quick)
        pictures = options.folder / f"{name}-pictures"
        write_samples(model.data, pictures, count=PICTURES)
        for form in FORMATS:
            file = forced(model, form, options.folder).model
            arguments = _infer(file, pictures)
            here = _answers(_here(arguments))
            for device in devices:
                say(f"{name} {form} on {len(here)} pictures, {device.processor.name}")
                its = _answers(device.python(*arguments, timeout_s=RUN_S))
                key = f"{name}_{form}_{device.processor.name.replace('-', '_')}{model.suffix}"
                where = f"{name}, {form}: emulated {device.processor.name} ({device.processor.found_in})"
                _compare(here, its, key, where, results)


def _infer(model: Path, pictures: Path) -> list[str]:
    command = ["-m", "edge_agent.cli", "infer", "--model", str(model), "--source", str(pictures)]
    return [*command, "--json", "--top", str(CLASSES)]


def _here(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"edge-agent infer failed on this machine:\n{done.stderr.strip()}")
    return done.stdout


def _answers(lines: str) -> Answers:
    found = [msgspec.json.decode(line) for line in lines.splitlines()]
    return {line["source"]: dict(line["top"]) for line in found if "top" in line}


def _compare(here: Answers, there: Answers, key: str, where: str, results: Results) -> None:
    if here.keys() != there.keys() or not here:
        raise BenchmarkError(f"{where} answered for {len(there)} of {len(here)} pictures")
    differ = sum(next(iter(here[file])) != next(iter(there[file])) for file in here)
    furthest = max(abs(here[file][label] - there[file][label]) for file in here for label in here[file])
    results.add(
        f"top1_differs_{key}", differ, "", f"of {len(here)} pictures, another most likely label; {where}"
    )
    results.add(
        f"probability_{key}", furthest, "", f"furthest that a probability is from this machine's; {where}"
    )


if __name__ == "__main__":
    main("aarch64", QUESTION, measure, PARTS)
