import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aggregator.config import AggregatorConfig
from aggregator.promises import check_promises
from federation.config import load
from federation.errors import ConfigError
from privacy.accounting import Spend, epsilon_pld
from privacy.budget import Limits, Terms, plan_round
from privacy.cli import app
from privacy.commands.plan import Plan, make_plan
from privacy.commands.plan_text import text
from privacy.commands.question import Layer, Question
from privacy.distributed import least_agents

LAYERS = [
    Question(epsilon=3, samples=1000),
    Question(epsilon=3, samples=1000, secagg=True, cohort=12),
    Question(layer="client", epsilon=8, cohort=20, rounds=50),
    Question(layer="client", epsilon=4, cohort=1000, devices=20_000, rounds=20),
    Question(layer="distributed", epsilon=8, cohort=60, rounds=5, modulus_bits=8),
]


def planned(question: Question) -> Plan:
    return make_plan(question, trial_s=0)


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("question", LAYERS, ids=lambda question: f"{question.layer}-{question.cohort}")
def test_the_settings_load_in_the_aggregator(question: Question, tmp_path: Path) -> None:
    found = planned(question)
    file = tmp_path / "fedge.toml"
    file.write_text(found.toml)
    config = load(AggregatorConfig, file=file)
    check_promises(config)
    sample, client, secagg = config.privacy.sample, config.privacy.client, config.privacy.secagg
    assert (sample.epsilon > 0) == (question.layer == "sample")
    assert client.noise_multiplier == (found.mechanism.noise_multiplier if question.layer == "client" else 0)
    assert secagg.enabled == question.masked
    if question.layer == "distributed":
        assert (secagg.noise_multiplier, secagg.epsilon) == (found.mechanism.noise_multiplier, 8)
        assert secagg.min_agents == least_agents(60, question.dropouts)
    assert config.rounds.count == question.rounds
    assert client.sampling_rate == question.sampling_rate


@pytest.mark.parametrize("question", LAYERS, ids=lambda question: f"{question.layer}-{question.cohort}")
def test_the_whole_run_stays_within_epsilon_and_is_told(question: Question) -> None:
    found = planned(question)
    mechanism = found.mechanism
    assert 0.9 * question.epsilon < mechanism.epsilon <= question.epsilon
    assert mechanism.by_round[question.rounds] == mechanism.epsilon
    assert mechanism.by_round[1] == mechanism.epsilon_round < mechanism.epsilon
    if question.layer != "distributed":
        spends = [
            Spend(mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps * question.rounds)
        ]
        assert mechanism.epsilon == epsilon_pld(spends, question.delta)
    said = text(found)
    assert f"{mechanism.noise_multiplier:g}" in said
    assert found.toml.rstrip() in said


def test_a_device_would_train_as_planned() -> None:
    question = Question(epsilon=3, samples=1000)
    mechanism = planned(question).mechanism
    terms = Terms("run", 1, 10, 1.0, question.delta, 3.0, 0.0, 32, 1, 0)
    private = plan_round(terms, [], Limits(8.0, 1e-3), 1000)
    assert (private.noise_multiplier, private.sample_rate, private.steps, private.clip_norm) == (
        mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps, mechanism.clip_norm,
    )  # fmt: skip


def test_client_level_privacy_of_few_devices_is_called_impractical() -> None:
    found = planned(LAYERS[2])
    noise = found.mechanism.noise_multiplier
    assert found.mechanism.noise_share == pytest.approx(noise * math.sqrt(found.parameters) / 20)
    assert found.mechanism.noise_share > 50
    assert found.verdict == "impractical"
    assert "Not practical" in text(found)
    assert planned(LAYERS[3]).verdict == "practical"


def test_masking_is_counted_in_bytes_and_time() -> None:
    masking = planned(LAYERS[1]).masking
    assert masking is not None
    assert masking.neighbours == 11
    assert masking.threshold == 8
    assert masking.tolerated == 4
    assert masking.vector_bytes == 2 * masking.values >= masking.float32_bytes / 2
    assert masking.vector_bytes < masking.up_bytes < 1.1 * masking.vector_bytes
    assert masking.device_s > 0
    assert masking.aggregator_dropouts_s > masking.aggregator_s > 0
    assert planned(LAYERS[0]).masking is None


def test_a_trial_tells_what_privacy_costs() -> None:
    question = Question(epsilon=8, samples=400, cohort=3, rounds=1, data="digits")
    trial = make_plan(question, trial_s=1).trial
    assert trial is not None
    assert (trial.rounds, trial.devices, trial.samples) == (1, 3, 400)
    assert 0 <= trial.private <= 1
    assert trial.plain > 0.1


def test_noise_on_updates_is_tried_too() -> None:
    question = Question(layer="client", epsilon=1, delta=1e-3, cohort=3, rounds=2, data="digits")
    found = make_plan(question, trial_s=0.01)
    assert found.trial is not None
    assert found.trial.rounds == 1
    assert "after 1 of 2 rounds" in text(found)


def test_the_command_prints_json_and_writes_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "fedge.toml"
    shown: dict[str, Any] = json.loads(plan("--epsilon", "3", "--samples", "1000", "--json", "-o", str(file)))
    assert shown["toml"] == file.read_text()
    assert shown["mechanism"]["steps"] == 31
    with pytest.raises(ConfigError, match="exists"):
        plan("--epsilon", "3", "--samples", "1000", "-o", str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "0", "--samples", "100"], "--epsilon 0 would let nothing be learned"),
        (["--epsilon", "-1", "--samples", "100"], "choose one above 0"),
        (["--epsilon", "nan", "--samples", "100"], "choose one above 0"),
        (["--epsilon", "99", "--samples", "100"], "protects nobody"),
        (["--epsilon", "3"], "--samples is missing"),
        (["--epsilon", "3", "--samples", "20"], "--batch-size 32 is more than the 20 samples"),
        (["--epsilon", "3", "--samples", "200", "--delta", "0.01"], "not below 1 / 200 samples"),
        (["--epsilon", "3", "--samples", "200", "--delta", "0"], "must lie between 0 and 1"),
        (["--epsilon", "3", "--samples", "200", "--layer", "both"], "known are sample, client, distributed"),
        (["--epsilon", "3", "--samples", "200", "--epochs", "0"], "--epochs 0 cannot be"),
        (["--epsilon", "3", "--samples", "200", "--lr", "0"], "--lr 0.0 cannot be"),
        (["--epsilon", "3", "--samples", "200", "--devices", "50"], "only with --layer client"),
        (["--epsilon", "3", "--samples", "200", "--secagg", "--cohort", "2"], "the sum of so few"),
        (["--epsilon", "3", "--layer", "client", "--secagg"], "use --layer distributed"),
        (["--epsilon", "3", "--layer", "client", "--devices", "4"], "cannot be drawn"),
        (["--epsilon", "3", "--layer", "client", "--cohort", "20", "--delta", "0.1"], "below 1 / 20 devices"),
        (["--epsilon", "3", "--layer", "distributed", "--devices", "500"], "secret draw"),
        (["--epsilon", "1e-7", "--layer", "client"], "no noise gives epsilon 1e-07"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_with_the_remedy(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        plan(*arguments)


def test_every_layer_has_words() -> None:
    from privacy.commands.plan_text import _WHO

    assert set(_WHO) == set(Layer.__args__)  # type: ignore[attr-defined]
