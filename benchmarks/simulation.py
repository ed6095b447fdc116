"""A federation without processes and broker: the product's trainer, codec and averaging, round after round.

What travels is encoded and decoded as frames, so their length is exact and what they lose is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from aggregator.strategies import Accumulator, FedAvg
from aggregator.versions import WHOLE
from benchmarks.rounds import AGENTS
from edge_agent.feedback import Feedback, FeedbackKey
from edge_agent.training import TorchTrainer
from federation.logs import configure
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.data import open_data, task_from_data
from federation.task.evaluate import evaluate
from federation.task.models import CNN, build, load_arrays
from federation.wire.codec import decode, encode, schema_of
from federation.wire.encodings import encoding_named
from federation.wire.messages import FullModel, ObjectRef, RoundPlan, TaskSpec, TrainSpec
from federation.wire.noise import noise_bounds
from federation.wire.versions import apply_delta

LAST_ROUNDS = 3
"""Accuracy is the mean over these: the test images that a single model gets right vary by 0.1 points."""

_NOBODY, _NOWHERE = "0" * 16, "0" * 64

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One run.

    Attributes:
        up: Encoding of the updates.
        down: Encoding of the global model's change, or ``full``.
        partition: How the images are divided: ``iid`` or ``shards(2)``.
        seed: Of the division, the initial model, the order of the images and the rounding.
        rounds: How many, of one epoch each.
        max_noise: As the aggregator's setting.
        data: Data spec without partition.
    """

    up: str
    down: str
    partition: str
    seed: int
    rounds: int
    max_noise: float
    data: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        top1: Test accuracy, mean over the last rounds, percent.
        early_top1: After a third of the rounds, percent.
        up_bytes: Of one agent's update, mean over agents and rounds.
        down_bytes: Of the global model's change, or of the whole model; mean over rounds.
    """

    top1: float
    early_top1: float
    up_bytes: float
    down_bytes: float


class Federation:
    """Five agents with their shares, and all that does not depend on encodings.

    Args:
        data: Data spec without partition.
        partition: How it is divided.
        seed: See :class:`Setting`.
    """

    def __init__(self, data: str, partition: str, seed: int) -> None:
        self._seed = seed
        self._task = task_from_data(data, CNN)
        shares = [f"{data}@{partition},agent={agent}/{AGENTS},seed={seed}" for agent in range(1, AGENTS + 1)]
        self._trainers = [TorchTrainer(share, device="cpu", threads=1) for share in shares]
        self._test = open_data(data, self._task, train=False)
        self._model = build(self._task, seed=seed)
        self._initial = self._trainers[0].initial(self._task, seed)
        self._first: list[tuple[Arrays, int]] = []

    def run(self, setting: Setting) -> Outcome:
        """Train for some rounds."""
        with TemporaryDirectory(prefix="fedge-simulation-") as folder:
            uplinks = [Uplink(setting.up, Path(folder, str(agent))) for agent in range(AGENTS)]
            return self._run(setting, uplinks)

    def _run(self, setting: Setting, uplinks: Sequence["Uplink"]) -> Outcome:
        model: Arrays = self._initial
        up, down, top1 = [], [], []
        for number in range(1, setting.rounds + 1):
            total = Accumulator(schema_of(model))
            for agent, (delta, samples) in enumerate(self._train(model, number)):
                rng = np.random.default_rng([self._seed, number, agent])
                # As the aggregator's plan has it: errors of agents are independent, and average out.
                noise = noise_bounds(model, delta, setting.max_noise * AGENTS)
                frame = uplinks[agent].send(delta, rng, noise)
                total.add(decode(frame, schema_of(model), setting.up), float(samples))
                up.append(len(frame))
            change = {name: mean.astype(np.float32) for name, mean in FedAvg().change(total.mean()).items()}
            if setting.down == WHOLE:
                model = {name: value + change[name] for name, value in model.items()}
                info = CheckpointInfo(federation="bench", round=number, task=self._task)
                down.append(len(checkpoint_bytes(info, model)))
            else:
                noise = noise_bounds(model, change, setting.max_noise)
                rng = np.random.default_rng([self._seed, number, AGENTS])
                frame = encode(change, setting.down, rng, noise)
                model = apply_delta(model, frame, setting.down)
                down.append(len(frame))
            top1.append(self._top1(model) if number in _evaluated(setting.rounds) else float("nan"))
        return Outcome(
            top1=float(np.mean(top1[-LAST_ROUNDS:])),
            early_top1=top1[_early(setting.rounds) - 1],
            up_bytes=float(np.mean(up)),
            down_bytes=float(np.mean(down)),
        )

    def _train(self, model: Arrays, number: int) -> list[tuple[Arrays, int]]:
        if number == 1 and self._first:  # all runs begin with the same model, so with the same updates
            return self._first
        plan = plan_of(number, self._task, TrainSpec(seed=self._seed))
        trained = [
            trainer.train(model, plan, f"agent-{agent}", lambda: False)
            for agent, trainer in enumerate(self._trainers, 1)
        ]
        updates = [(each.delta, each.samples) for each in trained]
        if number == 1:
            self._first = updates
        return updates

    def _top1(self, model: Arrays) -> float:
        load_arrays(self._model, model)
        return 100 * evaluate(self._model, self._test).accuracy


class Uplink:
    """What a device does with its updates: encodes them, with error feedback where the encoding needs it.

    Args:
        encoding: Of the updates.
        folder: Of this device alone.
    """

    def __init__(self, encoding: str, folder: Path) -> None:
        self._encoding = encoding
        self._feedback = Feedback(folder) if encoding_named(encoding).stateful else None
        self._key = FeedbackKey(run=_NOBODY, model=CNN, encoding=encoding, private=False)

    def send(self, update: Arrays, rng: np.random.Generator, noise: Mapping[str, float]) -> bytes:
        """The frame of an update, which the aggregator takes."""
        if self._feedback is None:
            return encode(update, self._encoding, rng, noise)
        corrected = self._feedback.corrected(update, self._key)
        frame = encode(corrected, self._encoding, rng, noise)
        sent = decode(frame, schema_of(corrected), self._encoding)
        digest = sha256(frame).hexdigest()
        self._feedback.stage(digest, self._key, {name: corrected[name] - sent[name] for name in corrected})
        self._feedback.settle(digest, accepted=True)
        return frame


def simulate(setting: Setting) -> Outcome:
    """Do one run. Runs of one partition and seed, one after the other in one process, share their beginning."""
    configure(level="warning")
    return _federation(setting.data, setting.partition, setting.seed).run(setting)


@lru_cache(maxsize=1)
def _federation(data: str, partition: str, seed: int) -> Federation:
    return Federation(data, partition, seed)


def _evaluated(rounds: int) -> set[int]:
    return {_early(rounds), *range(rounds - LAST_ROUNDS + 1, rounds + 1)}


def _early(rounds: int) -> int:
    return max(rounds // 3, 1)


def plan_of(number: int, task: TaskSpec, train: TrainSpec) -> RoundPlan:
    """A round of a run of nobody."""
    nothing = ObjectRef(sha256=_NOWHERE, length=1, chunk_bytes=64, digests=bytes(16))
    return RoundPlan(
        run=_NOBODY,
        round=number,
        attempt=1,
        task=task,
        train=train,
        base=_NOWHERE,
        full=FullModel(version=_NOWHERE, object=nothing),
        deltas=(),
        up_encoding="float32",
        max_noise=0.0,
        cohort=("agent",),
        deadline_s=1.0,
        issued_at=0.0,
        upload_chunk_bytes=64,
    )
