"""``aggregator release``, ``rollback``, ``releases`` and ``release-key``: what an operator does with models and devices."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from aggregator.config import AggregatorConfig
from aggregator.options import (
    ConfigOption,
    SetOption,
    StateOption,
    last_served,
    parse_settings,
    read_settings,
)
from federation.errors import ConfigError
from federation.wire.release import Channel, ModelFormat

NumberOption = Annotated[int | None, typer.Option("--to", min=1, help="Number of the release to go back to.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


def release(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A folder of `model-export onnx`; without it the newest checkpoint is exported as [release] says."
        ),
    ] = None,
    *,
    number: Annotated[
        int | None, typer.Option("--number", min=1, help="Announce this release, which was made before.")
    ] = None,
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="Export the checkpoint of this round.")
    ] = None,
    channel: Annotated[
        Channel | None, typer.Option("--channel", help="canary (the default) first, or stable: all at once.")
    ] = None,
    canary: Annotated[
        str | None, typer.Option("--canary", help="Share that gets it first: 10% or 0.1 (release.canary).")
    ] = None,
    wanted: Annotated[
        ModelFormat | None, typer.Option("--format", help="Of the weights (release.format).")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Pictures to calibrate and measure with (release.data).")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", min=0, help="Points that the format may cost (release.max_drop)."),
    ] = None,
    notes: Annotated[str, typer.Option("--notes", help="For people; devices are told.")] = "",
    other_labels: Annotated[
        bool, typer.Option("--other-labels", help="Allow other classes than the stable release knows.")
    ] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Make it, and announce it later.")] = False,
    gated: Annotated[
        bool,
        typer.Option(
            "--auto", help="Only if it is not worse than the stable release (release.max_regression)."
        ),
    ] = False,
    file: ConfigOption = None,
    state: StateOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a release of a model, and have it announced: to a share of the devices first, and if they do well, to all.

    The server widens the share by itself, and takes the release back when devices fail with it.
    """
    from aggregator.releases.checks import Order
    from aggregator.releases.making import make_release
    from aggregator.releases.records import RequestKind
    from aggregator.releases.requests import (
        as_answer,
        described,
        known,
        opened,
        refusal_kept,
        refuse_refusal,
        request_kind,
        wait_for_answer,
        what_next,
    )
    from aggregator.releases.store import ReleaseStore

    config = _settings(file, state, settings)
    share = None if canary is None else share_of(canary)
    kind = request_kind(channel, share, config)
    if number is not None and (source is not None or round_number is not None or hold):
        raise ConfigError(
            f"--number {number} announces a release that was made: leave FOLDER, --round and --hold away"
        )
    if source is not None and round_number is not None:
        raise ConfigError(
            f"--round {round_number} exports a checkpoint, but {source} is exported already: leave one away"
        )
    with opened(config) as store:
        releases = ReleaseStore(store)
        remarks: tuple[str, ...] = ()
        if number is not None:
            row = known(releases, number)
        else:
            order = Order(
                folder=source,
                round=round_number,
                format=wanted,
                data=data,
                max_drop=max_drop,
                notes=notes,
                other_labels=other_labels,
                gated=gated,
            )
            with refusal_kept(store, gated=gated):
                made = make_release(store, config, order)
            row, remarks = made.stored, made.remarks
        asked = (
            None
            if hold
            else releases.request(kind, row.number, share if kind is RequestKind.CANARY else None)
        )
        serving = store.served()
        if not as_json:
            typer.echo(described(row, remarks))
        said = None if asked is None or not serving else wait_for_answer(releases, asked)
    refuse_refusal(said)
    if as_json:
        typer.echo(msgspec.json.encode(as_answer(row, None if hold else kind.value, said, remarks)).decode())
    elif hold:
        typer.echo(f"next: aggregator release --number {row.number} announces it")
    else:
        typer.echo(what_next(said, serving=serving))


def rollback(
    number: NumberOption = None,
    *,
    channel: Annotated[
        Channel | None,
        typer.Option(
            "--channel",
            help="Take back the canary, or the stable release; default: the canary if there is one.",
        ),
    ] = None,
    file: ConfigOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take back a release: devices go back to the one before, or to that of --to, which most of them still have on disk."""
    from aggregator.releases.records import RequestKind
    from aggregator.releases.requests import (
        opened,
        refuse_refusal,
        rollback_target,
        wait_for_answer,
        what_next,
    )
    from aggregator.releases.store import ReleaseStore

    config = _settings(file, state, None)
    with opened(config) as store:
        releases = ReleaseStore(store)
        if not releases.releases():
            raise ConfigError(f"{store.folder} has no release yet: make one with `aggregator release`")
        target = rollback_target(releases, number, channel)
        asked = releases.request(RequestKind.ROLLBACK, target)
        serving = store.served()
        said = wait_for_answer(releases, asked) if serving else None
    refuse_refusal(said)
    if as_json:
        typer.echo(msgspec.json.encode({"to": target, "server": said}).decode())
    else:
        typer.echo(what_next(said, serving=serving))


def releases(
    file: ConfigOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the releases, what has become of them, and what devices say."""
    from aggregator.releases.listing import collect_releases, list_text
    from aggregator.releases.requests import opened

    config = _settings(file, state, None)
    with opened(config) as store:
        found = collect_releases(store)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    elif found.releases:
        typer.echo(list_text(found))
    else:
        typer.echo("no release yet; next: aggregator release")


def release_key(
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Let the successor take over, and make the one that comes after it."),
    ] = False,
    file: ConfigOption = None,
    state: StateOption = None,
) -> None:
    """Show the keys that sign releases, or rotate them: at times, and at once when the present one may have been stolen."""
    from aggregator.releases.keys import ReleaseKeys
    from aggregator.releases.requests import opened

    config = _settings(file, state, None)
    with opened(config) as store:
        keys = ReleaseKeys(store.folder)
        pair = keys.rotate() if rotate else keys.pair()
        serving = store.served()
    present, successor = pair.pinned
    where = f"in {keys.successor_file}" if keys.successor_file.exists() else "kept elsewhere"
    typer.echo(f"release key  {present}\nsuccessor    {successor} ({where})")
    if rotate:
        typer.echo(
            "rotated: what the former key signs is refused by every device from the moment that it sees the next manifest.\n"
            "Devices enrolled before take the new key's manifest, since they had pinned it, and pin the new successor from it.\n"
            "A device that sees no manifest until the next rotation must be enrolled again: `aggregator enroll --replace`."
        )
        typer.echo(
            "next: the server signs the manifests anew within seconds"
            if serving
            else "next: start `aggregator serve --stay`, which signs the manifests anew"
        )
    if keys.successor_file.exists():
        typer.echo(f"next: move {keys.successor_file} to a safe place; only the next rotation needs it")


def share_of(text: str) -> float:
    """Read a share: ``10%`` or ``0.1``.

    Raises:
        ConfigError: If it is not above 0 and at most all.
    """
    number, percent = (text[:-1], 100.0) if text.endswith("%") else (text, 1.0)
    try:
        share = float(number) / percent
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--canary {text!r}: write a share of the devices, 10% or 0.1, at most 100%")
    return share


def _settings(file: Path | None, state: str | None, settings: list[str] | None) -> AggregatorConfig:
    return read_settings(file or last_served(state), {"state_dir": state, **parse_settings(settings)})
