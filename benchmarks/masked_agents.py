"""Light agents of masked rounds: they write down what they mask, and vanish when they are told to.

``python -m benchmarks.masked_agents --record FOLDER [--vanish FILE] BUNDLE...`` runs one real agent per bundle until SIGTERM,
all but the training. The integers of each masked update go to ``FOLDER/<SHA-256 of what is sent>``. A line
``NAME ROUND KIND`` of FILE lets that agent vanish in the moment when it would send that kind of message (``keys``, ``shares``,
``offer``, ``agreement`` or ``reveal``), which is lost: with ``--kill`` the whole process is killed with SIGKILL, else the agent
leaves and starts anew, without its secrets and its update.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.light_agents import RandomTrainer
from edge_agent import masking
from edge_agent.agent import Agent, Options
from edge_agent.places import default_state
from edge_agent.telemetry import capabilities
from federation.bundle import Bundle, read_bundle
from federation.logs import configure
from federation.wire.link import Link, MakeLink
from federation.wire.messages import RoundPlan, decode_msgpack
from federation.wire.shared_scale import SharedScale
from federation.wire.signing import Envelope
from privacy.secagg.masks import MaskPlan

TELEMETRY_S = 3600.0
"""Only what each round has moved is to be told."""

KINDS = ("keys", "shares", "offer", "agreement", "reveal")

Vanish = Mapping[str, frozenset[tuple[int, str]]]
"""By agent: in which rounds it vanishes, and with which message."""


def record_integers(folder: Path) -> None:
    """From now on, write down the integers of every update that this process masks."""
    here, reduced, mask_update = threading.local(), SharedScale.reduced, masking.mask_update

    def seen(scale: SharedScale, integers: NDArray[np.int32]) -> NDArray[np.unsignedinteger]:
        vector = reduced(scale, integers)
        here.plain = vector.tobytes()
        return vector

    def mask(plan: RoundPlan, delta: Mapping[str, NDArray[np.float32]], masks: MaskPlan) -> bytes:
        data = mask_update(plan, delta, masks)
        (folder / sha256(data).hexdigest()).write_bytes(here.plain)
        return data

    SharedScale.reduced = seen  # type: ignore[assignment, method-assign]
    masking.mask_update = mask


def vanishing_link(when: frozenset[tuple[int, str]], act: Callable[[], None]) -> MakeLink:
    """Makes links that lose these messages, each with a round and a kind, and call ``act`` once for each."""
    left = set(when)

    class VanishingLink(Link):
        def publish(
            self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, yielding: bool = False
        ) -> bool:
            if topic.endswith(("/up/secagg", "/up/offer")):
                message = decode_msgpack(decode_msgpack(payload, Envelope).body, dict)
                moment = message["round"], message["type"]
                if moment in left:
                    left.discard(moment)
                    act()
                    return False
            return super().publish(topic, payload, qos=qos, retain=retain, yielding=yielding)

    return VanishingLink


def read_vanish(path: Path | None) -> dict[str, frozenset[tuple[int, str]]]:
    """Read who is to vanish when."""
    moments: dict[str, set[tuple[int, str]]] = {}
    for line in path.read_text().splitlines() if path else ():
        name, number, kind = line.split()
        moments.setdefault(name, set()).add((int(number), kind))
    return {name: frozenset(when) for name, when in moments.items()}


class Runner:
    """One agent, started anew each time it has vanished.

    Args:
        bundle: Its bundle, and the file that it came from.
        trainer: Shared by all of the process.
        when: In which rounds it vanishes, and with which message.
        kill: Whether to kill the process instead of leaving it.
    """

    def __init__(
        self,
        bundle: tuple[Bundle, Path],
        trainer: RandomTrainer,
        when: frozenset[tuple[int, str]],
        *,
        kill: bool,
    ) -> None:
        self._bundle, self._trainer, self._when, self._kill = bundle, trainer, when, kill
        self._again = False
        self._over = False
        self._agent = self._make()

    def run(self) -> None:
        """Take part until :meth:`stop`."""
        while not self._over:
            self._again = False
            self._agent.run()
            if not self._again:
                return
            # Else it would deliver what it had masked: an update on disk outlives its secrets.
            shutil.rmtree(default_state(self._bundle[1]) / "outbox")
            self._agent = self._make()

    def stop(self) -> None:
        """End it."""
        self._over = True
        self._agent.stop()

    def _make(self) -> Agent:
        bundle, path = self._bundle
        able = capabilities(device="cpu", threads=1, samples=1)
        options = Options(default_state(path), telemetry_s=TELEMETRY_S)
        return Agent(bundle, able, self._trainer, options, make_link=vanishing_link(self._when, self._vanish))

    def _vanish(self) -> None:
        if self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self._again = True
        self._when = frozenset(
            (number, kind)
            for number, kind in self._when
            if number > self._agent._session.round  # noqa: SLF001 - to vanish once a round
        )
        self._agent.stop()


def main() -> None:
    """Run the agents until SIGTERM.

    Raises:
        SystemExit: With 1, if one of them fails or torch was imported.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--vanish", type=Path)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--log-level", default="warning")
    parser.add_argument("bundles", type=Path, nargs="+")
    given = parser.parse_args()
    configure(level=given.log_level, form="json")
    record_integers(given.record)
    trainer, vanish = RandomTrainer(), read_vanish(given.vanish)
    bundles = [(read_bundle(path), path) for path in given.bundles]
    runners = [
        Runner(each, trainer, vanish.get(each[0].agent, frozenset()), kill=given.kill) for each in bundles
    ]
    failed: list[BaseException] = []

    def stop(*_: object) -> None:
        for runner in runners:
            runner.stop()

    def run(runner: Runner) -> None:
        try:
            runner.run()
        except BaseException as error:
            failed.append(error)
            stop()
            raise

    signal.signal(signal.SIGTERM, stop)
    threads = [threading.Thread(target=run, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed or "torch" in sys.modules:
        sys.exit(1)


if __name__ == "__main__":
    main()
