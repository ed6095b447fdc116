"""``edge-agent models``. Heavy imports wait until the command runs: ``edge-agent infer`` shares the command line."""

from pathlib import Path
from typing import Annotated

import typer

from edge_agent.places import MODELS, default_state
from federation.errors import ConfigError


def models(
    bundle: Annotated[
        Path | None, typer.Argument(help="The file that `aggregator enroll` wrote for this device.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="The agent's state folder; default BUNDLE's name beside it.")
    ] = None,
    forgive: Annotated[
        str | None,
        typer.Option(help="Take a release out of quarantine: its number, or the beginning of its SHA-256."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the releases on this device: which one runs, which one it would go back to, which failed here and why.

    An agent that runs with the same bundle is not disturbed.
    """
    import msgspec

    from edge_agent.releases.models_report import collect, render, take_out

    if state is None and bundle is None:
        raise ConfigError("whose models? Give this device's BUNDLE, or --state")
    folder = (state or default_state(bundle or Path())) / MODELS
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not there: no release was ever followed with this state; begin with `edge-agent infer`"
        )
    if forgive is not None:
        forgiven = take_out(folder, forgive)
        if not as_json:
            typer.echo(f"forgiven: {forgiven}; `edge-agent infer` takes it again after its next start\n")
    report = collect(folder)
    typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2) if as_json else render(report))
