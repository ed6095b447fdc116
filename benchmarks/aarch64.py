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

RUN_S = 3000.0
"""Emulated, a picture takes the photo models seconds."""

PROBED = 50
"""Pictures for the probabilities, which `edge-agent infer` rounds to four digits."""

PROBE = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from federation.task.engine import Engine
model, folder, count = sys.argv[1:]
engine = Engine(Path(model), top=int(1e6))
for file in sorted(Path(folder).iterdir())[: int(count)]:
    print(json.dumps({"source": file.name, "top": engine.predict(Image.open(file)).top}))
"""

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
            infer = _infer(file, pictures)
            probe = ["-c", PROBE, str(file), str(pictures), str(PROBED)]
            here = _answers(_here(infer)), _answers(_here(probe))
            for device in devices:
                say(f"{name} {form} on {PICTURES} pictures, {device.processor.name}")
                its = tuple(_answers(device.python(*each, timeout_s=RUN_S)) for each in (infer, probe))
                key = f"{name}_{form}_{device.processor.name.replace('-', '_')}{model.suffix}"
                where = f"{name}, {form}: emulated {device.processor.name} ({device.processor.found_in})"
                _compare(here[0], its[0], key, where, results)
                furthest = max(
                    abs(share - its[1][picture][label])
                    for picture, shares in here[1].items()
                    for label, share in shares.items()
                )
                how = f"furthest that a probability is from this machine's, {PROBED} pictures; {where}"
                results.add(f"probability_{key}", furthest, "", how)


def _infer(model: Path, pictures: Path) -> list[str]:
    command = ["-m", "edge_agent.cli", "infer", "--model", str(model), "--source", str(pictures)]
    return [*command, "--json"]


def _here(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"edge-agent infer failed on this machine:\n{done.stderr.strip()}")
    return done.stdout


def _answers(lines: str) -> Answers:
    found = [msgspec.json.decode(line) for line in lines.splitlines()]
    return {Path(line["source"]).name: dict(line["top"]) for line in found if "top" in line}


def _compare(here: Answers, its: Answers, key: str, where: str, results: Results) -> None:
    if here.keys() != its.keys() or len(here) != PICTURES:
        raise BenchmarkError(
            f"{where} answered for {len(its)} pictures, this machine for {len(here)} of {PICTURES}"
        )
    differ = sum(next(iter(here[picture])) != next(iter(its[picture])) for picture in here)
    results.add(
        f"top1_differs_{key}", differ, "", f"of {PICTURES} pictures, another most likely label; {where}"
    )


if __name__ == "__main__":
    main("aarch64", QUESTION, measure, PARTS)
