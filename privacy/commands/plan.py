"""`privacy plan`: what a deployment's privacy takes, in plain words and as settings to paste."""

import math
from typing import Any

import msgspec
from msgspec import Struct

from federation.errors import ConfigError
from federation.task.data import task_from_data
from federation.task.models import build, state_arrays
from federation.task.partition import split_spec
from federation.wire.codec import Schema
from federation.wire.messages import TaskSpec
from privacy.commands.planning import Change, Mechanism, changes_of, mechanism_of
from privacy.commands.question import SECAGG_CLIP_NORM, Question, check
from privacy.commands.secagg_cost import MaskingCost, masking_cost
from privacy.commands.trial import Trial, trial, trial_task
from privacy.distributed import least_agents

STAND_IN = "mnist"
"""Whose images the model is built for where no data is named: a model's size hardly depends on it."""

_LEAST_SUM = 3
_MOST_AGENTS = 4096
"""The aggregator's limit of ``rounds.min_agents``."""


class Plan(Struct, frozen=True, kw_only=True):
    """The answer.

    Attributes:
        question: As asked.
        parameters: Values in the model.
        mechanism: The noise.
        changes: What other choices would need; for samples only.
        masking: Of secure aggregation; None without.
        trial: None without data, or where it was not wanted.
        verdict: ``practical``, ``doubtful`` or ``impractical``.
        toml: Settings of the aggregator.
    """

    question: Question
    parameters: int
    mechanism: Mechanism
    changes: list[Change]
    masking: MaskingCost | None
    trial: Trial | None
    verdict: str
    toml: str


def make_plan(question: Question, *, trial_s: float) -> Plan:
    """Answer a question.

    Args:
        question: Any; it is checked here.
        trial_s: Seconds for the trial; 0 makes none.

    Raises:
        ConfigError: If it is impossible, or the data or the model is unusable.
    """
    check(question)
    task = trial_task(task_from_data(question.data or STAND_IN, question.model), question)
    schema = _schema(task)
    parameters = sum(math.prod(shape) for shape in schema.values())
    mechanism = mechanism_of(question, schema)
    distributed = question.layer == "distributed"
    masking = None
    if question.masked:
        masking = masking_cost(question, schema, mechanism.noise_multiplier if distributed else 0.0)
    return Plan(
        question=question,
        parameters=parameters,
        mechanism=mechanism,
        changes=changes_of(question, parameters) if question.layer == "sample" else [],
        masking=masking,
        trial=trial(question, mechanism, task, limit_s=trial_s) if question.data and trial_s else None,
        verdict=mechanism.verdict,
        toml=toml_of(question, mechanism),
    )


def toml_of(question: Question, mechanism: Mechanism) -> str:
    """Settings for `aggregator serve --config`; a test loads them with the aggregator's own reader."""
    train = question.train
    rounds: dict[str, Any] = {"count": question.rounds, "min_agents": min(question.cohort, _MOST_AGENTS)}
    if question.sampling_rate == 1:
        rounds["cohort_size"] = question.cohort
    else:
        rounds["min_agents"] = min(question.fleet, _MOST_AGENTS)
    tables: dict[str, dict[str, Any]] = {
        "task": {"model": question.model} | ({"data": _data_setting(question)} if question.data else {}),
        "train": {
            "epochs": train.epochs,
            "batch_size": train.batch_size,
            "learning_rate": train.learning_rate,
            "momentum": train.momentum,
        },
        "rounds": rounds,
    }
    promise = {"epsilon": question.epsilon, "delta": question.delta, "clip_norm": question.clip}
    noise = {"noise_multiplier": mechanism.noise_multiplier}
    if question.layer == "sample":
        tables["privacy.sample"] = promise
    elif question.layer == "client":
        tables["privacy.client"] = noise | promise | {"sampling_rate": question.sampling_rate}
    if question.masked:
        left = least_agents(question.cohort, question.dropouts)
        tables["privacy.secagg"] = {
            "enabled": True,
            "modulus_bits": question.modulus_bits,
            "min_agents": max(min(_LEAST_SUM, question.cohort), left),
            "dropouts": question.dropouts,
            "clip_norm": SECAGG_CLIP_NORM,
        }
        if question.layer == "distributed":
            tables["privacy.secagg"] |= noise | promise
    promised = f"epsilon {question.epsilon:g} at delta {question.delta:g} over {question.rounds} rounds"
    lines = [f"# privacy plan: {question.layer}-level, {promised}"]
    for table, values in tables.items():
        lines += ["", f"[{table}]"]
        # Strings, numbers and booleans look the same in JSON and TOML.
        lines += [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _data_setting(question: Question) -> str:
    """Without the share of a trial, which the aggregator has no use for."""
    return split_spec(question.data)[0]


def _schema(task: TaskSpec) -> Schema:
    arrays = state_arrays(build(task))
    if not arrays:
        raise ConfigError(f"model {task.model!r} has no weights: there is nothing to protect")
    return {name: array.shape for name, array in arrays.items()}
