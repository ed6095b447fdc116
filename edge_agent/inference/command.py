"""``edge-agent infer``: labels for what this device sees. Heavy imports wait until the command runs."""

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from edge_agent.places import MODELS, default_state
from federation.errors import ConfigError, FedgeError, VerificationError
from federation.logs import LogFormat, configure

if TYPE_CHECKING:
    from edge_agent.config import AgentConfig, InferenceConfig
    from edge_agent.inference.feed import Feed
    from edge_agent.inference.loop import InferenceLoop
    from edge_agent.inference.sinks import Sink, Summary

CURRENT = "current"
"""Names the release that the aggregator rolls out, where a file could stand."""

MQTT = "mqtt"


def infer(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="The file that `aggregator enroll` wrote for this device; for --model current, --publish."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="0 (a camera's number), picamera, rtsp://..., http://..., a video, a picture, a folder (searched "
            "recursively), or - for paths on stdin."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="current for what the aggregator rolls out, or an ONNX file that `model-export onnx` wrote."
        ),
    ] = None,
    channel: Annotated[str | None, typer.Option(help="Of releases: stable or canary.")] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Frames a second to label at most; 0 is no limit. Default: 10 for cameras and streams, no limit for files.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="CPU threads for the model.")] = None,
    top: Annotated[
        int | None, typer.Option(min=1, max=4096, help="How many classes to show for each picture.")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="mqtt: send predictions to the broker.")] = None,
    save: Annotated[Path | None, typer.Option(help="Append predictions to this file, as JSON lines.")] = None,
    file: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with what the flags say, in [inference].")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder for what must survive, releases too; default BUNDLE's name beside it."),
    ] = None,
    max_rate: Annotated[
        str | None, typer.Option(help="Most bandwidth to use in each direction: 256kbit, 1.5mbit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Stop after so many pictures; 0 means no limit.")] = 0,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="console or json; auto looks at stderr.")
    ] = "auto",
) -> None:
    """Say what is in pictures, with confidence and latency, using onnxruntime on the CPU.

    Pictures that cannot be read are told on stderr and skipped; only if none can be read is that an error (2).
    A camera is read until SIGTERM or Ctrl-C, and opened again when it was lost.
    """
    from edge_agent.config import AgentConfig
    from federation.config import load

    given = {
        "source": source,
        "model": model,
        "channel": channel,
        "fps": fps,
        "threads": threads,
        "top": top,
        "publish": publish,
        "save": None if save is None else str(save),
    }
    settings = load(
        AgentConfig,
        file=file,
        flags={
            "state_dir": None if state is None else str(state),
            "max_rate": max_rate,
            **{f"inference.{name}": value for name, value in given.items()},
        },
    )
    chosen = settings.inference
    _check(chosen, bundle)

    from edge_agent.inference.sources import is_live, open_feed

    follows = bundle is not None and (chosen.model == CURRENT or chosen.publish == MQTT)
    if follows or is_live(chosen.source):
        _import_structlog()
        configure(level=log_level, form=log_format)

    from edge_agent.inference.loop import InferenceLoop
    from edge_agent.watchdog import Notifier

    feed = open_feed(chosen.source, fps=chosen.fps, file_fps=fps or 0)
    with ExitStack() as stack:
        notifier = Notifier.from_environment()
        stack.callback(notifier.close)
        outputs = _outputs(stack, feed, chosen, as_json=as_json)
        loop = InferenceLoop(
            feed, outputs, limit=limit, on_turn=lambda: notifier.alive(lambda: _doing(loop, feed))
        )
        _stop_at_signals(loop)
        if bundle is not None and follows:
            _follow(stack, settings, bundle, loop)
        if chosen.model != CURRENT:
            from federation.task.engine import Engine

            loop.install(Engine(Path(chosen.model), threads=chosen.threads, top=chosen.top))
        try:
            summary = loop.run()
        finally:
            notifier.stopping()
        if not summary.images and not loop.stopped:
            raise _nothing(chosen.source, summary, loop.last_failure)


