"""``edge-agent infer``: labels for pictures, on this device. Heavy imports wait until the command runs."""

import sys
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federation.errors import ConfigError

if TYPE_CHECKING:
    from edge_agent.inference.sinks import Sink, Summary
    from federation.task.engine import Engine


CURRENT = "current"
"""Names the release that the aggregator rolls out, where a file could stand."""


def infer(
    source: Annotated[
        str | None, typer.Option(help="A picture, a folder (searched recursively), or - for paths on stdin.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="An ONNX file that `model-export onnx` wrote.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=256, help="CPU threads for the model.")
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, max=4096, help="How many classes to show for each picture.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with what the flags say, in [inference].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Stop after so many pictures; 0 means no limit.")] = 0,
) -> None:
    """Say what is in pictures, with confidence and latency, using onnxruntime on the CPU.

    Pictures that cannot be read are told on stderr and skipped; only if none can be read is that an error (2).
    """
    from edge_agent.config import AgentConfig
    from federation.config import load

    flags = {"source": source, "model": model, "threads": threads, "top": top}
    settings = load(
        AgentConfig, file=file, flags={f"inference.{name}": value for name, value in flags.items()}
    ).inference
    if not settings.source:
        raise ConfigError("nothing to look at: give --source, e.g. --source /home/pi/pictures")
    if settings.model == CURRENT:
        raise ConfigError("no model: give --model FILE, which `model-export onnx` writes")

    from edge_agent.inference.sinks import JsonSink, TextSink
    from federation.task.engine import Engine

    sink = (JsonSink if as_json else TextSink)(sys.stdout, sys.stderr)
    engine = Engine(Path(settings.model), threads=settings.threads, top=settings.top)
    summary = classify(engine, settings.source, sink, limit=limit)
    if not summary.images:
        what = (
            f"none of its {summary.unreadable} pictures can be read"
            if summary.unreadable
            else "it has no pictures"
        )
        raise ConfigError(f"nothing to classify in --source {settings.source}: {what}")


def classify(engine: "Engine", source: str, sink: "Sink", *, limit: int = 0) -> "Summary":
    """Run a model over a source and hand everything to a sink, the summary last.

    Args:
        engine: The model.
        source: As :func:`edge_agent.inference.sources.frames` takes it.
        sink: Takes predictions and problems as they come.
        limit: Pictures, readable or not, after which to stop; 0 means no limit.

    Raises:
        ConfigError: If the source does not exist.
    """
    from edge_agent.inference.sinks import summarise
    from edge_agent.inference.sources import Unreadable, frames

    latencies_ms = array("d")
    unreadable = 0
    started = time.perf_counter()
    for number, frame in enumerate(frames(source, sys.stdin), start=1):
        if isinstance(frame, Unreadable):
            unreadable += 1
            sink.unreadable(frame)
        else:
            prediction = engine.predict(frame.image)
            latencies_ms.append(prediction.latency_ms)
            sink.prediction(frame.name, prediction)
        if number == limit:
            break
    summary = summarise(latencies_ms, unreadable=unreadable, elapsed_s=time.perf_counter() - started)
    sink.summary(summary)
    return summary
