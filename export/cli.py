"""``model-export``: from the aggregator's checkpoints to files that devices run."""

import shlex
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from export.convert import DEFAULT_OPSET, OLDEST_OPSET, ExportReport, default_output, export_onnx
from export.parity import DEFAULT_TOLERANCE
from federation.cli import new_app, run
from federation.errors import ConfigError
from federation.task.checkpoint import find_checkpoint, read_info

app = new_app("Bring a federation's model to devices.")

_MAX_LABELS_SHOWN = 10


@app.callback()
def _commands() -> None:
    """Keep ``onnx`` a subcommand while it is the only one."""


@app.command()
def onnx(
    source: Annotated[Path, typer.Argument(help="A checkpoint file, or the aggregator's state folder.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: MODEL-round-N.onnx in the current folder."),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="Of a state folder; the newest by default.")
    ] = None,
    opset: Annotated[int, typer.Option(min=OLDEST_OPSET, help="ONNX operator set.")] = DEFAULT_OPSET,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference to torch, relative to the largest logit.")
    ] = DEFAULT_TOLERANCE,
    images: Annotated[
        Path | None, typer.Option(help="Real pictures for the parity check, besides random ones.")
    ] = None,
) -> None:
    """Write one self-contained ONNX file, after checking that onnxruntime agrees with torch.

    When they disagree no file is written and the exit code is 5.
    """
    if source.is_dir():
        checkpoint = find_checkpoint(source, number)
    elif number is None:
        checkpoint = source
    else:
        raise ConfigError(f"--round chooses in a state folder, but {source} is not one: leave --round away")
    target = output or default_output(read_info(checkpoint))
    if target.is_dir():
        target /= default_output(read_info(checkpoint))
    typer.echo(_describe(export_onnx(checkpoint, target, opset=opset, tolerance=tolerance, images=images)))


def main() -> NoReturn:
    """Entry point of the console script."""
    run(app)


def _describe(report: ExportReport) -> str:
    parity, task, metrics = report.parity, report.info.task, report.card.provenance.metrics
    shown = ", ".join(task.labels[:_MAX_LABELS_SHOWN])
    more = len(task.labels) - _MAX_LABELS_SHOWN
    compared = f"{parity.random_inputs} random inputs"
    if parity.images:
        compared += f", {parity.images} images"
    rows = {
        "file": f"{report.path} ({report.size_bytes / 1e6:.2f} MB)",
        "model": f"{task.model}, round {report.info.round} of {report.info.federation}",
        "input": f"N x {task.channels} x {task.height} x {task.width}, opset {report.opset}",
        "labels": f"{shown}, and {more} more" if more > 0 else shown,
        "parity": f"within {parity.relative_error:.1e} of torch (limit {parity.tolerance:.1e}; {compared}), "
        "no class changed",
        "hold-out": "not measured"
        if metrics is None
        else f"{metrics.accuracy:.2%} of {metrics.samples} images, loss {metrics.loss:.4f}",
        "next": f"edge-agent infer --model {shlex.quote(str(report.path))} --source FOLDER",
    }
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    main()
