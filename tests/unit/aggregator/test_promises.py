"""aggregator.promises: settings of privacy that contradict each other are refused at start, with the remedy."""

import msgspec
import pytest

from aggregator.config import AggregatorConfig
from aggregator.startup import check
from federation.errors import ConfigError


def settings(**values: object) -> AggregatorConfig:
    table: dict[str, object] = {}
    for key, value in values.items():
        *path, name = key.split("__")
        place = table
        for part in path:
            place = place.setdefault(part, {})  # type: ignore[assignment]
        place[name] = value
    return msgspec.convert(table, AggregatorConfig)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"privacy__sample__epsilon": 3.0, "privacy__sample__noise_multiplier": 1.0},
            r"privacy\.sample\.epsilon and privacy\.sample\.noise_multiplier are both set",
        ),
        (
            {"privacy__secagg__enabled": True, "privacy__client__noise_multiplier": 1.0},
            r"privacy\.client\.noise_multiplier needs single updates, which privacy\.secagg hides",
        ),
        ({"privacy__secagg__noise_multiplier": 1.0}, r"set privacy\.secagg\.enabled = true"),
        (
            {"privacy__secagg__enabled": True, "privacy__secagg__modulus_bits": 8},
            r"modulus_bits = 8 leaves too few steps .* set 16, or privacy\.secagg\.noise_multiplier",
        ),
        (
            {"privacy__secagg__enabled": True, "rounds__cohort_size": 2},
            r"cohort_size is 2, less than privacy\.secagg\.min_agents = 3: .* set rounds\.cohort_size to at least 3",
        ),
        (
            {
                "privacy__secagg__enabled": True,
                "privacy__secagg__dropouts": 0.2,
                "rounds__cohort_size": 10,
                "rounds__over_selection": 0.3,
            },
            r"over_selection is 0\.3: .* privacy\.secagg\.dropouts allows 20%; set it to 0\.25 at most",
        ),
        (
            {"privacy__client__sampling_rate": 0.1},
            r"sampling_rate is 0\.1, but client-level privacy is off: set privacy\.client\.noise_multiplier",
        ),
        (
            {"privacy__client__quantile": 0.5},
            r"quantile is 0\.5, but client-level privacy is off: set privacy\.client\.noise_multiplier",
        ),
        (
            {
                "privacy__client__noise_multiplier": 1.0,
                "privacy__client__sampling_rate": 0.1,
                "rounds__cohort_size": 5,
            },
            r"rounds\.cohort_size is 5 and privacy\.client\.sampling_rate is 0\.1: a secret draw has no fixed size",
        ),
        (
            {
                "privacy__client__noise_multiplier": 1.0,
                "privacy__client__sampling_rate": 0.1,
                "rounds__over_selection": 0.5,
            },
            r"rounds\.over_selection is 0\.5 and privacy\.client\.sampling_rate is 0\.1",
        ),
    ],
)
def test_contradictions_are_refused_with_the_keys_and_the_remedy(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(settings(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"privacy__sample__epsilon": 3.0},
        {"privacy__client__noise_multiplier": 1.0, "rounds__cohort_size": 5, "rounds__over_selection": 0.5},
        {"privacy__client__noise_multiplier": 1.0, "privacy__client__sampling_rate": 0.1},
        {"privacy__client__noise_multiplier": 1.0, "privacy__client__quantile": 0.5},
        {"privacy__secagg__enabled": True, "privacy__sample__epsilon": 3.0},
        {
            "privacy__secagg__enabled": True,
            "privacy__secagg__noise_multiplier": 1.0,
            "privacy__secagg__modulus_bits": 8,
        },
    ],
)
def test_what_goes_together_is_taken(values: dict[str, object]) -> None:
    check(settings(**values))
