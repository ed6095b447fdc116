"""A quick trial of a plan on data at hand: some rounds of its federation in this process, with and without privacy."""

from __future__ import annotations

import time

import msgspec
import numpy as np
from msgspec import Struct

from federation.task.data import open_data
from federation.task.images import ImageData
from federation.task.models import build, load_arrays, state_arrays
from federation.wire.messages import TaskSpec
from privacy.audit.canaries import answers
from privacy.budget import PrivateRound
from privacy.central import ClientMechanism
from privacy.commands.planning import Mechanism
from privacy.commands.question import Question
from privacy.commands.training import Samples, fit, fit_private

_MOST_DEVICES = 5
"""Devices that are played: more average the noise further, but take longer."""

_MOST_TESTED = 2000


class Trial(Struct, frozen=True, kw_only=True):
    """What it gave.

    Attributes:
        rounds: That were played, of those planned.
        devices: That were played, of the cohort.
        samples: Of each.
        private: Hold-out accuracy with the plan's noise, in [0, 1].
        plain: Of the same rounds without privacy.
        tested: Images of the hold-out.
        seconds: That it took.
    """

    rounds: int
    devices: int
    samples: int
    private: float
    plain: float
    tested: int
    seconds: float


def trial(question: Question, mechanism: Mechanism, task: TaskSpec, *, limit_s: float) -> Trial:
    """Play rounds, the private and the plain one in turn, until all are played or the time is up.

    Each device trains with the plan's batch size, noise and number of steps; where the data has fewer samples than the
    devices will have, on fewer. So both accuracies are those of a federation of a few devices after a few rounds: compare them with
    each other.

    Args:
        question: With data.
        mechanism: Its noise.
        task: Of the data, DP-ready where sample-level privacy needs it.
        limit_s: After which no more round is begun.

    Raises:
        ConfigError: If the data cannot be opened, or the model cannot be trained.
    """
    began = time.monotonic()
    data, hold_out = open_data(question.data, task, train=True), open_data(question.data, task, train=False)
    random = np.random.default_rng(question.train.seed)
    count = min(question.cohort, _MOST_DEVICES)
    size = min(question.samples or len(data), len(data) // count)
    parts = np.split(random.permutation(len(data))[: size * count], count)
    devices = [Samples(data, rows, data.labels[rows]) for rows in parts]
    private = plain = state_arrays(build(task))
    played = 0
    longest = 0.0
    while played < question.rounds and (not played or time.monotonic() - began + longest <= limit_s):
        at = time.monotonic()
        private = _private_round(question, mechanism, task, devices, private, random)
        plain = _plain_round(question, task, devices, plain, random)
        played += 1
        longest = max(longest, time.monotonic() - at)
    tested = random.permutation(len(hold_out))[:_MOST_TESTED]
    return Trial(
        rounds=played,
        devices=count,
        samples=size,
        private=_accuracy(task, private, hold_out, tested),
        plain=_accuracy(task, plain, hold_out, tested),
        tested=len(tested),
        seconds=time.monotonic() - began,
    )


def _private_round(
    question: Question,
    mechanism: Mechanism,
    task: TaskSpec,
    devices: list[Samples],
    base: dict[str, np.ndarray],
    random: np.random.Generator,
) -> dict[str, np.ndarray]:
    if question.layer != "sample":
        return _noisy_round(question, mechanism, task, devices, base, random)
    updates = []
    for device in devices:
        model = build(task)
        load_arrays(model, base)
        rate = min(1.0, question.train.batch_size / len(device))
        private = PrivateRound(mechanism.noise_multiplier, mechanism.clip_norm, rate, mechanism.steps)
        fit_private(model, device.batch, len(device), question.train, private)
        updates.append(_difference(state_arrays(model), base))
    return _moved(base, updates, 1 / len(devices))


def _noisy_round(
    question: Question,
    mechanism: Mechanism,
    task: TaskSpec,
    devices: list[Samples],
    base: dict[str, np.ndarray],
    random: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Few devices are played, but the noise on their mean is that of the whole cohort."""
    clipping = ClientMechanism(
        clip_norm=mechanism.clip_norm,
        noise_multiplier=mechanism.noise_multiplier * len(devices) / question.cohort,
        expected=float(len(devices)),
    )
    updates = [_trained(question, task, device, base, random) for device in devices]
    clipped = [clipping.clip(update)[0] for update in updates]
    total = {name: np.sum([update[name] for update in clipped], axis=0) for name in base}
    mean = clipping.noisy_mean(total)
    return _moved(base, [{name: values.astype(np.float32) for name, values in mean.items()}], 1.0)


def _plain_round(
    question: Question,
    task: TaskSpec,
    devices: list[Samples],
    base: dict[str, np.ndarray],
    random: np.random.Generator,
) -> dict[str, np.ndarray]:
    updates = [_trained(question, task, device, base, random) for device in devices]
    return _moved(base, updates, 1 / len(devices))


def _trained(
    question: Question,
    task: TaskSpec,
    device: Samples,
    base: dict[str, np.ndarray],
    random: np.random.Generator,
) -> dict[str, np.ndarray]:
    model = build(task)
    load_arrays(model, base)
    fit(model, device.batch, len(device), question.train, random)
    return _difference(state_arrays(model), base)


def _difference(new: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: new[name] - base[name] for name in base}


def _moved(
    base: dict[str, np.ndarray], updates: list[dict[str, np.ndarray]], weight: float
) -> dict[str, np.ndarray]:
    moved = {}
    for name, values in base.items():
        mean = np.sum([update[name] for update in updates], axis=0, dtype=np.float32) * np.float32(weight)
        moved[name] = (values + mean).astype(np.float32)
    return moved


def _accuracy(task: TaskSpec, arrays: dict[str, np.ndarray], data: ImageData, rows: np.ndarray) -> float:
    model = build(task)
    load_arrays(model, arrays)
    return answers(model, Samples(data, rows, data.labels[rows]).batch, len(rows)).accuracy


def trial_task(task: TaskSpec, question: Question) -> TaskSpec:
    """The task as the aggregator would publish it: rebuilt for gradients of single samples where DP-SGD needs them."""
    return msgspec.structs.replace(task, dp_ready=question.layer == "sample")
