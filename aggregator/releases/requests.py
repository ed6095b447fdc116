"""What the commands of releases have in common: a request for the server, its answer, and what is said of a release."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from aggregator.config import AggregatorConfig
from aggregator.releases.records import REFUSED_KEY, RequestKind, StoredRelease
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.errors import ConfigError, VerificationError
from federation.wire.release import Channel

ANSWER_S = 15.0
"""How long a command waits for a running server, which looks for requests every second."""

_POLL_S = 0.1


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


@contextmanager
def refusal_kept(store: Store, *, gated: bool) -> Iterator[None]:
    """Let people read later why nothing was released by itself, when nobody looked."""
    try:
        yield
    except VerificationError as error:
        if gated:
            store.remember(REFUSED_KEY, str(error))
        raise
    store.remember(REFUSED_KEY, "")


def request_kind(channel: Channel | None, share: float | None, config: AggregatorConfig) -> RequestKind:
    """What is asked for: a canary, unless all devices are meant.

    Raises:
        ConfigError: If a share is given for all devices.
    """
    if channel is Channel.STABLE:
        if share is not None:
            raise ConfigError(
                "--canary is for the canary channel, --channel stable reaches all devices: leave one away"
            )
        return RequestKind.STABLE
    if channel is None and share is None and config.release.canary >= 1:
        return RequestKind.STABLE
    return RequestKind.CANARY


def opened(config: AggregatorConfig) -> Store:
    """The store that the settings name, which must be there.

    Raises:
        ConfigError: If it is not.
    """
    return Store(Path(config.state_dir))


def known(releases: ReleaseStore, number: int) -> StoredRelease:
    """The release of that number, with its files.

    Raises:
        ConfigError: If there is none, or its files are gone.
    """
    row = releases.release(number)
    if row is None:
        numbers = [str(each.number) for each in releases.releases()]
        raise ConfigError(f"there is no release {number}; there is {', '.join(numbers) or 'none yet'}")
    if not row.on_disk:
        raise ConfigError(
            f"the files of release {number} are not on the disk any more: release round {row.release.round} again"
        )
    return row


def rollback_target(releases: ReleaseStore, number: int | None, channel: Channel | None) -> int | None:
    """The release to go back to; None leaves the canary to be taken back, or the choice to the server.

    Raises:
        ConfigError: If there is nothing to take back, or nothing to go back to.
    """
    if number is not None:
        if channel is not None:
            raise ConfigError("--to says where all devices go back to: leave --channel away")
        return known(releases, number).number
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
    return known(releases, before.number).number


def wait_for_answer(releases: ReleaseStore, request: int) -> str | None:
    """What the running server answers to a request; None if it takes too long."""
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        said = releases.outcome(request)
        if said is not None:
            return said
        time.sleep(_POLL_S)
    return None


def what_next(said: str | None, *, serving: bool) -> str:
    """Where the operator looks next."""
    if said is not None:
        return f"server: {said}\nnext: aggregator releases"
    if serving:
        return "the server has not answered yet, it will; next: aggregator releases"
    return "no server is running; next: `aggregator serve --stay` carries it out, and tells the devices"


def refuse_refusal(said: str | None) -> None:
    """Fail if the server has refused.

    Raises:
        ConfigError: With its reason.
    """
    if said is not None and said.startswith("refused: "):
        raise ConfigError(f"the server {said}")


def as_answer(row: StoredRelease, channel: str | None, said: str | None, remarks: tuple[str, ...]) -> Answer:
    """The same for programs."""
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


def described(row: StoredRelease, remarks: tuple[str, ...]) -> str:
    """A release for people, a line for each thing."""
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
