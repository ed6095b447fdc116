"""``aggregator release``, ``rollback``, ``releases`` and ``release-key``: what an operator does with models and devices."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from aggregator.release_records import REFUSED_KEY, RequestKind, StoredRelease
from aggregator.release_store import ReleaseStore
from aggregator.store import Store
from federation.errors import ConfigError, VerificationError
from federation.wire.release import Channel, ModelFormat

ANSWER_S = 15.0
"""How long a command waits for a running server, which looks for requests every second."""

_POLL_S = 0.1

NumberOption = Annotated[int | None, typer.Option("--to", min=1, help="Number of the release to go back to.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a command has done, for programs.

    Attributes:
        number: Of the release.
        round: Whose model.
        format: Of the weights.
        model_bytes: Length of the file.
        delta_bytes: What devices with the stable release fetch instead; None without a delta.
        accuracy: Top-1 of the file, in [0, 1]; None if it was not measured.
        epsilon: What training has cost; None if it was not private.
        delta: At which epsilon is stated.
        channel: On which it was asked to be announced; None with ``--hold``.
        server: What the server has answered; None while it has not.
        remarks: What should be known.
    """

    number: int
    round: int
    format: str
    model_bytes: int
    delta_bytes: int | None
    accuracy: float | None
    epsilon: float | None
    delta: float | None
    channel: str | None
    server: str | None
    remarks: tuple[str, ...]


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
    from aggregator.release_checks import Order
    from aggregator.releasing import make_release

    config = _settings(file, state, settings)
    share = None if canary is None else share_of(canary)
    kind = _kind(channel, share, config)
    if number is not None and (source is not None or round_number is not None or hold):
        raise ConfigError(
            f"--number {number} announces a release that was made: leave FOLDER, --round and --hold away"
        )
    if source is not None and round_number is not None:
        raise ConfigError(
            f"--round {round_number} exports a checkpoint, but {source} is exported already: leave one away"
        )
    with _opened(config) as store:
        releases = ReleaseStore(store)
        remarks: tuple[str, ...] = ()
        if number is not None:
            row = _known(releases, number)
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
            with _refusal_kept(store, gated=gated):
                made = make_release(store, config, order)
            row, remarks = made.stored, made.remarks
        asked = (
            None
            if hold
            else releases.request(kind, row.number, share if kind is RequestKind.CANARY else None)
        )
        serving = store.served()
        if not as_json:
            typer.echo(_described(row, remarks))
        said = None if asked is None or not serving else _answer(releases, asked)
    _refuse_refusal(said)
    if as_json:
        typer.echo(msgspec.json.encode(_as_answer(row, None if hold else kind.value, said, remarks)).decode())
    elif hold:
        typer.echo(f"next: aggregator release --number {row.number} announces it")
    else:
        typer.echo(_what_next(said, serving=serving))


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
    config = _settings(file, state, None)
    with _opened(config) as store:
        releases = ReleaseStore(store)
        if not releases.releases():
            raise ConfigError(f"{store.folder} has no release yet: make one with `aggregator release`")
        target = _target(releases, number, channel)
        asked = releases.request(RequestKind.ROLLBACK, target)
        serving = store.served()
        said = _answer(releases, asked) if serving else None
    _refuse_refusal(said)
    if as_json:
        typer.echo(msgspec.json.encode({"to": target, "server": said}).decode())
    else:
        typer.echo(_what_next(said, serving=serving))


