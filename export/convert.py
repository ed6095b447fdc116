"""From a checkpoint to a release folder: a model that a device can run, and the pictures that prove it there.

Nothing is written before onnxruntime agreed with torch, and no smaller format before it passed the gates.
"""

import dataclasses
import hashlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from PIL import Image

import federation
from export.gates import DEFAULT_MAX_DROP
from export.golden_set import make_golden, synthetic_frames
from export.parity import DEFAULT_TOLERANCE, FUSED_TOLERANCE, Parity, check_parity, frame_of
from export.pictures import DEFAULT_MEASURED, Pictures, read_pictures
from export.report import ExportReport
from export.tracing import DEFAULT_OPSET, trace
from export.variants import Chosen, Request, choose
from federation.errors import ConfigError
from federation.files import disk_error, write_whole
from federation.release import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE
from federation.task.checkpoint import CheckpointInfo, read_checkpoint, read_metrics
from federation.task.engine import Engine
from federation.task.golden import Golden, write_golden
from federation.task.model_card import HoldOutMetrics, ModelCard, Preprocess, Provenance
from federation.task.models import build, load_arrays, state_arrays
from federation.task.preprocessing import PICTURE_MODES, Preprocessing
from federation.wire.messages import TaskSpec
from federation.wire.release import ModelFormat, ReleaseMetrics

if TYPE_CHECKING:
    from torch import nn

DEFAULT_TOPK = 5

_MAX_PROTOBUF_BYTES = 2**31 - 1
_GRAPH_ALLOWANCE_BYTES = 16 * 2**20
"""For everything in the file that is not weights."""

_SYNTHETIC_PICTURES = 64
_GIT_TIMEOUT_S = 10


def export_model(
    checkpoint: Path,
    folder: Path,
    *,
    format: ModelFormat = ModelFormat.FP32,  # noqa: A002 - the name that the flag and the wire have
    preprocess: Preprocess = "fused",
    data: str | None = None,
    imgsz: int | None = None,
    topk: int = DEFAULT_TOPK,
    max_drop: float = DEFAULT_MAX_DROP,
    latency_gate: bool = True,
    measured: int = DEFAULT_MEASURED,
    opset: int = DEFAULT_OPSET,
    tolerance: float = DEFAULT_TOLERANCE,
) -> ExportReport:
    """Export a checkpoint to a release folder: ``model.onnx`` and ``golden.safetensors``.

    The float32 model must agree with torch. A smaller format is then made of it and held against it
    (:mod:`export.gates`); if it fails, the float32 model is written, and the report says why.

    Args:
        checkpoint: As ``federation.task.checkpoint`` writes it.
        folder: Created if its parent exists; an earlier export in it is replaced, a signed release is not.
        format: ``int8`` needs ``data``.
        preprocess: ``fused``: the graph takes raw frames (:mod:`export.fused`). ``none``: it takes normalised pictures and
            gives logits.
        data: Pictures to calibrate with and to measure on (:func:`export.pictures.read_pictures`). Calibration uses the
            training split and the gates the test split, where there are two.
        imgsz: Side of the model's input in pixels, instead of the one that it was trained with; only for models that take
            pictures of any size.
        topk: How many classes a fused graph answers with; fewer if the model has fewer.
        max_drop: Most percentage points of accuracy that a smaller format may lose.
        latency_gate: Whether a smaller format must not be slower than float32 on this machine.
        measured: At most so many pictures of ``data`` are used by the gates.
        opset: ONNX operator set, 18 or later.
        tolerance: Largest difference of a logit to torch, relative to the largest logit.

    Raises:
        ConfigError: If the checkpoint or the data cannot be read or used, the model cannot be exported or is too large, the
            folder cannot be written, or torch or onnx is not installed.
        VerificationError: If weights are not finite, or onnxruntime and torch disagree.
    """
    _require("torch", "onnx", "onnxscript")
    _check_folder(folder)
    if format is ModelFormat.INT8 and data is None:
        raise ConfigError(
            "int8 is calibrated with pictures of what the cameras will see: name some with --data, or choose --format fp32"
        )
    info, arrays = read_checkpoint(checkpoint)
    model, task = _model(info, arrays, imgsz)
    pictures = _pictures(data, task, measured)
    card = ModelCard(
        labels=task.labels,
        preprocessing=Preprocessing.of(task),
        provenance=_provenance(checkpoint, info),
        preprocess=preprocess,
        topk=min(topk, len(task.labels)) if preprocess == "fused" else None,
    )
    core = trace(model, task, opset=opset)
    parity = check_parity(
        core.SerializeToString(),
        model,
        card.preprocessing,
        tolerance=tolerance,
        pixels=None if data is None else pictures.pixels,
    )
    request = Request(
        format=format,
        task=task,
        card=card,
        data=data,
        pictures=pictures,
        max_drop=max_drop,
        latency_gate=latency_gate,
        tolerance=max(tolerance, FUSED_TOLERANCE),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="fedge-export-") as name:
            chosen = choose(core, request, Path(name))
            golden = make_golden(Engine(chosen.path), pictures.frames, chosen.card.provenance.weights)
            content = chosen.path.read_bytes()
    except OSError as error:  # every variant is a file for a while
        raise disk_error(error, Path(tempfile.gettempdir())) from error
    _write(folder, content, golden)
    return _report(folder, chosen, parity, info, wanted=format, frames=len(golden.frames))


