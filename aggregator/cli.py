"""``aggregator``: serve a federation, enrol devices, look at what happened."""

import shlex
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from aggregator.config import AggregatorConfig
from aggregator.options import (
    ConfigOption,
    FederationOption,
    SetOption,
    StateOption,
    last_served,
    parse_settings,
    read_settings,
    served_config,
    without_secrets,
)
from aggregator.releases.commands import release, release_key, releases, rollback
from federation import __version__
from federation.bundle import write_bundle
from federation.cli import new_app, run
from federation.config import to_toml
from federation.errors import ConfigError
from federation.files import write_whole
from federation.logs import LogFormat, configure

app = new_app("Serve a federation: rounds over MQTT, averaging, checkpoints, releases.")

app.command()(release)
app.command()(rollback)
app.command()(releases)
app.command("release-key")(release_key)

BrokerOption = Annotated[
    str | None, typer.Option("--broker", help="`embedded`, mqtt://HOST or mqtts://HOST (broker.url).")
]
ListenOption = Annotated[
    str | None, typer.Option("--listen", help="Where the embedded broker listens, ADDRESS:PORT.")
]
LevelOption = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
FormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="console or json; auto looks at stderr.")
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("fedge.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write a commented configuration file."""
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; use --force to overwrite it, or name another file")
    write_whole(path, to_toml(AggregatorConfig()).encode())
    typer.echo(f"wrote {path}; next: edit [task], then `aggregator serve --config {path}`")


@app.command()
def config(file: ConfigOption = None, settings: SetOption = None) -> None:
    """Print the settings in effect, as TOML. Secrets are not shown."""
    effective = read_settings(file, parse_settings(settings))
    typer.echo(to_toml(without_secrets(effective)), nl=False)


@app.command()
def serve(
    file: ConfigOption = None,
    federation: FederationOption = None,
    state: StateOption = None,
    broker: BrokerOption = None,
    listen: ListenOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="cnn, a torchvision model, or package.module:factory.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="What the agents hold: mnist, cifar10, digits, or a data set."),
    ] = None,
    holdout: Annotated[
        str | None, typer.Option("--holdout", help="Evaluate each round on this data set, e.g. mnist:PATH.")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds in this run (rounds.count).")] = None,
    min_agents: Annotated[
        int | None, typer.Option("--min-agents", help="Agents that must be online.")
    ] = None,
    cohort_size: Annotated[
        int | None, typer.Option("--cohort-size", help="Agents per round; 0 is all.")
    ] = None,
    deadline_s: Annotated[
        float | None, typer.Option("--deadline", help="Seconds after which a round closes.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Local epochs per round.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Local batch size.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Local learning rate.")] = None,
    up_encoding: Annotated[
        str | None, typer.Option("--up-encoding", help="Of updates: sq:16, float32, ... (docs/protocol.md).")
    ] = None,
    down_encoding: Annotated[
        str | None, typer.Option("--down-encoding", help="Of the model's change: sq:4, ..., or full.")
    ] = None,
    stay: Annotated[
        bool | None,
        typer.Option("--stay/--no-stay", help="Go on serving releases after the last round (release.stay)."),
    ] = None,
    settings: SetOption = None,
    log_level: LevelOption = "info",
    log_format: FormatOption = "auto",
) -> None:
    """Serve until the run is finished, and with --stay its releases beyond that. Stop it at any moment: started again, it goes on with the same round."""
    from aggregator.releases.automatic import AutomaticRelease
    from aggregator.service import Service
    from aggregator.startup import prepared

    configure(level=log_level, form=log_format)
    flags = {
        "federation": federation,
        "state_dir": state,
        "up_encoding": up_encoding,
        "down_encoding": down_encoding,
        "release.stay": stay,
        "broker.url": broker,
        "broker.listen": listen,
        "task.model": model,
        "task.data": data,
        "task.holdout": holdout,
        "rounds.count": rounds,
        "rounds.min_agents": min_agents,
        "rounds.cohort_size": cohort_size,
        "rounds.deadline_s": deadline_s,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
        **parse_settings(settings),
    }
    effective = read_settings(file, flags)
    with prepared(effective) as ready:
        write_whole(served_config(effective.state_dir), to_toml(without_secrets(effective)).encode())
        automatic = AutomaticRelease(effective) if effective.release.auto else None
        service = Service(
            effective, ready.store, ready.enrolment, ready.task, ready.address, make_release=automatic
        )

        def stop(*_: object) -> None:
            service.stop()
            if automatic is not None:
                automatic.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        finished = service.run()
    if finished and automatic is None:
        typer.echo(f"next: aggregator release --state {shlex.quote(effective.state_dir)}")


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(help="The device: a-z, 0-9, _ and -.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle to write; default NAME.bundle.json.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="New keys for a name that is enrolled; its old bundle dies.")
    ] = False,
    file: ConfigOption = None,
    federation: FederationOption = None,
    state: StateOption = None,
    broker: BrokerOption = None,
    listen: ListenOption = None,
    advertise: Annotated[
        str | None, typer.Option("--advertise", help="Broker URL as the device sees it.")
    ] = None,
    settings: SetOption = None,
) -> None:
    """Give a device its identity and broker account: one file that it needs, to be kept secret."""
    from aggregator.broker import reload_running
    from aggregator.enrolment import Enrolment, check_agent_name
    from aggregator.startup import EMBEDDED, advertised_url, ca_pem

    flags = {
        "federation": federation,
        "state_dir": state,
        "broker.url": broker,
        "broker.listen": listen,
        "broker.advertise": advertise,
        **parse_settings(settings),
    }
    effective = read_settings(file or last_served(state), flags)
    target = output or Path(f"{name}.bundle.json")
    if target.exists() and not replace:
        raise ConfigError(f"{target} exists; use --replace, or -o for another file")
    check_agent_name(name)
    folder = Path(effective.state_dir)
    if not folder.exists():
        typer.echo(
            f"making {folder}: the identity of a new aggregator for federation {effective.federation!r}"
        )
    enrolment = Enrolment(folder, effective.federation)
    url = advertised_url(effective, enrolment)
    bundle = enrolment.enroll(name, broker_url=url, ca_pem=ca_pem(effective), replace=replace)
    write_bundle(target, bundle)
    typer.echo(f"wrote {target} (secret; broker {url})")
    if effective.broker.url == EMBEDDED:
        reload_running(folder)
    else:
        typer.echo(f"next: let the broker read {folder / 'broker' / 'mosquitto'} again (docs/operations.md)")
    typer.echo(
        f"next: copy it to the device, then there: edge-agent run {target.name} --data imagefolder:PATH"
    )


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The device.")],
    file: ConfigOption = None,
    federation: FederationOption = None,
    state: StateOption = None,
) -> None:
    """Take a device's identity and broker account away."""
    from aggregator.broker import reload_running
    from aggregator.enrolment import Enrolment

    flags = {"federation": federation, "state_dir": state}
    effective = read_settings(file or last_served(state), flags)
    Enrolment(Path(effective.state_dir), effective.federation).revoke(name)
    reload_running(Path(effective.state_dir))
    typer.echo(f"{name} is revoked: nothing that it signs counts any more")


