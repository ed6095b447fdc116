"""Masked rounds of real processes over real brokers: kill -9 in every phase, and every sum exactly that of the integers."""

from pathlib import Path

import numpy as np
import pytest
from processes import (
    TINY_SHAPES,
    TINY_TASK,
    WHOLE_RUN_S,
    BrokerName,
    Federation,
    MakeFederation,
    Process,
    Tensors,
    begin_tiny_run,
)

from federation.wire.codec import schema_of
from federation.wire.shared_scale import SharedScale

pytestmark = [pytest.mark.network, pytest.mark.timeout(WHOLE_RUN_S)]

NAMES = tuple(f"pi{number}" for number in range(5))
VICTIM = "pi2"
PHASES = ("keys", "shares", "offer", "agreement", "reveal")
"""An agent is killed as it would send such a message, in round 1, 2, 3..."""

DOWN = ("roster", "shares", "survivors", "agreements")
"""The aggregator is killed as it would send the first such message, in the same rounds."""

ROUNDS = len(PHASES) + 1

SERVING = (
    *TINY_TASK,
    *(
        "--rounds",
        ROUNDS,
        "--min-agents",
        3,
        "--cohort-size",
        5,
        "--deadline",
        120,
        "--down-encoding",
        "full",
    ),
    *("--set", "rounds.gather_s=600", "--set", "rounds.grace_s=0.5", "--set", "rounds.quorum=0.5"),
    *("--set", "privacy.secagg.enabled=true", "--set", "privacy.secagg.min_agents=3"),
    *("--set", "privacy.secagg.phase_s=100", "--set", "privacy.secagg.dropouts=0.4"),
)


def dies_as_it_says(folder: Path, number: int, kind: str) -> dict[str, str]:
    """Environment of an aggregator that is killed, as by a power cut, before it sends the first such message of a round."""
    place = folder / f"before-{number}-{kind}"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from aggregator.secure_round import SecureRounds\n"
        "from federation.wire.messages import decode_msgpack\n"
        "from federation.wire.signing import Envelope\n"
        "send = SecureRounds._send\n"
        "def dying(self, agent, payload):\n"
        "    message = decode_msgpack(decode_msgpack(payload, Envelope).body, dict)\n"
        f"    if (message['round'], message['type']) == ({number}, {kind!r}):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    send(self, agent, payload)\n"
        "SecureRounds._send = dying\n"
    )
    return {"PYTHONPATH": str(place)}


def join(federation: Federation, name: str, record: Path, vanish: Path) -> Process:
    """Start a light agent of its own process, which vanishes by SIGKILL."""
    arguments = (
        "--record",
        record,
        "--vanish",
        vanish,
        "--kill",
        "--log-level",
        "info",
        federation.bundles[name],
    )
    return federation._start(name, "benchmarks.masked_agents", arguments, None)


def expected(federation: Federation, record: Path, number: int) -> Tensors:
    """The model before a round plus the mean of the plain sum of what its survivors have put in."""
    from aggregator.store import Store

    base = federation.tensors(number - 1)
    with Store(federation.state) as store:
        row = store.rounds()[number - 1]
        digests = [update.sha256 for update in store.updates(number).values()]
        scale = SharedScale.of(schema_of(base), clip_norm=10.0, modulus_bits=16, agents=len(row.cohort))
        seed = rotation(store.run, number, row.attempt)
    total = np.zeros(scale.size, scale.dtype)
    for digest in digests:
        total += np.frombuffer((record / digest).read_bytes(), scale.dtype)
    mean = scale.mean(total, seed, len(digests))
    return {name: (base[name] + mean[name].astype(np.float64)).astype(np.float32) for name in base}


def rotation(run: str, number: int, attempt: int) -> bytes:
    from aggregator.config import AggregatorConfig
    from aggregator.privacy_config import PrivacyConfig, SecAggConfig
    from aggregator.promises import terms_of

    config = AggregatorConfig(privacy=PrivacyConfig(secagg=SecAggConfig(enabled=True)))
    terms = terms_of(config, run, number, attempt).secagg
    assert terms is not None
    return terms.rotation_seed


@pytest.mark.parametrize(
    ("broker", "server_dies"),
    # The embedded broker dies with its aggregator; links wait longer before each further try.
    [("embedded", DOWN[-1:]), ("mosquitto", DOWN)],
)
def test_kill_9_in_every_phase_of_a_masked_round(
    broker: BrokerName, server_dies: tuple[str, ...], make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(broker)
    begin_tiny_run(federation.state)
    for name in NAMES:
        federation.enroll(name)
    record, vanish = tmp_path / "integers", tmp_path / "vanish"
    record.mkdir()
    left = [f"{VICTIM} {number} {kind}" for number, kind in enumerate(PHASES, 1)]
    vanish.write_text("\n".join(left))
    deaths = dict(enumerate(server_dies, 1))
    server = federation.serve(*SERVING, environment=dies_as_it_says(tmp_path, *next(iter(deaths.items()))))
    agents = {name: join(federation, name, record, vanish) for name in NAMES}
    server_deaths = list(deaths.items())[1:]
    lives = 1

    def mind() -> bool:
        """Start again what has been killed; whether the run is over."""
        nonlocal server, lives
        if not agents[VICTIM].alive():
            assert agents[VICTIM].popen.returncode == -9, agents[VICTIM].tail
            left.pop(0)
            vanish.write_text("\n".join(left))
            agents[VICTIM] = join(federation, VICTIM, record, vanish)
        if server.alive():
            return False
        if server.popen.returncode == 0:
            return True
        assert server.popen.returncode == -9, server.tail
        lives += 1
        environment = dies_as_it_says(tmp_path, *server_deaths.pop(0)) if server_deaths else None
        server = federation.serve(*SERVING, environment=environment)
        return False

    federation.until(mind, "the run is over")
    assert not left, "the agent was killed in each phase"
    assert lives == len(server_dies) + 1, "and so was the aggregator"
    rows = federation.report().rounds
    assert [(row.phase, row.attempt) for row in rows] == [("closed", 1)] * ROUNDS
    for row in rows:
        model = expected(federation, record, row.round)
        for name, array in federation.tensors(row.round).items():
            np.testing.assert_array_equal(array, model[name], f"{name} after round {row.round}")
    delivered = [row.delivered for row in rows]
    assert delivered[3:5] == [5, 5], "who vanishes after its update is in the sum"
    # A round takes a tenth of a second here, and a process that was killed two to be back: the last one may miss it.
    assert delivered[-1] in (4, 5), "in the last round nobody dies"
    assert set(TINY_SHAPES) == set(federation.tensors(0))
    for name, agent in agents.items():
        assert agent.terminate() == 0, name
