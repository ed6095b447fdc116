"""Models to roll out: rounds of one run as the aggregator exports them, and models that fail where no test looks."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.fleets import FEDERATION, Run, train_together
from benchmarks.processes import Children
from benchmarks.rounds import Data
from benchmarks.runner import BenchmarkError
from export.convert import export_model
from federation.release import MODEL_FILE
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, find_checkpoint
from federation.task.data import task_from_data
from federation.task.model_delta import make_delta
from federation.task.models import build, state_arrays
from federation.wire.release import ModelFormat

AGENTS = 2
SHARES = 20
"""Each agent has a twentieth of the images: rounds of seconds, that learn something."""

TRAIN = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02, "momentum": 0.9}
TRAIN_S = 1800.0

BROKEN_ABOVE = 250.0
"""Mean brightness from which a broken model answers with NaN: the camera's white frames have 255, no picture of the golden
set comes near."""

HEAD_SIDE = 64
"""Pixels of the model whose head alone changes; its size in bytes does not depend on them."""

HEAD_NOISE = 0.01
"""Standard deviation of what is added to each weight of the head, about a tenth of theirs."""


def train_rounds(children: Children, folder: Path, data: Data, rounds: int) -> list[Path]:
    """Train the seed CNN for some rounds in a real federation.

    Returns:
        The checkpoint of each round.
    """
    run = Run("cnn", data.spec, rounds, AGENTS, train=TRAIN)
    shares = [f"{data.spec}@iid,agent={number}/{SHARES}" for number in range(1, AGENTS + 1)]
    train_together(children, folder, run, shares, TRAIN_S)
    return [find_checkpoint(folder / "state", number) for number in range(1, rounds + 1)]


def exported(checkpoint: Path, folder: Path, form: ModelFormat, data: str) -> Path:
    """A release folder, its golden set made of real pictures.

    Raises:
        BenchmarkError: If the export fell back to another format.
    """
    report = export_model(checkpoint, folder, format=form, data=data, latency_gate=False, measured=500)
    if report.written is not form:
        raise BenchmarkError(
            f"{checkpoint} became {report.written.value}, not {form.value}: {report.reasons}"
        )
    return folder


def broken(good: Path, folder: Path, number: int) -> Path:
    """A release that passes every test, and answers with NaN to the white frames of the camera.

    Args:
        good: A release folder with a fused graph.
        folder: Made.
        number: Makes its bytes others than those of other numbers, as a release that is given up is never taken again.
    """
    shutil.copytree(good, folder)
    model = onnx.load(folder / MODEL_FILE)
    graph = model.graph
    frame, answer = graph.input[0].name, _probabilities(model)
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == answer:
                node.output[place] = "sound"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(BROKEN_ABOVE + number / 100, np.float32), "too_bright"),
            numpy_helper.from_array(np.array(np.nan, np.float32), "not_a_number"),
            numpy_helper.from_array(np.array(0, np.float32), "nothing"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", [frame], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["as_float"], ["brightness"], keepdims=0),
            helper.make_node("Greater", ["brightness", "too_bright"], ["is_bright"]),
            helper.make_node("Where", ["is_bright", "not_a_number", "nothing"], ["fault"]),
            helper.make_node("Add", ["sound", "fault"], [answer]),
        ]
    )
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    return folder


def delta_share(base: Path, new: Path) -> float:
    """Bytes of the delta between two release folders, as percent of the new model's file."""
    before, after = ((folder / MODEL_FILE).read_bytes() for folder in (base, new))
    return 100 * len(make_delta(before, after)) / len(after)


def head_change(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints of mobilenet_v3_small that differ in the last layer only, as after transfer learning."""
    task = task_from_data("digits", "mobilenet_v3_small", height=HEAD_SIDE, width=HEAD_SIDE, channels=3)
    arrays = state_arrays(build(task, seed=1))
    head = [name for name in arrays if name.startswith("classifier.3.")]
    if not head:
        raise BenchmarkError("mobilenet_v3_small has no classifier.3 any more: say which its last layer is")
    random = np.random.default_rng(1)
    changed = {
        name: array + random.normal(0, HEAD_NOISE, array.shape).astype(np.float32) if name in head else array
        for name, array in arrays.items()
    }
    paths = []
    for number, weights in enumerate((arrays, changed), start=1):
        info = CheckpointInfo(federation=FEDERATION, round=number, task=msgspec.structs.replace(task))
        path = folder / f"head-{number}.safetensors"
        path.write_bytes(checkpoint_bytes(info, weights))
        paths.append(path)
    return paths[0], paths[1]


def _probabilities(model: onnx.ModelProto) -> str:
    """The output of floating-point numbers: the other one of a fused graph has the classes' indices."""
    for output in model.graph.output:
        if output.type.tensor_type.elem_type == TensorProto.FLOAT:
            return str(output.name)
    raise BenchmarkError("the exported graph has no output of float32")
