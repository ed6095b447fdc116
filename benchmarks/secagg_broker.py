"""Masked rounds of real agents over a real mosquitto, some of which vanish: are the sums exact, and what do they cost?

A part of ``python -m benchmarks.secagg``. The agents are light (``benchmarks/masked_agents.py``): all of a device but the training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from aggregator.config import AggregatorConfig
from aggregator.enrolment import Enrolment
from aggregator.privacy_config import PrivacyConfig, SecAggConfig
from aggregator.promises import terms_of
from aggregator.store import Store
from aggregator.traffic import TrafficLog
from benchmarks.fleets import FEDERATION
from benchmarks.processes import Child, Children, module
from benchmarks.runner import BenchmarkError, Options, Results, middle, say
from benchmarks.transfer import Mosquitto
from federation.bundle import write_bundle
from federation.task.checkpoint import read_checkpoint
from federation.wire.codec import schema_of
from federation.wire.masking import scale_of_terms
from federation.wire.signing import AGGREGATOR

SIZES = (10, 50, 100)
SHARES = (0.0, 0.1, 0.3)
REPEATS = 3
PROCESSES = 4
"""In which the agents live, each with a quarter of them."""

MOMENT = "offer"
"""When they vanish: after their shares, before their updates. The aggregator then has most to recover."""

CLASSES = 10
START_S, RUN_S = 180.0, 600.0

_SECAGG = SecAggConfig(enabled=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """One fleet.

    Attributes:
        seconds: By share of agents that vanish: each round from opening to closing.
        exact: By share: whether each round's model is, to the bit, the one of the plain sum of all that did not vanish.
        sent: Bytes of payloads that an agent has sent in a round in which nobody vanishes, median.
        received: The same of what it has received, the model included.
        agent_cpu_s: Of one agent in one round.
        server_cpu_s: Of the aggregator in one round.
    """

    seconds: dict[float, list[float]]
    exact: dict[float, list[bool]]
    sent: float
    received: float
    agent_cpu_s: float
    server_cpu_s: float


class Fleet:
    """An aggregator, a broker, and light agents in a few processes.

    Args:
        children: Run them.
        folder: Of this fleet alone; created.
        size: Agents, all in every cohort.
        shares: Of them that vanish: ``REPEATS`` rounds for each, after one to warm up.
        masked: Whether updates are masked; else int8.
    """

    def __init__(
        self, children: Children, folder: Path, size: int, shares: Sequence[float], *, masked: bool
    ) -> None:
        self._children, self._folder, self._size, self._masked = children, folder, size, masked
        self._record, self._state = folder / "integers", folder / "state"
        self._record.mkdir(parents=True)
        self._shares = (0.0, *(share for share in shares for _ in range(REPEATS)))
        """Of each round."""

    def run(self) -> Measured:
        """All rounds, to the end.

        Raises:
            BenchmarkError: If a process fails.
        """
        broker = Mosquitto(self._children, self._folder / "broker")
        agents = self._join(f"{broker.url}?version=3")
        server = self._serve(broker.url)
        # Connecting is no part of a round: what has been spent when the first one opens does not count.
        self._children.until(lambda: bool(self._rounds()), START_S, "a round is open")
        before = [_cpu_s(agent) for agent in agents], _cpu_s(server)
        after = before

        def over() -> bool:
            nonlocal after
            if not server.ended:
                after = [_cpu_s(agent) for agent in agents], _cpu_s(server)
            return server.ended

        self._children.until(over, RUN_S, f"{server.name} finishes")
        rounds = len(self._shares)
        sent, received = self._bytes()
        measured = Measured(
            seconds=self._seconds(),
            exact=self._exact() if self._masked else {},
            sent=sent,
            received=received,
            agent_cpu_s=(sum(after[0]) - sum(before[0])) / self._size / rounds,
            server_cpu_s=(after[1] - before[1]) / rounds,
        )
        self._children.stop(*agents, broker.child)
        return measured

    def _join(self, url: str) -> list[Child]:
        enrolment = Enrolment(self._state, FEDERATION)
        bundles = []
        for number in range(self._size):
            bundles.append(self._folder / f"a{number:03d}.bundle.json")
            write_bundle(bundles[-1], enrolment.enroll(f"a{number:03d}", broker_url=url))
        vanish = self._folder / "vanish"
        vanish.write_text(
            "".join(
                f"a{agent:03d} {number} {MOMENT}\n"
                for number in range(1, len(self._shares) + 1)
                for agent in self._vanishing(number)
            )
        )
        per_process = -(-self._size // PROCESSES)
        options = ("--record", str(self._record), "--vanish", str(vanish))
        return [
            self._children.start(
                f"{self._folder.name}-agents-{at}",
                *module("benchmarks.masked_agents", *options, *map(str, bundles[at : at + per_process])),
            )
            for at in range(0, self._size, per_process)
        ]

    def _serve(self, url: str) -> Child:
        labels = json.dumps([str(label) for label in range(CLASSES)])
        settings = {
            "task.labels": labels,
            "task.channels": 1,
            "task.height": 28,
            "task.width": 28,
            "rounds.gather_s": 600,
            "rounds.grace_s": 0.1,
            "keep_checkpoints": 0,
            **({"privacy.secagg.enabled": "true"} if self._masked else {"up_encoding": "int8"}),
        }
        return self._children.start(
            f"{self._folder.name}-aggregator",
            *module("aggregator.cli", "serve", "--federation", FEDERATION, "--state", str(self._state)),
            *(
                "--broker",
                url,
                "--model",
                "cnn",
                "--rounds",
                str(len(self._shares)),
                "--down-encoding",
                "full",
            ),
            *(
                "--min-agents",
                "3",
                "--cohort-size",
                str(self._size),
                "--deadline",
                "600",
                "--log-format",
                "json",
            ),
            *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
        )

    def _vanishing(self, number: int) -> list[int]:
        """Other agents in each round."""
        count = round(self._shares[number - 1] * self._size)
        return [(number * 7 + at) % self._size for at in range(count)]

    def _rounds(self) -> list[float]:
        if not (self._state / "store.sqlite").exists():
            return []
        with Store(self._state) as store:
            return [row.opened_at for row in store.rounds()]

    def _seconds(self) -> dict[float, list[float]]:
        seconds: dict[float, list[float]] = {share: [] for share in self._shares}
        with Store(self._state) as store:
            for row in store.rounds()[1:]:
                if row.closed_at is None or row.attempt != 1:
                    raise BenchmarkError(f"round {row.round} took {row.attempt} attempts, phase {row.phase}")
                seconds[self._shares[row.round - 1]].append(row.closed_at - row.opened_at)
        return seconds

    def _exact(self) -> dict[float, list[bool]]:
        config = AggregatorConfig(privacy=PrivacyConfig(secagg=_SECAGG))
        exact: dict[float, list[bool]] = {share: [] for share in self._shares}
        with Store(self._state) as store:
            for row in store.rounds():
                share = self._shares[row.round - 1]
                base = read_checkpoint(store.checkpoint_path(row.round - 1))[1]
                made = read_checkpoint(store.checkpoint_path(row.round))[1]
                terms = terms_of(config, store.run, row.round, row.attempt).secagg
                assert terms is not None
                scale = scale_of_terms(terms, schema_of(base), len(row.cohort))
                total = np.zeros(scale.size, scale.dtype)
                updates = store.updates(row.round)
                for update in updates.values():
                    total += np.frombuffer((self._record / update.sha256).read_bytes(), scale.dtype)
                mean = scale.mean(total, terms.rotation_seed, len(updates))
                same = all(
                    np.array_equal(
                        (base[name] + mean[name].astype(np.float64)).astype(np.float32), made[name]
                    )
                    for name in base
                )
                exact[share].append(same and len(updates) == self._size - len(self._vanishing(row.round)))
        return exact

    def _bytes(self) -> tuple[float, float]:
        undisturbed = {number for number, share in enumerate(self._shares, 1) if number > 1 and not share}
        with Store(self._state) as store:
            moved = [
                entry.moved
                for entry in TrafficLog(store).read()
                if entry.agent != AGGREGATOR and entry.round in undisturbed
            ]
        return middle(each.sent_payload_bytes for each in moved), middle(
            each.received_payload_bytes for each in moved
        )


def measure(options: Options, results: Results) -> None:
    """All fleets."""
    exact: dict[float, list[bool]] = {share: [] for share in SHARES}
    with Children(options.folder / "logs") as children:
        for size in SIZES[:1] if options.quick else SIZES:
            say(f"  {size} agents, cnn, mosquitto: masked, then int8")
            masked = Fleet(children, options.folder / f"masked-{size}", size, SHARES, masked=True).run()
            plain = Fleet(children, options.folder / f"int8-{size}", size, (0.0,), masked=False).run()
            tell(results, size, masked, plain)
            for share, rounds in masked.exact.items():
                exact[share] += rounds
    everything = [each for rounds in exact.values() for each in rounds]
    how = "models that are, to the bit, those of the plain sums (over mosquitto)"
    results.add("exact", float(all(everything)), "", f"{sum(everything)} of {len(everything)} {how}")
    survived = max((share for share, rounds in exact.items() if all(rounds)), default=0.0)
    results.add(
        "dropouts_survived", survived, "", "largest share of the cohort that vanished (over mosquitto)"
    )


def tell(results: Results, size: int, masked: Measured, plain: Measured) -> None:
    """The figures of one size."""
    for share, seconds in masked.seconds.items():
        how = f"a round of {size}, {share:.0%} vanish after they have shared; opening to closing, median of {len(seconds)}"
        results.add(
            f"broker_s_{size}_{round(100 * share)}",
            middle(seconds),
            "s",
            f"{how} ({min(seconds):.2f} to {max(seconds):.2f})",
        )
    results.add(
        f"broker_s_{size}_int8",
        middle(plain.seconds[0.0]),
        "s",
        "the same agents and model, int8 without masks",
    )
    results.add(
        f"broker_up_kb_{size}",
        masked.sent / 1000,
        "KB",
        f"payloads that an agent sends in a round; int8: {plain.sent / 1000:.0f}",
    )
    results.add(
        f"broker_down_kb_{size}",
        masked.received / 1000,
        "KB",
        f"payloads that an agent receives in a round, the model in float32 included; int8: {plain.received / 1000:.0f}",
    )
    results.add(
        f"broker_ratio_int8_{size}",
        (masked.sent + masked.received - plain.received) / plain.sent,
        "x",
        "all payloads of an agent but the model, over those of an int8 update",
    )
    results.add(
        f"broker_agent_cpu_s_{size}",
        masked.agent_cpu_s,
        "s",
        f"CPU of an agent in a round, all but training; int8: {plain.agent_cpu_s:.3f}",
    )
    results.add(
        f"broker_server_cpu_s_{size}",
        masked.server_cpu_s,
        "s",
        f"CPU of the aggregator in a round, vanished ones included; int8: {plain.server_cpu_s:.3f}",
    )


def _cpu_s(child: Child) -> float:
    """Processor seconds of a process so far."""
    times = psutil.Process(child.process.pid).cpu_times()
    return times.user + times.system
