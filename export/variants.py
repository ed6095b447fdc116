"""The variants of a model, from float32 to the format that was asked for, and the choice among them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from export.fused import fuse
from export.gates import Reference, judge
from export.parity import check_fused
from export.pictures import CALIBRATION_PICTURES, Pictures, read_pictures, refuse_unreal
from export.quantize import delicate_layers, to_half, to_int8
from export.report import Gate
from export.requirements import requirements_of
from federation.errors import ConfigError
from federation.task.engine import Engine
from federation.task.model_card import ModelCard
from federation.wire.messages import TaskSpec
from federation.wire.release import ModelFormat, ReleaseMetrics

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be made of a graph.

    Attributes:
        format: Wanted.
        task: Of the model.
        card: For the file; number format and requirements are filled in.
        data: Where real pictures come from; None if there are none.
        pictures: To measure on.
        max_drop: Most percentage points of accuracy that a smaller format may lose.
        latency_gate: Whether it must not be slower than float32.
        tolerance: Of a fused graph's probabilities.
    """

    format: ModelFormat
    task: TaskSpec
    card: ModelCard
    data: str | None
    pictures: Pictures
    max_drop: float
    latency_gate: bool
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The variant that is released.

    Attributes:
        path: Its file.
        card: Its metadata.
        gates: What was measured of each variant that was tried.
        reasons: Why it is another than was asked for.
        metrics: Of the file; None without labelled pictures.
    """

    path: Path
    card: ModelCard
    gates: tuple[Gate, ...]
    reasons: tuple[str, ...]
    metrics: ReleaseMetrics | None


def choose(core: "onnx.ModelProto", request: Request, scratch: Path) -> Chosen:
    """Make the float32 model, and the wanted variant if it passes the gates.

    Args:
        core: From :func:`export.tracing.trace`, already found to agree with torch.
        request: What is wanted.
        scratch: An empty folder for files.

    Raises:
        ConfigError: If int8 is wanted and the pictures are none, or are too few.
        VerificationError: If the float32 model does not agree with itself once preprocessing is part of it.
    """
    path = scratch / "fp32.onnx"
    card = _pack(core, request, ModelFormat.FP32, path)
    engine = Engine(path)
    if request.card.preprocess == "fused":
        check_fused(engine, core.SerializeToString(), request.pictures.pixels, tolerance=request.tolerance)
    wanted = request.format
    if request.data is None and wanted is ModelFormat.FP32:
        return Chosen(path=path, card=card, gates=(), reasons=(), metrics=None)
    reference = Reference.of(engine, request.pictures)
    gates: list[Gate] = []
    for number, (how, make) in enumerate(_attempts(core, request)):
        attempt = scratch / f"{wanted.value}-{number}.onnx"
        try:
            attempt_card = _pack(make(), request, wanted, attempt)
        except ConfigError as error:
            return _fallen_back(path, card, gates, reference, f"{wanted.value} ({how}): {error}")
        gate = judge(
            Engine(attempt),
            reference,
            format=wanted,
            how=how,
            size_bytes=attempt.stat().st_size,
            max_drop=request.max_drop,
            latency_gate=request.latency_gate,
        )
        gates.append(gate)
        if not gate.refused:
            earlier = tuple(
                f"{wanted.value} ({one.how}) was refused by the {one.refused}" for one in gates[:-1]
            )
            metrics = _metrics(reference, gate.accuracy, gate.drop_points)
            return Chosen(
                path=attempt, card=attempt_card, gates=tuple(gates), reasons=earlier, metrics=metrics
            )
    return _fallen_back(path, card, gates, reference, "")


def _attempts(
    core: "onnx.ModelProto", request: Request
) -> Iterator[tuple[str, Callable[[], "onnx.ModelProto"]]]:
    """Ways to make the wanted format, the best first."""
    if request.format is ModelFormat.FP16:
        yield "weights in 16 bits, arithmetic in 32", lambda: to_half(core)
    elif request.format is ModelFormat.INT8:
        assert request.data is not None  # export_model has refused
        pictures = read_pictures(request.data, request.task, train=True, limit=CALIBRATION_PICTURES)
        refuse_unreal(pictures)
        recipe, pixels = request.card.preprocessing, pictures.pixels
        yield "all convolutions and matrix products", lambda: to_int8(core, recipe, pixels)
        delicate = delicate_layers(core)
        yield (
            "first, last, depthwise and gate layers in float32",
            lambda: to_int8(core, recipe, pixels, in_float=delicate),
        )


def _pack(core: "onnx.ModelProto", request: Request, written: ModelFormat, path: Path) -> ModelCard:
    """Write a variant with its metadata to a file."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(core)
    if request.card.topk is not None:
        model = fuse(core, request.card.preprocessing, topk=request.card.topk)
    _drop_unused_domains(model)
    card = replace(
        request.card,
        provenance=replace(request.card.provenance, weights=written),
        requirements=requirements_of(model, request.card.format),
    )
    for key, value in card.properties().items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return card


def _drop_unused_domains(model: "onnx.ModelProto") -> None:
    """The quantizer lists every domain that it knows, and a runtime may refuse one that it does not."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if not entry.domain or entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _fallen_back(path: Path, card: ModelCard, gates: list[Gate], reference: Reference, failed: str) -> Chosen:
    reasons = [f"{gate.format.value} ({gate.how}) was refused by the {gate.refused}" for gate in gates]
    if failed:
        reasons.append(failed)
    if reasons:
        reasons.append("so fp32 was written")
    metrics = _metrics(reference, reference.accuracy, 0.0)
    return Chosen(path=path, card=card, gates=tuple(gates), reasons=tuple(reasons), metrics=metrics)


def _metrics(reference: Reference, accuracy: float | None, drop_points: float) -> ReleaseMetrics | None:
    if accuracy is None:
        return None
    return ReleaseMetrics(accuracy=accuracy, samples=len(reference.pictures), drop_points=drop_points)
