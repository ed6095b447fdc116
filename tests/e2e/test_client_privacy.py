"""Kill -9 inside the folds of a private run: every round is paid for once, and no sum is shown with two noises."""

import signal

import pytest
from devices import CHUNK_BYTES, Device, frame, noise
from processes import TINY_SHAPES, TINY_TASK, MakeFederation, Process, begin_tiny_run, dies_before

from aggregator.round_noise import noisy_rounds
from aggregator.store import Store
from federation.wire.messages import UpdateOffer
from federation.wire.versions import model_digest
from privacy.accounting import Spend, epsilon_pld

pytestmark = pytest.mark.network

FOLD_POINTS = ("write_checkpoint", "close_round")
"""What the fold does with the store, in this order: the aggregator dies just before it."""


def until_dead(server: Process, device: Device, offer: UpdateOffer, data: bytes) -> None:
    """Send what is asked for until the server dies of it."""

    def dead() -> bool:
        while device.asked:
            for index in device.asked.popleft().chunks:
                device.send_chunk(offer, data, index)
        return not server.alive()

    device.until(dead, "the end of the server")
    assert server.wait() == -signal.SIGKILL, server.tail


def test_an_aggregator_killed_inside_its_folds_pays_once_and_shows_one_noise(
    make_federation: MakeFederation,
) -> None:
    federation = make_federation("embedded")
    begin_tiny_run(federation.state)
    budget = epsilon_pld([Spend(2.0, 1.0, len(FOLD_POINTS))], 1e-5)
    options = (
        *TINY_TASK,
        *("--rounds", 9, "--min-agents", 1, "--deadline", 120, "--up-encoding", "float32"),
        *("--set", "rounds.gather_s=0", "--set", f"broker.chunk_bytes={CHUNK_BYTES}"),
        *("--set", "privacy.client.noise_multiplier=2", "--set", f"privacy.client.epsilon={budget!r}"),
        *("--set", "privacy.client.clip_norm=0.1", "--set", "privacy.client.quantile=0.5"),
    )
    device = Device(federation.enroll("a"))
    server = federation.serve(*options)
    try:
        device.connected()
        for number, point in enumerate(FOLD_POINTS, 1):
            device.in_round(number)
            server.kill()
            server = federation.serve(*options, environment=dies_before(federation.folder, point))
            data = frame(noise(TINY_SHAPES, "a", number))
            offer = device.offer(device.in_round(number), data, samples=1)
            device.offer_until_asked(offer)
            for index in range(offer.object.chunks):
                device.send_chunk(offer, data, index)
            until_dead(server, device, offer, data)
            path = federation.state / "checkpoints" / f"round-{number:06d}.safetensors"
            seen = path.read_bytes() if path.exists() else None
            assert (seen is not None) == (point == "close_round")
            server = federation.serve(*options)
            federation.until_closed(number)
            assert seen is None or path.read_bytes() == seen, "it may have been seen: it keeps its noise"
        assert server.wait() == 0, "the budget is spent"
    finally:
        device.stop()
    report = federation.report()
    assert len(report.rounds) == len(FOLD_POINTS)
    assert report.client_privacy is not None
    assert (report.client_privacy.exhausted, report.client_privacy.paid_rounds) == (True, len(FOLD_POINTS))
    with Store(federation.state) as store:
        for row in noisy_rounds(store):
            version = store.version(row.round)
            assert version is not None
            assert version.digest == row.digest == model_digest(federation.tensors(row.round))
