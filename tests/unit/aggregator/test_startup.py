"""aggregator.startup: settings that cannot work are refused before anything is written."""

import msgspec
import pytest

from aggregator.config import AggregatorConfig, RoundsConfig
from aggregator.startup import check
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
