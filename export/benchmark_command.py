"""``model-export benchmark``: what exported models are worth on this machine."""

import re
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from export.benchmark import DEFAULT_LIMIT, DEFAULT_SECONDS, table
from export.benchmark import benchmark as measure
from federation.errors import ConfigError

_FRAME = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")


def benchmark(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="ONNX files or release folders; a checkpoint, or an aggregator's state folder, is run by torch.",
        ),
    ],
    *,
    data: Annotated[
        str | None,
        typer.Option(help="Measure top-1 on the test split: imagefolder:PATH, mnist:PATH, digits ..."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="At most so many test images; 0 takes all.")
    ] = DEFAULT_LIMIT,
    threads: Annotated[int, typer.Option(min=1, max=256, help="CPU threads for each model.")] = 1,
    frame: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the raw frames; 640x480 by default, and a grey model's own size.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=3600, help="How long to measure each model.")
    ] = DEFAULT_SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Compare models on this machine: size, top-1, latency from a raw frame to a label, memory.

    Each model runs in a process of its own; they are measured in turn. Needs neither torch nor onnx for exported models,
    so it runs on a device too.
    """
    size = None
    if frame is not None:
        match = _FRAME.fullmatch(frame)
        if match is None:
            raise ConfigError(f"--frame {frame} is not a size: write WIDTHxHEIGHT, e.g. --frame 640x480")
        size = (int(match[2]), int(match[1]))
    rows = measure(models, data=data, limit=limit, threads=threads, frame=size, seconds=seconds)
    typer.echo(msgspec.json.encode(rows).decode() if as_json else table(rows))
