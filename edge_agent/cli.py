"""``edge-agent``: train on this device, run the model on it, find out what is wrong with it."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from edge_agent.inference.command import infer
from edge_agent.places import default_state
from edge_agent.releases.models_command import models
from edge_agent.service_command import install_service
from federation import __version__
from federation.cli import new_app, run
from federation.errors import BudgetExhaustedError, ConfigError
from federation.logs import LogFormat, configure

if TYPE_CHECKING:
    from edge_agent.config import AgentConfig
    from edge_agent.terms import Requirement

app = new_app("Take part in a federation from a device: train where the data is, run the model there.")
app.command("infer")(infer)
app.command("install-service")(install_service)
app.command("models")(models)

BundleArgument = Annotated[
    Path, typer.Argument(help="The file that `aggregator enroll` wrote for this device.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="imagefolder:PATH, mnist:PATH, cifar10:PATH, digits, or package.module:factory."
    ),
]
MaxEpsilonOption = Annotated[
    float | None,
    typer.Option(
        "--max-epsilon", min=0, help="Most epsilon that training may ever spend on this device's images."
    ),
]
OTHER_LABEL = "(other)"
"""Stands for what the rest of the fleet has, where this device has images of one class only."""

OneClassOption = Annotated[
    bool | None,
    typer.Option("--allow-single-class", help="Accept data of one class only; it trains a poor model."),
]


@app.command("run")
def run_agent(
    bundle: BundleArgument,
    data: DataOption = None,
    file: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="TOML file with what the flags say, and [privacy]."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder for what must survive; default BUNDLE's name beside it."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=0, help="CPU threads for training; 0 is all.")
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(
            "--max-memory", min=16, help="MiB that decoded images may take; larger sets stay on disk."
        ),
    ] = None,
    allow_single_class: OneClassOption = None,
    allow_model: Annotated[
        list[str] | None,
        typer.Option("--allow-model", help="A plug-in model, package.module:factory, that a plan may name."),
    ] = None,
    telemetry_s: Annotated[
        float | None, typer.Option("--telemetry", min=0, help="Seconds between health reports; 0 is none.")
    ] = None,
    max_rate: Annotated[
        str | None,
        typer.Option(
            "--max-rate",
            help="Most bandwidth to use in each direction, in bits a second: 256kbit, 1.5mbit; default no cap.",
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option("--require", help='A term that a plan must state, e.g. "sample-dp eps<=8" or "secagg".'),
    ] = None,
    max_epsilon: MaxEpsilonOption = None,
    roster: Annotated[
        Path | None,
        typer.Option("--roster", help="Keys of the federation's devices, for secure aggregation."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="What to label meanwhile, with the current release: as for `infer`. More of it in [inference].",
        ),
    ] = None,
    publish: Annotated[
        str | None, typer.Option("--publish", help="mqtt: send predictions to the broker.")
    ] = None,
    give_up_after_s: Annotated[
        float | None,
        typer.Option(
            "--give-up-after",
            min=0,
            help="Seconds after which a broker that was never reached is an error; 0 is never.",
        ),
    ] = None,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="console or json; auto looks at stderr.")
    ] = "auto",
) -> None:
    """Take part until SIGTERM. Power, link and server may fail at any time: nothing is lost."""
    from edge_agent.config import AgentConfig
    from edge_agent.inference_child import inference_beside
    from edge_agent.terms import parse_requirement
    from federation.config import load
    from federation.wire.rate import parse_rate

    configure(level=log_level, form=log_format)
    # All slips in settings are told before PyTorch has taken its seconds.
    settings = load(
        AgentConfig,
        file=file,
        flags={
            "data": data,
            "state_dir": None if state is None else str(state),
            "device": device,
            "threads": threads,
            "max_memory_mb": max_memory,
            "allow_single_class": allow_single_class,
            "allow_model": allow_model,
            "telemetry_s": telemetry_s,
            "max_rate": max_rate,
            "give_up_after_s": give_up_after_s,
            "privacy.require": require,
            "privacy.max_epsilon": max_epsilon,
            "privacy.roster": None if roster is None else str(roster),
            "inference.source": source,
            "inference.publish": publish,
        },
    )
    if not settings.data:
        raise ConfigError(
            "no images to train on: give --data, e.g. --data imagefolder:/data/photos, or data in --config"
        )
    cap = parse_rate(settings.max_rate) if settings.max_rate else None
    required = tuple(parse_requirement(text) for text in settings.privacy.require)
    beside = inference_beside(
        bundle,
        settings.inference.source,
        {
            "--config": file,
            "--state": state,
            "--source": source,
            "--publish": publish,
            "--max-rate": max_rate,
            "--log-level": log_level,
            "--log-format": log_format,
        },
    )
    with beside:
        _take_part(bundle, settings, cap, required)


def _take_part(
    bundle: Path, settings: "AgentConfig", cap: float | None, required: "tuple[Requirement, ...]"
) -> None:
    from edge_agent.agent import Agent, Options
    from edge_agent.telemetry import capabilities
    from edge_agent.training import TorchTrainer
    from edge_agent.watchdog import Notifier
    from federation.bundle import read_bundle
    from federation.task.data import task_from_data

    identity = read_bundle(bundle)
    trainer = TorchTrainer(
        settings.data,
        device=settings.device,
        threads=settings.threads,
        memory_limit_mb=settings.max_memory_mb,
        allow_single_class=settings.allow_single_class,
    )
    # Opening the data now, with the labels that it has itself, shows what is wrong with it before the first round.
    samples = trainer.samples(task_from_data(settings.data, "cnn", stand_in=OTHER_LABEL))
    if required:  # such a device does not tell how many images it has: a power of two, at most that many
        samples = 1 << (samples.bit_length() - 1)
    able = capabilities(device=trainer.device_name, threads=trainer.threads, samples=samples)
    options = Options(
        state_dir=Path(settings.state_dir) if settings.state_dir else default_state(bundle),
        telemetry_s=settings.telemetry_s,
        give_up_after_s=settings.give_up_after_s,
        plugins=frozenset(settings.allow_model),
        max_rate=cap,
        required=required,
        limits=settings.privacy,
        data=settings.data,
    )
    agent = Agent(identity, able, trainer, options, notifier=Notifier.from_environment())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()


@app.command()
def doctor(
    bundle: BundleArgument,
    data: Annotated[
        str | None, typer.Option("--data", help="As for `run`; without it no data is looked at.")
    ] = None,
    state: Annotated[Path | None, typer.Option("--state", help="As for `run`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this device, its broker, the aggregator and its data, and say what to fix.

    Exits with 0 if nothing failed, else with 2 (this device, its files, its data) or 3 (the broker), whichever
    failed first. An agent that runs with the same bundle is not disturbed.
    """
    import msgspec

    from edge_agent.doctor import examine
    from edge_agent.findings import render, report

    configure(level="error")  # what the link would log is among the findings
    findings = []
    for finding in examine(bundle, data, state or default_state(bundle)):
        findings.append(finding)
        if not as_json:
            typer.echo(render(finding))
    result = report(findings)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
    raise typer.Exit(result.exit_code)


@app.command()
def budget(
    bundle: BundleArgument,
    state: Annotated[Path | None, typer.Option("--state", help="As for `run`.")] = None,
    file: Annotated[Path | None, typer.Option("--config", "-c", help="As for `run`.")] = None,
    max_epsilon: MaxEpsilonOption = None,
    newest: Annotated[int, typer.Option("--rounds", min=0, help="Newest rounds to list; 0 is all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what this device has spent of its privacy budget, what is left, and what one more round would cost.

    Give the settings with which the agent runs. Exits with 4 if the budget is exhausted, and with 5 if the ledger
    cannot be trusted. An agent that runs with the same bundle is not disturbed.
    """
    import msgspec

    from edge_agent.budget import collect, exhausted_text, render
    from edge_agent.config import AgentConfig
    from federation.config import load

    configure(level="error")
    settings = load(AgentConfig, file=file, flags={"privacy.max_epsilon": max_epsilon})
    folder = state or (Path(settings.state_dir) if settings.state_dir else default_state(bundle))
    report = collect(bundle, folder, settings.privacy, newest)
    typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2) if as_json else render(report))
    if report.exhausted:
        raise BudgetExhaustedError(exhausted_text(report))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Answer ``--version``."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