def _check(settings: "InferenceConfig", bundle: Path | None) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: With what is missing.
    """
    if bundle is not None and bundle.suffix == ".onnx":
        raise ConfigError(
            f"{bundle} is a model: name it with --model {bundle}; BUNDLE is what `aggregator enroll` wrote"
        )
    if not settings.source:
        raise ConfigError(
            "nothing to look at: give --source, e.g. --source 0 for the first camera, or a folder of pictures"
        )
    if settings.model == CURRENT and bundle is None:
        raise ConfigError(
            "--model current is the release that the aggregator rolls out to this device: give the device's BUNDLE, "
            "or a file of your own with --model FILE"
        )
    if settings.publish == MQTT and bundle is None:
        raise ConfigError("--publish mqtt needs this device's account on the broker: give its BUNDLE")


def _import_structlog() -> None:
    """Import structlog without rich, which it would take where it is installed: 5 MB for tracebacks that no log shows."""
    if "rich" in sys.modules or "structlog" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        import structlog  # noqa: F401 - to have it imported now
    finally:
        del sys.modules["rich"]


def _outputs(stack: ExitStack, feed: "Feed", settings: "InferenceConfig", *, as_json: bool) -> "list[Sink]":
    """What prints, logs and saves; closed when the stack is."""
    from edge_agent.inference.sinks import Changes, JsonSink, LogSink, TextSink

    err = None if feed.live else sys.stderr
    # A camera's ten lines a second are for people who watch, not for a journal on an SD card.
    news = Changes(settings.publish_interval_s) if feed.live and not sys.stdout.isatty() else None
    sinks: list[Sink] = [JsonSink(sys.stdout, err) if as_json else TextSink(sys.stdout, err, news)]
    if feed.live:
        sinks.append(LogSink())
    if settings.save:
        from edge_agent.inference.saving import SaveSink

        sinks.append(SaveSink(Path(settings.save), forgiving=feed.live))
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


def _follow(stack: ExitStack, settings: "AgentConfig", bundle: Path, loop: "InferenceLoop") -> None:
    """Begin to follow releases, if they are wanted, and to send predictions, if they are; ended when the stack is."""
    from edge_agent.inference.sinks import Changes, MqttSink
    from edge_agent.releases.follower import Follower
    from edge_agent.releases.options import follower_options
    from federation.bundle import read_bundle

    chosen = settings.inference
    identity = read_bundle(bundle)  # first: a slip in its name must leave no folder behind
    slots = None
    if chosen.model == CURRENT:
        from edge_agent.releases.slots import Slots

        folder = Path(settings.state_dir) if settings.state_dir else default_state(bundle)
        slots = stack.enter_context(Slots(folder / MODELS))
    follower = Follower(
        identity,
        slots,
        follower_options(chosen, settings.max_rate),
        install=loop.install,
        health=loop.health,
    )
    stack.callback(follower.stop)
    follower.start()
    if chosen.publish == MQTT:
        loop.add_sink(MqttSink(follower.publish_prediction, Changes(chosen.publish_interval_s)))


def _doing(loop: "InferenceLoop", feed: "Feed") -> str:
    """What `systemctl status` shows, in plain words."""
    if loop.awaits_model:
        return "waiting for a first model"
    health = loop.health()
    if not health.frames:
        return "waiting for a first frame" if feed.live else "looking for pictures"
    dropped = f", {health.dropped} frames dropped for newer ones" if health.dropped else ""
    return f"labelling frames, {health.frames} with this model in {health.p50_ms:.1f} ms each{dropped}"


def _stop_at_signals(loop: "InferenceLoop") -> None:
    """End cleanly at the first SIGTERM or Ctrl-C, and at once at the second."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        loop.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _nothing(source: str, summary: "Summary", failure: Exception | None) -> FedgeError:
    """Why a run that ended by itself has classified nothing."""
    if isinstance(failure, FedgeError):
        return failure
    if failure is not None:
        return VerificationError(f"the model fails on every picture of --source {source}: {failure}")
    what = (
        f"none of its {summary.unreadable} pictures can be read"
        if summary.unreadable
        else "it has no pictures"
    )
    return ConfigError(f"nothing to classify in --source {source}: {what}")
