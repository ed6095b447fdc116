"""What a federation learns under sample-level privacy, per epsilon of each device, beside published centralized figures.

Ledger, trainer and averaging are the product's, round after round in one process; the broker is left out.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from aggregator.strategies import Accumulator, FedAvg
from benchmarks.rounds import AGENTS
from benchmarks.runner import Options, Results, say
from benchmarks.simulation import Arrays, plan_of
from benchmarks.subset import folder as mnist_folder
from edge_agent.config import PrivacyLimits
from edge_agent.guard import Guard
from edge_agent.training import TorchTrainer
from federation.logs import configure
from federation.task.data import open_data, task_from_data
from federation.task.evaluate import evaluate
from federation.task.models import SCATTERING, build, load_arrays
from federation.wire.codec import schema_of
from federation.wire.messages import RoundPlan, TaskSpec, TrainSpec
from federation.wire.terms import PrivacyTerms, SampleTerms
from privacy.ledger import Owner
from privacy.ledger_format import ledger_key

DELTA = 1e-5
CLIP_NORM = 1.0
BATCH = 1_200
"""A tenth of a device's images: a round of one epoch is ten steps."""

LAST_ROUNDS = 3
"""Accuracy is the mean over these."""

SEEDS = (1, 2, 3)
PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Target:
    """What is aimed at, and how.

    Attributes:
        key: Of the figure.
        epsilon: Of each device, for the whole run.
        rounds: Of one epoch.
        learning_rate: Of plain SGD on the devices.
        published: Figures of others.
    """

    key: str
    epsilon: float
    rounds: int
    learning_rate: float
    published: str


TARGETS = (
    Target("top1_eps1", 1.2, 24, 3.0, "Opacus 94.6 at 1.16"),
    Target("top1_eps3", 3.0, 40, 4.0, "Opacus 96.8 at 2.91; Tramer and Boneh's CNN 98.1"),
    Target("top1_eps7", 7.0, 60, 4.0, "Opacus 97.1 at 6.86"),
)
"""The published ones: one data set of 60,000 in one place, where each device has 12,000 here. Opacus: its example for MNIST; Tramer and
Boneh, ICLR 2021, table 1, CNN on images."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        top1: Test accuracy, mean over the last rounds, percent.
        epsilon: That the ledger which spent most tells at the end.
    """

    top1: float
    epsilon: float


def simulate(data: str, target: Target, seed: int) -> Outcome:
    """Do one run."""
    import torch

    torch.set_num_threads(1)
    configure(level="warning")
    task = msgspec.structs.replace(task_from_data(data, SCATTERING), dp_ready=True)
    trainers = [
        TorchTrainer(f"{data}@iid,agent={agent}/{AGENTS},seed={seed}", device="cpu", threads=1)
        for agent in range(1, AGENTS + 1)
    ]
    test, judge = open_data(data, task, train=False), build(task)
    model: Arrays = trainers[0].initial(task, seed)
    accuracies, spent = [], 0.0
    with TemporaryDirectory(prefix="fedge-dp-") as ledgers:
        guards = [guard_of(Path(ledgers, str(agent)), f"agent-{agent}") for agent in range(AGENTS)]
        for number in range(1, target.rounds + 1):
            plan = plan_for(task, target, number, seed)
            total = Accumulator(schema_of(model))
            for agent, (trainer, guard) in enumerate(zip(trainers, guards, strict=True)):
                paid = guard.reserve(plan, trainer.samples(task))
                assert paid is not None
                spent = max(spent, paid.spent.epsilon)
                trained = trainer.train(model, plan, f"agent-{agent}", lambda: False, private=paid.private)
                total.add(trained.delta, 1.0)
            change = FedAvg().change(total.mean())
            model = {name: value + change[name].astype(np.float32) for name, value in model.items()}
            if number > target.rounds - LAST_ROUNDS:
                load_arrays(judge, model)
                accuracies.append(100 * evaluate(judge, test).accuracy)
        for guard in guards:
            guard.close()
    return Outcome(mean(accuracies), spent)


def guard_of(folder: Path, agent: str) -> Guard:
    """A device's guard, with a budget larger than any run asks for."""
    owner = Owner(federation="bench", device=agent, key=ledger_key(b"", "bench", agent))
    return Guard(folder, owner, PrivacyLimits(max_epsilon=100.0, max_delta=DELTA), data="mnist")


def plan_for(task: TaskSpec, target: Target, number: int, seed: int) -> RoundPlan:
    """The plan of a round."""
    train = TrainSpec(epochs=1, batch_size=BATCH, learning_rate=target.learning_rate, momentum=0.0, seed=seed)
    terms = SampleTerms(clip_norm=CLIP_NORM, delta=DELTA, rounds=target.rounds, epsilon=target.epsilon)
    return msgspec.structs.replace(plan_of(number, task, train), privacy=PrivacyTerms(sample=terms))


def measure_accuracy(options: Options, results: Results) -> None:
    """The part ``accuracy`` of ``python -m benchmarks.dp``."""
    where = mnist_folder()
    if where is None:
        say(
            "accuracy is compared on MNIST only: set FEDGE_DATA to a folder with mnist/MNIST/raw in it. Left out"
        )
        return
    data = f"mnist:{where}"
    targets = [target for target in TARGETS if target.key == "top1_eps3" or not options.quick]
    seeds = SEEDS[:1] if options.quick else SEEDS
    say(f"accuracy: {SCATTERING}, {AGENTS} agents, 12,000 MNIST images each, delta {DELTA:g}, seeds {seeds}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        runs = {target: [pool.submit(simulate, data, target, seed) for seed in seeds] for target in targets}
        for target, futures in runs.items():
            done = [future.result() for future in futures]
            top1 = [outcome.top1 for outcome in done]
            epsilon = max(outcome.epsilon for outcome in done)
            results.add(
                target.key,
                mean(top1),
                "%",
                f"epsilon {target.epsilon:g} per device ({epsilon:.3f} in its ledger), {target.rounds} rounds; standard deviation "
                f"{pstdev(top1):.2f} over {len(seeds)} seeds. {target.published}",
            )
