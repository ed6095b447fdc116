"""Agents without torch: real ones in all but the training, many in one process, to load an aggregator.

``python -m benchmarks.light_agents BUNDLE...`` runs one :class:`edge_agent.agent.Agent` per bundle until SIGTERM.
Each answers a plan with the same random delta of the model's shape: what is measured is the road, not the learning.
"""

import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.agent import Agent, Options
from edge_agent.places import default_state
from edge_agent.telemetry import capabilities
from edge_agent.training import Trained
from federation.bundle import read_bundle
from federation.logs import configure
from federation.wire.messages import RoundPlan, TaskSpec, TrainMetrics
from privacy.budget import PrivateRound

SAMPLES = 100

Arrays = dict[str, NDArray[np.float32]]


class RandomTrainer:
    """Makes one random delta and gives it to every agent of the process, so that they share its memory."""

    def __init__(self) -> None:
        self._delta: Arrays = {}
        self._guard = threading.Lock()

    def train(
        self,
        base: Mapping[str, NDArray[np.float32]],
        plan: RoundPlan,
        agent: str,  # noqa: ARG002 - the interface of a trainer
        cancelled: Callable[[], bool],  # noqa: ARG002
        *,
        private: PrivateRound | None = None,  # noqa: ARG002
    ) -> Trained:
        """Return the delta, float32, of the shapes of ``base``."""
        with self._guard:
            if not self._delta:
                random = np.random.default_rng(plan.train.seed)
                self._delta = {
                    name: random.standard_normal(array.shape, np.float32) * np.float32(1e-3)
                    for name, array in base.items()
                }
        metrics = TrainMetrics(loss=0.0, accuracy=0.0, steps=1, train_s=0.0)
        return Trained(self._delta, SAMPLES, metrics)

    def samples(self, task: TaskSpec) -> int:  # noqa: ARG002 - the interface of a trainer
        """As many as it claims."""
        return SAMPLES

    def initial(self, task: TaskSpec, seed: int) -> Arrays:  # noqa: ARG002 - the interface of a trainer
        """Build nothing, which is no version of any model: the full one is fetched."""
        return {}


def main(bundles: Sequence[str]) -> None:
    """Run the agents until SIGTERM.

    Raises:
        SystemExit: With 1, if one of them fails or torch was imported.
    """
    configure(level="warning", form="json")
    trainer = RandomTrainer()
    able = capabilities(device="cpu", threads=1, samples=SAMPLES)
    agents = [
        Agent(read_bundle(bundle), able, trainer, Options(default_state(bundle), telemetry_s=0))
        for bundle in map(Path, bundles)
    ]
    failed: list[BaseException] = []

    def run(agent: Agent) -> None:
        try:
            agent.run()
        except BaseException as error:
            failed.append(error)
            for other in agents:
                other.stop()
            raise

    def stop(*_: object) -> None:
        for agent in agents:
            agent.stop()

    signal.signal(signal.SIGTERM, stop)
    threads = [threading.Thread(target=run, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed or "torch" in sys.modules:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