@app.command()
def roster(
    path: Annotated[Path, typer.Argument(help="File to write.")],
    file: ConfigOption = None,
    federation: FederationOption = None,
    state: StateOption = None,
) -> None:
    """Write the public keys of all devices: carried to each of them by hand, it shows up an aggregator that invents some."""
    from aggregator.enrolment import Enrolment
    from federation.roster import write_roster

    flags = {"federation": federation, "state_dir": state}
    effective = read_settings(file or last_served(state), flags)
    keys = Enrolment(Path(effective.state_dir), effective.federation).agents()
    write_roster(path, effective.federation, {name: bytes.fromhex(key) for name, key in keys.items()})
    typer.echo(
        f"wrote {path} ({len(keys)} devices); next, on each device: edge-agent run ... --roster {path.name}"
    )


@app.command("new-run")
def new_run(
    state: Annotated[
        Path | None, typer.Argument(help="State folder; default from the configuration.")
    ] = None,
    file: ConfigOption = None,
) -> None:
    """Go on from the newest checkpoint as a new run: needed once after the state was restored from a backup.

    Devices refuse rounds that they have seen closed, since those may be replays. The open round is dropped.
    """
    from aggregator.store import Store

    with Store(state or Path(read_settings(file, {}).state_dir)) as store:
        store.lock()
        store.begin_run()
        store.sweep()
        typer.echo(f"{store.folder} is run {store.run} now; next: aggregator serve")


@app.command()
def status(
    state: Annotated[
        Path | None, typer.Argument(help="State folder; default from the configuration.")
    ] = None,
    file: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show rounds, agents and refusals, of a server that runs or has run."""
    from aggregator.status import collect
    from aggregator.status_view import render

    folder = state or Path(read_settings(file, {}).state_dir)
    report = collect(folder)
    typer.echo(report.to_json() if as_json else render(report), nl=not as_json)


@app.command()
def demo(
    data: Annotated[
        str, typer.Option("--data", help="digits (built in), mnist:PATH or another data set.")
    ] = "digits",
    folder: Annotated[Path, typer.Option("--folder", help="Where everything goes; replaced.")] = Path(
        "fedge-demo"
    ),
    agents: Annotated[
        int, typer.Option("--agents", min=2, max=20, help="Agents, each a process of its own.")
    ] = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds.")] = 8,
    settings: SetOption = None,
) -> None:
    """Run a whole federation on this machine: broker, server, agents, ONNX export, inference."""
    from aggregator.demo import run_demo

    run_demo(data=data, folder=folder, agents=agents, rounds=rounds, settings=settings or ())


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Set up what all commands share."""
    configure(level="warning")
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
