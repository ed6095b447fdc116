"""The options of `privacy plan`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from federation.errors import ConfigError
from federation.files import write_whole
from federation.logs import configure
from federation.wire.messages import TrainSpec
from privacy.commands.question import DELTA, Layer, Question

_DEFAULT = TrainSpec()


def plan_command(
    *,
    epsilon: Annotated[float, typer.Option(help="Target of the whole run; 1 to 3 is strong, 8 moderate.")],
    layer: Annotated[
        str, typer.Option(help="sample (DP-SGD on devices), client (noise by the aggregator), distributed (noise by the devices).")
    ] = "sample",
    rounds: Annotated[int, typer.Option(help="Of the run.")] = 10,
    epochs: Annotated[int, typer.Option(help="Local epochs a round.")] = _DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="Local batch size.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option("--lr", help="Local learning rate.")] = _DEFAULT.learning_rate,
    samples: Annotated[int, typer.Option(help="Training samples of the smallest device.")] = 0,
    cohort: Annotated[int, typer.Option(help="Devices in a round.")] = 5,
    devices: Annotated[int, typer.Option(help="In the federation, if the cohort is drawn from more (client).")] = 0,
    delta: Annotated[float, typer.Option(help="Well below 1 / samples, or 1 / devices.")] = DELTA,
    clip_norm: Annotated[float, typer.Option(help="Of a sample's gradient, or an update; 0 takes 1.")] = 0.0,
    model: Annotated[str, typer.Option(help="cnn, a torchvision model, or package.module:factory.")] = "cnn",
    data: Annotated[str, typer.Option(help="Data at hand for a trial: mnist:PATH, digits, imagefolder:PATH, ...")] = "",
    secagg: Annotated[bool, typer.Option(help="Mask the updates, so that only their sum is seen.")] = False,
    modulus_bits: Annotated[int, typer.Option(help="Of secure aggregation; 0: 16, or 8 with distributed noise.")] = 0,
    dropouts: Annotated[float, typer.Option(help="Share of the cohort that may vanish.")] = 1 / 3,
    trial_s: Annotated[float, typer.Option("--trial", min=0, help="Seconds for the trial; 0 makes none.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the settings to this TOML file too.")] = None,
) -> None:  # fmt: skip
    """Say what a deployment's privacy takes before it starts: noise, epsilon, accuracy, bytes, and the settings."""
    from privacy.commands.plan import make_plan
    from privacy.commands.plan_text import text

    configure(level="warning")
    asked: dict[str, Any] = {
        "layer": layer,
        "epsilon": epsilon,
        "delta": delta,
        "rounds": rounds,
        "train": {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate},
        "samples": samples,
        "cohort": cohort,
        "devices": devices,
        "clip_norm": clip_norm,
        "model": model,
        "data": data,
        "secagg": secagg,
        "modulus_bits": modulus_bits or _modulus(layer),
        "dropouts": dropouts,
    }
    plan = make_plan(_question(asked), trial_s=trial_s)
    if output is not None:
        if output.exists():
            raise ConfigError(f"{output} exists: name another file, or remove it")
        write_whole(output, plan.toml.encode())
    typer.echo(msgspec.json.format(msgspec.json.encode(plan)).decode() if as_json else text(plan))


def _modulus(layer: str) -> Literal[8, 16]:
    """Distributed noise needs no finer steps than a byte has."""
    return 8 if layer == "distributed" else 16


def _question(asked: dict[str, Any]) -> Question:
    if not asked["epsilon"] > 0:
        raise ConfigError(
            f"--epsilon {asked['epsilon']:g} would let nothing be learned, for no amount of noise is enough: choose one above 0; "
            "1 to 3 is strong, 8 moderate"
        )
    try:
        return msgspec.convert(asked, Question)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").rpartition(".")[2]
        option = {"learning_rate": "lr"}.get(name, name).replace("_", "-")
        value = asked.get(name, asked["train"].get(name))
        remedy = f"; known are {', '.join(Layer.__args__)}" if name == "layer" else ""  # type: ignore[attr-defined]
        raise ConfigError(
            f"--{option} {value} cannot be: {message[0].lower()}{message[1:]}{remedy}"
        ) from error
