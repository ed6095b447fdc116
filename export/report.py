"""What an export did, and why."""

import shlex
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from export.parity import Parity
from federation.task.checkpoint import CheckpointInfo
from federation.task.model_card import ModelCard, Preprocess
from federation.wire.release import ModelFormat, ReleaseMetrics, Requirements

_MAX_LABELS_SHOWN = 10


class Gate(Struct, frozen=True, kw_only=True):
    """What was measured of one variant of a model, beside its float32 one.

    Attributes:
        format: Of the variant.
        how: How it was made.
        size_bytes: Of its file.
        samples: Pictures.
        accuracy: Top-1 of the variant, in [0, 1]; None without labels.
        accuracy_fp32: The same of the float32 model.
        agreement: Share of the pictures for which both have the same most likely class.
        drop_points: Percentage points lost: of accuracy, or without labels the share of pictures with another class.
        latency_ms: Median for one picture of the model's size on one thread, on this machine; None if it was not measured.
        latency_fp32_ms: The same of the float32 model, measured in turn with it.
        refused: Why the variant was not taken; empty if it was.
    """

    format: ModelFormat
    how: str
    size_bytes: int
    samples: int
    accuracy: float | None
    accuracy_fp32: float | None
    agreement: float
    drop_points: float
    latency_ms: float | None = None
    latency_fp32_ms: float | None = None
    refused: str = ""


class ExportReport(Struct, frozen=True, kw_only=True):
    """What was exported.

    Attributes:
        folder: The release folder: ``model.onnx`` and ``golden.safetensors``.
        model: The ONNX file in it.
        golden: The golden set in it.
        size_bytes: Of the ONNX file.
        sha256: Hex SHA-256 of the ONNX file.
        golden_sha256: Hex SHA-256 of the golden set.
        golden_frames: Pictures in it.
        wanted: Format that was asked for.
        written: Format of the file.
        reasons: Why it is another than was asked for, or what should be known; empty if there is nothing to say.
        gates: What was measured of each variant that was tried, in order.
        metrics: Of the file; None without labelled pictures.
        requirements: What a device needs to run it.
        preprocess: Whether preprocessing is in the graph.
        info: What the checkpoint was.
        card: What was written into the file's metadata.
        parity: How far onnxruntime is from torch, both in float32.
    """

    folder: Path
    model: Path
    golden: Path
    size_bytes: int
    sha256: str
    golden_sha256: str
    golden_frames: int
    wanted: ModelFormat
    written: ModelFormat
    reasons: tuple[str, ...]
    gates: tuple[Gate, ...]
    metrics: ReleaseMetrics | None
    requirements: Requirements
    preprocess: Preprocess
    info: CheckpointInfo
    card: ModelCard
    parity: Parity


def describe(report: ExportReport) -> str:
    """The report for people: a line for each thing, and one for each variant that was tried."""
    parity, task, card = report.parity, report.info.task, report.card
    recipe, requirements = card.preprocessing, report.requirements
    holdout = card.provenance.metrics
    shown = ", ".join(task.labels[:_MAX_LABELS_SHOWN])
    more = len(task.labels) - _MAX_LABELS_SHOWN
    compared = f"{parity.random_inputs} random inputs"
    if parity.images:
        compared += f", {parity.images} images"
    if card.preprocess == "fused":
        takes = f"frames of any size, resized to {recipe.height} x {recipe.width} x {recipe.channels} in the graph"
        gives = f"; gives the {card.topk} most likely classes"
    else:
        takes, gives = (
            f"N x {recipe.channels} x {recipe.height} x {recipe.width}, normalised",
            "; gives logits",
        )
    rows = {
        "file": f"{report.model} ({report.size_bytes / 1e6:.2f} MB, {report.written.value})",
        "model": f"{task.model}, round {report.info.round} of {report.info.federation}",
        "input": takes + gives,
        "needs": f"onnxruntime {requirements.min_runtime} or later (opset {requirements.opset}, IR {requirements.ir_version})",
        "labels": f"{shown}, and {more} more" if more > 0 else shown,
        "parity": f"within {parity.relative_error:.1e} of torch (limit {parity.tolerance:.1e}; {compared}), "
        "no class changed",
        "hold-out": "not measured"
        if holdout is None
        else f"{holdout.accuracy:.2%} of {holdout.samples} images, loss {holdout.loss:.4f}",
        "golden": f"{report.golden_frames} pictures with this model's answers, in {report.golden.name}",
    }
    lines = list(rows.items())
    if report.metrics is not None:
        metrics = report.metrics
        lines.append(("top-1", f"{metrics.accuracy:.2%} of {metrics.samples} pictures, by this very file"))
    lines += [("tried", _describe_gate(gate)) for gate in report.gates]
    lines += [("note", reason) for reason in report.reasons]
    lines.append(("next", f"edge-agent infer --model {shlex.quote(str(report.model))} --source FOLDER"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def as_json(report: ExportReport) -> str:
    """The report for programs: its fields, with the checkpoint's and the card's in full."""
    return msgspec.json.encode(report, enc_hook=_plain).decode()


def _describe_gate(gate: Gate) -> str:
    parts = [f"{gate.format.value}, {gate.how}: {gate.size_bytes / 1e6:.2f} MB"]
    if gate.accuracy is not None and gate.accuracy_fp32 is not None:
        parts.append(f"top-1 {gate.accuracy:.2%} (fp32 {gate.accuracy_fp32:.2%}, {gate.samples} pictures)")
    else:
        parts.append(f"same class as fp32 for {gate.agreement:.2%} of {gate.samples} pictures without labels")
    if gate.latency_ms is not None and gate.latency_fp32_ms is not None:
        parts.append(f"{gate.latency_ms:.3f} ms (fp32 {gate.latency_fp32_ms:.3f} ms) on one thread here")
    parts.append("refused" if gate.refused else "taken")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"no JSON for {type(value).__name__}")
