"""The files that a trained model becomes: exported as a release is, in one format or another."""

from pathlib import Path

from benchmarks.trained import Trained
from export.convert import export_onnx


def export(model: Trained, wanted: str, folder: Path) -> Path:
    """Export a model; returns the ONNX file."""
    path = folder / f"{model.name}-{wanted}.onnx"
    export_onnx(model.checkpoint, path)
    return path
