"""federation.config with the aggregator's settings: what is read is what was meant, or the mistake is named."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.config import SECRETS, AggregatorConfig, BrokerConfig, RoundsConfig, TaskConfig
from aggregator.options import parse_settings, without_secrets
from federation.config import describe, load, to_toml
from federation.errors import ConfigError
from federation.logs import configure

SETTINGS = list(describe(AggregatorConfig))
OTHER: dict[str, Any] = {
    "privacy.secagg.modulus_bits": 32,
    "federation": "other",
    "task.labels": ["a", "b"],
    "train.optimizer": "adam",
    "train.momentum": 0.125,
    "release.format": "fp16",
    "release.preprocess": "none",
    "release.widen": 2.5,
}
"""Values that a rule for all settings of a type would not find."""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "fedge.toml"
    file.write_text(text)
    return file


def other_value(key: str, default: object) -> Any:
    if key in OTHER:
        return OTHER[key]
    match default:
        case str():
            return f'{default} "quoted" \\ ä'
        case float():
            return 0.25 if default != 0.25 else 0.5
        case bool():
            return not default
        case int():
            return default + 1
    raise AssertionError(f"{key}: add a value for {type(default).__name__}")


def test_every_setting_says_what_it_does_and_has_a_default() -> None:
    for setting in SETTINGS:
        assert len(setting.text.split()) > 1, setting.key
        assert setting.default is not None, setting.key
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_survives_toml(tmp_path: Path, setting: Any) -> None:
    value = other_value(setting.key, setting.default)
    changed = load(AggregatorConfig, flags={setting.key: value})
    assert changed != AggregatorConfig()
    text = to_toml(changed)
    assert load(AggregatorConfig, file=written(tmp_path, text)) == changed
    (line,) = (line for line in text.splitlines() if line.startswith(f"{setting.key.split('.')[-1]} = "))
    assert line


def test_the_defaults_survive_toml_as_comments(tmp_path: Path) -> None:
    text = to_toml(AggregatorConfig())
    assert load(AggregatorConfig, file=written(tmp_path, text)) == AggregatorConfig()
    assert all(not line or line[0] in "#[" for line in text.splitlines())
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    assert load(AggregatorConfig, file=written(tmp_path, uncommented)) == AggregatorConfig()


@given(text=st.text(), number=st.floats(1e-300, 1e12), labels=st.lists(st.text(max_size=5), max_size=4))
def test_any_text_and_number_survive_toml(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, labels: list[str]
) -> None:
    settings = AggregatorConfig(
        task=TaskConfig(data=text, labels=tuple(labels)), rounds=RoundsConfig(deadline_s=number)
    )
    file = tmp_path_factory.mktemp("toml") / "fedge.toml"
    file.write_text(to_toml(settings), newline="")
    assert load(AggregatorConfig, file=file) == settings


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ('federaton = "x"', "did you mean 'federation'"),
        ("[rounds]\ndeadline = 3", "did you mean 'rounds.deadline_s'"),
        ("[round]\ncount = 3", "did you mean 'rounds'"),
        ("[train]\nlearning-rate = 0.1", "did you mean 'train.learning_rate'"),
        ("[broker]\nusrname = 'x'", "did you mean 'broker.username'"),
        ("zzzzzzzz = 1", "known here: federation"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, suggestion: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=suggestion) as refused:
        load(AggregatorConfig, file=file)
    assert str(file) in str(refused.value)


def test_an_unknown_key_in_a_flag_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'rounds.cuont' in the flags; did you mean 'rounds.count'"):
        load(AggregatorConfig, flags=parse_settings(["rounds.cuont=3"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[rounds]\ncount = 0", "key 'rounds.count'"),
        ("[rounds]\nquorum = 1.5", "key 'rounds.quorum'"),
        ("[rounds]\nquorum = 'half'", "key 'rounds.quorum'"),
        ("rounds = 3", "key 'rounds'"),
        ("federation = 'Upper'", "key 'federation'"),
        ("federation = ", "not valid TOML"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(AggregatorConfig, file=written(tmp_path, text))


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregator init"):
        load(AggregatorConfig, file=tmp_path / "none.toml", missing="`aggregator init` writes one")


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "[broker]\npassword = 'file'\nusername = 'file'\n[rounds]\ncount = 3")
    monkeypatch.setenv("FEDGE_BROKER_PASSWORD", "environment")
    read = load(
        AggregatorConfig, file=file, secrets=SECRETS, flags={"rounds.count": 5, "broker.username": None}
    )
    assert (read.broker.password, read.broker.username, read.rounds.count) == ("environment", "file", 5)
    read = load(AggregatorConfig, file=file, secrets=SECRETS, flags={"broker.password": "flag"})
    assert read.broker.password == "flag"
    monkeypatch.delenv("FEDGE_BROKER_PASSWORD")
    assert load(AggregatorConfig, file=file, secrets=SECRETS).broker.password == "file"


def test_a_password_is_not_written_down() -> None:
    secret = AggregatorConfig(broker=BrokerConfig(username="u", password="hunter2"))
    assert "hunter2" not in to_toml(without_secrets(secret))
    assert without_secrets(secret).broker.username == "u"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a=3", 3),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=['x', 'y']", ["x", "y"]),
        ("a=mnist:/data/x=y", "mnist:/data/x=y"),
        ("a=", ""),
        (" a =cnn", "cnn"),
    ],
)
def test_a_set_flag_is_toml_or_else_text(setting: str, value: object) -> None:
    assert parse_settings([setting]) == {"a": value}


def test_a_set_flag_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_settings(["rounds.count"])


def test_a_flag_into_something_that_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError):
        load(AggregatorConfig, flags=parse_settings(["rounds=3", "rounds.count=4"]))


def test_an_unknown_log_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="use debug, info, warning, error"):
        configure(level="loud")


def test_settings_cannot_be_changed_once_they_are_read() -> None:
    with pytest.raises(AttributeError):
        AggregatorConfig().rounds.count = 3  # type: ignore[misc]
    assert msgspec.structs.replace(AggregatorConfig(), federation="x").federation == "x"
