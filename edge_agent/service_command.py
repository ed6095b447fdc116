"""``edge-agent install-service``. Its work, and what that imports, wait in ``service_setup`` until the command runs."""

from pathlib import Path
from typing import Annotated, Final

import typer

from edge_agent.service_unit import INFER_MEMORY, TRAIN_MEMORY
from federation.errors import ConfigError

DEFAULT_NAME: Final = "fedge-agent"


def install_service(
    bundle: Annotated[
        Path | None, typer.Argument(help="The file that `aggregator enroll` wrote for this device.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="As for `run`; without it the service only infers.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="As for `infer`; without it the service only trains.")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="As for `infer`.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="As for `run`; may name data and source, with full paths, instead."
        ),
    ] = None,
    user: Annotated[
        bool, typer.Option("--user/--system", help="For this user's own systemd: no root, less isolation.")
    ] = False,
    memory_max: Annotated[
        str | None,
        typer.Option(
            help=f"512M, 80%, infinity; default {TRAIN_MEMORY} with training, {INFER_MEMORY} without."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Of the unit.")] = DEFAULT_NAME,
    executable: Annotated[
        Path | None, typer.Option(help="edge-agent on the device; default: the one of this installation.")
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--print", "--dry-run", help="Print the unit, for this or another device; write nothing."
        ),
    ] = False,
    uninstall: Annotated[
        bool, typer.Option("--uninstall", help="Stop the service and take it away.")
    ] = False,
) -> None:
    """Have systemd keep this agent running: isolated, watched, and started again whatever happens.

    Needs root, or --user. What the service has learned stays on disk when it is taken away.
    """
    from edge_agent.service_setup import describe, read_settings
    from edge_agent.service_unit import render
    from edge_agent.systemd import check_manager, install, remove

    if uninstall:
        typer.echo("\n".join(remove(name, user=user)))
        return
    if bundle is None:
        raise ConfigError("no BUNDLE: name the file that `aggregator enroll` wrote for this device")
    if not show:
        check_manager(name, user=user)
    service = describe(
        read_settings(file, data, source, publish),
        bundle,
        {"--data": data, "--source": source, "--publish": publish},
        file,
        name=name,
        executable=executable,
        memory_max=memory_max,
        user=user,
        elsewhere=show,
    )
    text = render(service)
    typer.echo(text.removesuffix("\n") if show else "\n".join(install(name, text, user=user)))