def default_folder(info: CheckpointInfo) -> Path:
    """``MODEL-round-N`` in the current folder; of a plug-in's name only the factory's."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", info.task.model.rpartition(":")[2])
    return Path(f"{name}-round-{info.round}")


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export needs {', '.join(missing)}: pip install 'fedge[aggregator]'")


def _check_folder(folder: Path) -> None:
    """Refuse before the work what would fail, or do harm, after it."""
    if folder.suffix == ".onnx" or folder.is_file():
        raise ConfigError(
            f"{folder} would be a file, an export is a folder with the model and its golden set: name a folder"
        )
    if not folder.parent.is_dir():
        raise ConfigError(f"the folder {folder.parent} for the exported model does not exist: create it")
    if (folder / MANIFEST_FILE).exists():
        raise ConfigError(f"{folder} holds a signed release, which must not change: name another folder")


def _model(
    info: CheckpointInfo, arrays: Mapping[str, np.ndarray], imgsz: int | None
) -> tuple["nn.Module", TaskSpec]:
    """The torch model in evaluation mode, and its task with the size of the pictures that it shall take."""
    task = info.task
    weights_bytes = sum(array.nbytes for array in arrays.values())
    if weights_bytes > _MAX_PROTOBUF_BYTES - _GRAPH_ALLOWANCE_BYTES:
        raise ConfigError(
            f"the weights are {weights_bytes / 2**30:.2f} GiB, one ONNX file holds at most 2 GiB: "
            "choose a smaller model"
        )
    if task.channels not in PICTURE_MODES:
        raise ConfigError(
            f"the model takes {task.channels} channels, pictures have 1 or 3: it can be trained, but no device runs it"
        )
    if imgsz is not None and (task.height, task.width) != (imgsz, imgsz):
        task = msgspec.structs.replace(task, height=imgsz, width=imgsz)
    model = build(task, seed=0)
    if task is not info.task:
        _check_size(model, arrays, info.task, task)
    load_arrays(model, arrays)
    return model.eval(), task


def _check_size(
    model: "nn.Module", arrays: Mapping[str, np.ndarray], trained: TaskSpec, wanted: TaskSpec
) -> None:
    shapes = {name: array.shape for name, array in state_arrays(model).items()}
    for name, array in arrays.items():
        if shapes.get(name) != array.shape:
            raise ConfigError(
                f"--imgsz {wanted.height}: {trained.model!r} was trained with pictures of {trained.height}x{trained.width}, "
                f"and the shape of its {name!r} depends on that. Only fully convolutional models, such as torchvision's "
                "resnet and mobilenet, take other sizes"
            )


def _pictures(data: str | None, task: TaskSpec, measured: int) -> Pictures:
    """Real pictures, or synthetic ones where there are none."""
    if data is not None:
        pictures = read_pictures(data, task, train=False, limit=measured)
        if pictures.frames:
            return pictures
        frames = tuple(frame_of(pixels) for pixels in pictures.pixels[:_SYNTHETIC_PICTURES])
        return dataclasses.replace(pictures, frames=frames)
    recipe = Preprocessing.of(task)
    frames = synthetic_frames(task.channels, task.height, task.width, count=_SYNTHETIC_PICTURES)
    return Pictures(
        where="synthetic pictures",
        pixels=np.stack([recipe.pixels(Image.fromarray(frame)) for frame in frames]),
        labels=None,
        frames=frames,
        correlations=np.full(len(frames), np.nan),
    )


def _write(folder: Path, content: bytes, golden: Golden) -> None:
    try:
        folder.mkdir(exist_ok=True)
        # A power cut between the two must not leave a model with another one's answers.
        (folder / GOLDEN_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    write_whole(folder / MODEL_FILE, content)
    write_golden(folder / GOLDEN_FILE, golden)


def _report(
    folder: Path, chosen: Chosen, parity: Parity, info: CheckpointInfo, *, wanted: ModelFormat, frames: int
) -> ExportReport:
    model, golden = folder / MODEL_FILE, folder / GOLDEN_FILE
    requirements = chosen.card.requirements
    assert requirements is not None  # stated for every variant
    return ExportReport(
        folder=folder,
        model=model,
        golden=golden,
        size_bytes=model.stat().st_size,
        sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
        golden_sha256=hashlib.sha256(golden.read_bytes()).hexdigest(),
        golden_frames=frames,
        wanted=wanted,
        written=chosen.card.provenance.weights,
        reasons=chosen.reasons,
        gates=chosen.gates,
        metrics=_with_loss(chosen.metrics, chosen.card.provenance.metrics),
        requirements=requirements,
        preprocess=chosen.card.preprocess,
        info=info,
        card=chosen.card,
        parity=parity,
    )


def _with_loss(metrics: ReleaseMetrics | None, holdout: HoldOutMetrics | None) -> ReleaseMetrics | None:
    if metrics is None or holdout is None:
        return metrics
    return msgspec.structs.replace(metrics, loss=holdout.loss)


def _provenance(checkpoint: Path, info: CheckpointInfo) -> Provenance:
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Provenance(
        federation=info.federation,
        round=info.round,
        checkpoint_sha256=digest,
        model=info.task.model,
        fedge_version=federation.__version__,
        git_sha=_git_sha(),
        metrics=read_metrics(checkpoint),
        exported_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _git_sha() -> str | None:
    """The commit of this source, where it lies at the root of a checkout and git is there to ask."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        # No tag matches, so that the answer is always a hash.
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
