"""The releases that a trained model becomes: exported as the aggregator does it, in one format or another."""

from pathlib import Path

from benchmarks.trained import Trained
from export.convert import export_model
from export.report import ExportReport
from federation.wire.release import ModelFormat

ANY_DROP = 100.0
"""Percentage points: the gate on accuracy always passes."""

ALL_CLASSES = 4096
"""As many as a model may have: it answers with those that it has."""


def release(model: Trained, wanted: ModelFormat, folder: Path) -> ExportReport:
    """Export with the gates of a release: what fails them is written as fp32, and the report says why."""
    return export_model(model.checkpoint, folder / f"{model.name}-{wanted}", format=wanted, data=model.data)


def forced(model: Trained, wanted: ModelFormat, folder: Path) -> ExportReport:
    """Export in this format, however slow and inaccurate it is here, answering with all classes."""
    return export_model(
        model.checkpoint,
        folder / f"{model.name}-{wanted}",
        format=wanted,
        data=model.data,
        topk=ALL_CLASSES,
        max_drop=ANY_DROP,
        latency_gate=False,
    )
