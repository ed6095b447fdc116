"""Releases from an operator's commands to the broker: real processes, a real broker, and whoever listens there."""

from pathlib import Path

import numpy as np
import pytest
from fleets import TOPICS, Client
from numpy.typing import NDArray
from processes import FEDERATION, TINY_TASK, Federation, MakeFederation, begin_tiny_run, run_command
from release_folders import exported

from aggregator.records import StoredVersion
from aggregator.releases.records import ReleaseState, StoredRelease
from aggregator.releases.store import ReleaseStore
from aggregator.store import Store
from federation.bundle import Bundle, address
from federation.release import SignedManifest, open_manifest
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.data import open_data, task_from_data
from federation.task.models import build, state_arrays
from federation.wire.link import Message
from federation.wire.release import Channel
from federation.wire.signing import public_key
from federation.wire.versions import model_digest

pytestmark = pytest.mark.network

Arrays = dict[str, NDArray[np.float32]]

TASK = task_from_data("digits", "cnn")

NEVER = ("--rounds", 1, "--min-agents", 2)
"""A round that waits for devices for ever: the server is there for its releases."""


class Listener:
    """A device's eyes on the channels."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.client = Client(address(bundle), "listener").connected()
        self.client.link.subscribe([(TOPICS.release(channel.value), 1) for channel in Channel])

    def said(self, channel: Channel) -> SignedManifest | None:
        """The newest manifest of a channel, by the keys that the bundle pins."""
        self.client.drain()
        topic = TOPICS.release(channel.value)
        messages = [one for one in self.client.heard if isinstance(one, Message) and one.topic == topic]
        if not messages:
            return None
        keys = [public_key(key) for key in self.bundle.release_keys]
        return open_manifest(messages[-1].payload, federation=FEDERATION, keys=keys, channel=channel)


def operator(federation: Federation, *arguments: object) -> str:
    done = run_command("aggregator.cli", *arguments, "--state", federation.state)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number_of(signed: SignedManifest | None) -> int | None:
    return None if signed is None or signed.manifest.release is None else signed.manifest.release.number


def test_an_operators_day_with_releases(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    bundle = federation.enroll("pi1")
    one = exported(tmp_path / "one", seed=1, federation=FEDERATION)
    two = exported(tmp_path / "two", scale=1.001, seed=1, number=4, federation=FEDERATION)

    said = operator(federation, "release", one, "--channel", "stable")
    assert "no server is running" in said
    server = federation.serve(*TINY_TASK, *NEVER, "--stay")
    server.until_logged("manifest_published")
    listener = Listener(bundle)
    try:
        federation.until(lambda: number_of(listener.said(Channel.STABLE)) == 1, "release 1 is announced")

        said = operator(federation, "release", two, "--canary", "30%")
        assert "delta" in said
        assert "server: release 2 goes to 0.3 of the devices" in said
        federation.until(lambda: number_of(listener.said(Channel.CANARY)) == 2, "release 2 is a canary")
        canary = listener.said(Channel.CANARY)
        assert canary is not None
        assert canary.manifest.share == pytest.approx(0.3)

        assert "release 2 is taken back" in operator(federation, "rollback")
        federation.until(lambda: number_of(listener.said(Channel.CANARY)) is None, "the canary is over")

        operator(federation, "release", "--number", 2, "--channel", "stable")
        federation.until(lambda: number_of(listener.said(Channel.STABLE)) == 2, "release 2 is for all")
        assert "all devices go back to release 1" in operator(federation, "rollback")
        federation.until(lambda: number_of(listener.said(Channel.STABLE)) == 1, "back at release 1")
        refused = run_command("aggregator.cli", "rollback", "--to", 1, "--state", federation.state)
        assert (refused.returncode, refused.stderr) == (
            2,
            "error: the server refused: release 1 is the stable one already\n",
        )

        assert "the server signs the manifests anew" in operator(federation, "release-key", "--rotate")

        def rotated() -> bool:
            signed = listener.said(Channel.STABLE)
            return signed is not None and signed.signer == 1

        federation.until(rotated, "the successor signs")
        signed = listener.said(Channel.STABLE)
        assert signed is not None
        pinned = (bundle.release_keys[1], signed.manifest.next_key.hex())
        assert federation.enroll("pi2").release_keys == pinned
    finally:
        listener.client.link.stop()
    verified = run_command(
        "export.cli", "verify", federation.state / "releases" / "1", "--key", federation.bundles["pi1"]
    )
    assert verified.returncode == 0, verified.stderr
    assert "the successor of the present release key" in verified.stdout
    assert server.terminate() == 0


def test_a_finished_run_releases_its_model_unless_it_is_worse(make_federation: MakeFederation) -> None:
    federation = make_federation("embedded")
    good, bad = learnt_and_random()
    with Store(federation.state, FEDERATION, create=True) as store:
        write_round(store, 0, bad)
        write_round(store, 1, good)
    settings = (
        *("--data", "digits", "--set", "release.auto=true", "--set", "release.data='digits'"),
        *("--set", "release.canary=1.0", "--set", "release.format='fp32'"),
    )
    server = federation.serve(*settings, "--rounds", 1)
    assert server.wait() == 0, server.tail
    assert [row.number for row in releases_of(federation)] == [1]
    (first,) = releases_of(federation)
    assert first.state is ReleaseState.STABLE, "a server does not end before it has announced it"
    assert first.release.round == 1
    assert first.release.metrics is not None
    assert first.release.metrics.accuracy > 0.6

    again = federation.serve(*settings, "--rounds", 1)
    assert again.wait() == 0, again.tail
    assert len(releases_of(federation)) == 1, "once for each last round"

    with Store(federation.state) as store:
        write_round(store, 2, bad)
    worse = federation.serve(*settings, "--rounds", 2)
    assert worse.wait() == 0, worse.tail
    assert len(releases_of(federation)) == 1
    (line,) = worse.logged("automatic_release_refused")
    assert "points below release 1" in line["reason"]
    assert (line["round"], line["lost"]) == (2, "devices keep the release that they run")
    assert "not released by itself" in operator(federation, "releases")


def releases_of(federation: Federation) -> list[StoredRelease]:
    with Store(federation.state) as store:
        return ReleaseStore(store).releases()


def learnt_and_random() -> tuple[Arrays, Arrays]:
    """The weights of a model that knows the digits, and of one that does not."""
    import torch

    data = open_data("digits", TASK, train=True)
    model = build(TASK, seed=1)
    random = state_arrays(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for start in range(0, len(data), 32):
        images, labels = data.batch(np.arange(start, min(start + 32, len(data))))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return state_arrays(model), random


def write_round(store: Store, number: int, arrays: Arrays) -> None:
    """A round that was closed with this model; round 0 is the initial one."""
    info = CheckpointInfo(federation=FEDERATION, round=number, task=TASK)
    store.write_checkpoint(number, checkpoint_bytes(info, arrays))
    if number:
        store.open_round(number, 1, ("pi1",), base="0" * 64, encoding="float32", deadline_s=1.0)
        store.close_round(number, 0.1, StoredVersion(model_digest(arrays), "full"))
