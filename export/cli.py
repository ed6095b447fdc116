"""``model-export``: from the aggregator's checkpoints to files that devices run."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from export.benchmark_command import benchmark
from export.convert import DEFAULT_TOPK, default_folder, export_model
from export.gates import DEFAULT_MAX_DROP
from export.parity import DEFAULT_TOLERANCE
from export.pictures import DEFAULT_MEASURED
from export.report import as_json as as_json_text
from export.report import describe
from export.requirements import NEWEST_OPSET
from export.tracing import DEFAULT_OPSET, OLDEST_OPSET
from export.verify import verify
from federation.cli import new_app, run
from federation.errors import ConfigError
from federation.task.checkpoint import find_checkpoint, read_info
from federation.task.model_card import Preprocess
from federation.wire.release import ModelFormat

app = new_app("Bring a federation's model to devices.")

app.command("benchmark")(benchmark)
app.command("verify")(verify)


@app.command()
def onnx(
    source: Annotated[Path, typer.Argument(help="A checkpoint file, or the aggregator's state folder.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder; default MODEL-round-N in the current one."),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="Of a state folder; the newest by default.")
    ] = None,
    wanted: Annotated[ModelFormat, typer.Option("--format", help="Of the weights.")] = ModelFormat.FP32,
    int8: Annotated[bool, typer.Option("--int8", help="The same as --format int8.")] = False,
    half: Annotated[bool, typer.Option("--half", help="The same as --format fp16.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Real pictures to calibrate and to measure with: a folder of pictures, a folder with one folder for each "
            "class, or a data set such as mnist:PATH."
        ),
    ] = None,
    imgsz: Annotated[
        int | None,
        typer.Option(min=4, max=4096, help="Side of the model's input, pixels; default as trained."),
    ] = None,
    preprocess: Annotated[
        Preprocess, typer.Option(help="fused: the model takes raw frames of any size. none: normalised ones.")
    ] = "fused",
    topk: Annotated[int, typer.Option(min=1, help="Classes that a fused model answers with.")] = DEFAULT_TOPK,
    max_drop: Annotated[
        float, typer.Option(min=0, max=100, help="Most points of accuracy that a smaller format may lose.")
    ] = DEFAULT_MAX_DROP,
    latency_gate: Annotated[
        bool, typer.Option("--latency-gate/--no-latency-gate", help="Refuse a format that is slower here.")
    ] = True,
    samples: Annotated[
        int, typer.Option(min=1, help="Most pictures of --data to measure with.")
    ] = DEFAULT_MEASURED,
    opset: Annotated[
        int, typer.Option(min=OLDEST_OPSET, max=NEWEST_OPSET, help="ONNX operator set.")
    ] = DEFAULT_OPSET,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference to torch, relative to the largest logit.")
    ] = DEFAULT_TOLERANCE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a folder with a model and the pictures that prove it, after checking that onnxruntime agrees with torch.

    When they disagree nothing is written and the exit code is 5. A smaller format that loses too much accuracy, or is
    slower, is not written: fp32 is, and the report says why.
    """
    asked = {ModelFormat.INT8: int8, ModelFormat.FP16: half}
    formats = {kind for kind, given in asked.items() if given} | ({wanted} - {ModelFormat.FP32})
    if len(formats) > 1:
        raise ConfigError(f"--format: {' and '.join(sorted(formats))} were asked for, a model has one")
    if source.is_dir():
        checkpoint = find_checkpoint(source, number)
    elif number is None:
        checkpoint = source
    else:
        raise ConfigError(f"--round chooses in a state folder, but {source} is not one: leave --round away")
    report = export_model(
        checkpoint,
        output or default_folder(read_info(checkpoint)),
        format=formats.pop() if formats else wanted,
        preprocess=preprocess,
        data=data,
        imgsz=imgsz,
        topk=topk,
        max_drop=max_drop,
        latency_gate=latency_gate,
        measured=samples,
        opset=opset,
        tolerance=tolerance,
    )
    typer.echo(as_json_text(report) if as_json else describe(report))


def main() -> NoReturn:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
