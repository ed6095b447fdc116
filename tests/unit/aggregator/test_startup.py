"""aggregator.startup: settings that cannot work are refused before anything is written."""

from pathlib import Path

import msgspec
import pytest

from aggregator.config import AggregatorConfig, ReleaseConfig, RoundsConfig, TaskConfig
from aggregator.privacy_config import PrivacyConfig, SampleConfig
from aggregator.startup import check, settle_task
from aggregator.store import Store
from federation.errors import ConfigError


@pytest.mark.parametrize(
    ("up", "down"), [("sq:16", "sq:4"), ("float32", "full"), ("int8", "float16"), ("topk:0.01", "int8")]
)
def test_encodings_that_can_be_combined(up: str, down: str) -> None:
    check(AggregatorConfig(up_encoding=up, down_encoding=down))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"up_encoding": "full"}, "full"),
        ({"up_encoding": "morse"}, "morse"),
        ({"down_encoding": "morse"}, "morse"),
        ({"down_encoding": "topk:0.01"}, r"down_encoding is 'topk:0\.01', which loses what it leaves out"),
        (
            {"rounds": RoundsConfig(cohort_size=1, min_agents=2)},
            r"rounds\.cohort_size is 1, less than rounds\.min_agents = 2",
        ),
        (
            {"rounds": RoundsConfig(target_accuracy=0.9)},
            r"rounds\.target_accuracy is 0\.9.*set task\.holdout",
        ),
        ({"release": ReleaseConfig(auto=True)}, r"release\.auto is on.*set release\.data or task\.holdout"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_key_and_the_value(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(msgspec.structs.replace(AggregatorConfig(), **settings))


@pytest.mark.parametrize("settings", [{"keep_deltas": 0}, {"keep_deltas": 65}, {"max_noise": -0.1}])
def test_numbers_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, AggregatorConfig)


def test_the_model_of_a_private_run_is_made_for_it(tmp_path: Path) -> None:
    plain = AggregatorConfig(task=TaskConfig(data="digits"))
    private = msgspec.structs.replace(plain, privacy=PrivacyConfig(sample=SampleConfig(epsilon=3.0)))
    with Store(tmp_path / "plain", "f", create=True) as store:
        assert not settle_task(plain, store).dp_ready
        with pytest.raises(ConfigError, match=r"privacy.sample is on, but .* was begun without it"):
            settle_task(private, store)
    with Store(tmp_path / "private", "f", create=True) as store:
        assert settle_task(private, store).dp_ready
        assert settle_task(private, store).dp_ready, "after a restart"
        assert settle_task(plain, store).dp_ready, "the model stays what it was"