def releases(
    file: ConfigOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the releases, what has become of them, and what devices say."""
    from aggregator.release_list import collect_releases, list_text

    config = _settings(file, state, None)
    with _opened(config) as store:
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
    from aggregator.release_keys import ReleaseKeys

    config = _settings(file, state, None)
    with _opened(config) as store:
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


@contextmanager
def _refusal_kept(store: Store, *, gated: bool) -> Iterator[None]:
    """Let people read later why nothing was released by itself, when nobody looked."""
    try:
        yield
    except VerificationError as error:
        if gated:
            store.remember(REFUSED_KEY, str(error))
        raise
    store.remember(REFUSED_KEY, "")


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


def _kind(channel: Channel | None, share: float | None, config: AggregatorConfig) -> RequestKind:
    if channel is Channel.STABLE:
        if share is not None:
            raise ConfigError(
                "--canary is for the canary channel, --channel stable reaches all devices: leave one away"
            )
        return RequestKind.STABLE
    if channel is None and share is None and config.release.canary >= 1:
        return RequestKind.STABLE
    return RequestKind.CANARY


def _settings(file: Path | None, state: str | None, settings: list[str] | None) -> AggregatorConfig:
    return read_settings(file or last_served(state), {"state_dir": state, **parse_settings(settings)})


def _opened(config: AggregatorConfig) -> Store:
    return Store(Path(config.state_dir))


def _known(releases: ReleaseStore, number: int) -> StoredRelease:
    row = releases.release(number)
    if row is None:
        numbers = [str(each.number) for each in releases.releases()]
        raise ConfigError(f"there is no release {number}; there is {', '.join(numbers) or 'none yet'}")
    if not row.on_disk:
        raise ConfigError(
            f"the files of release {number} are not on the disk any more: release round {row.release.round} again"
        )
    return row


def _target(releases: ReleaseStore, number: int | None, channel: Channel | None) -> int | None:
    """The release to go back to; None leaves the canary to be taken back, or the choice to the server."""
    if number is not None:
        if channel is not None:
            raise ConfigError("--to says where all devices go back to: leave --channel away")
        return _known(releases, number).number
    canary, stable = releases.current(Channel.CANARY), releases.current(Channel.STABLE)
    if channel is Channel.CANARY and canary is None:
        raise ConfigError("no canary is under way: there is nothing to take back")
    if channel is Channel.CANARY or (channel is None and canary is not None):
        return None
    if stable is None:
        raise ConfigError("no release was announced yet: there is nothing to take back")
    before = releases.before(stable.number)
    if before is None:
        raise ConfigError(f"there is no release before {stable.number} to go back to: release a better one")
    return _known(releases, before.number).number


def _answer(releases: ReleaseStore, request: int) -> str | None:
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        said = releases.outcome(request)
        if said is not None:
            return said
        time.sleep(_POLL_S)
    return None


def _what_next(said: str | None, *, serving: bool) -> str:
    if said is not None:
        return f"server: {said}\nnext: aggregator releases"
    if serving:
        return "the server has not answered yet, it will; next: aggregator releases"
    return "no server is running; next: `aggregator serve --stay` carries it out, and tells the devices"


def _refuse_refusal(said: str | None) -> None:
    if said is not None and said.startswith("refused: "):
        raise ConfigError(f"the server {said}")


def _as_answer(row: StoredRelease, channel: str | None, said: str | None, remarks: tuple[str, ...]) -> Answer:
    release = row.release
    return Answer(
        number=release.number,
        round=release.round,
        format=release.format.value,
        model_bytes=release.model.length,
        delta_bytes=None if release.delta is None else release.delta.object.length,
        accuracy=None if release.metrics is None else release.metrics.accuracy,
        epsilon=None if release.privacy is None else release.privacy.epsilon,
        delta=None if release.privacy is None else release.privacy.delta,
        channel=channel,
        server=said,
        remarks=remarks,
    )


def _described(row: StoredRelease, remarks: tuple[str, ...]) -> str:
    release = row.release
    rows = [
        (
            "release",
            f"{release.number}: round {release.round}, {release.format.value}, {release.model.length / 1e6:.2f} MB",
        )
    ]
    if release.delta is not None:
        length = release.delta.object.length
        rows.append(
            (
                "delta",
                f"{length / 1e6:.2f} MB for devices with the stable release ({length / release.model.length:.0%})",
            )
        )
    if release.metrics is not None:
        metrics = release.metrics
        rows.append(
            (
                "top-1",
                f"{metrics.accuracy:.2%} of {metrics.samples} pictures, {metrics.drop_points:+.2f} points lost to fp32",
            )
        )
    if release.privacy is not None:
        privacy = release.privacy
        rows.append(
            ("privacy", f"epsilon {privacy.epsilon:.3g} at delta {privacy.delta:g}, {privacy.level} level")
        )
    rows += [("note", remark) for remark in remarks]
    rows.append(("files", str(row.folder)))
    return "\n".join(f"{name:<7}  {value}" for name, value in rows)
