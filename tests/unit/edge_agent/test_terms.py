"""edge_agent.terms: a plan below what the device requires is objected to, and the objection says why."""

import msgspec
import pytest

from edge_agent.terms import describe, objection, parse_requirement
from federation.errors import ConfigError
from federation.wire.terms import ClientTerms, PrivacyTerms, SampleTerms, SecAggTerms

NOTHING = PrivacyTerms()
SAMPLE = PrivacyTerms(sample=SampleTerms(clip_norm=1.0, delta=1e-5, rounds=10, epsilon=3.0))
NOISE = PrivacyTerms(sample=SampleTerms(clip_norm=1.0, delta=1e-5, rounds=10, noise_multiplier=1.0))
CLIENT = PrivacyTerms(client=ClientTerms(clip_norm=1.0, noise_multiplier=1.0, epsilon=6.0, delta=1e-6))
MASKED = PrivacyTerms(
    secagg=SecAggTerms(clip_norm=1.0, modulus_bits=16, min_agents=5, dropouts=0.3, rotation_seed=bytes(16))
)
assert MASKED.secagg is not None
DISTRIBUTED = PrivacyTerms(
    secagg=msgspec.structs.replace(MASKED.secagg, noise_multiplier=1.0, epsilon=4.0, delta=1e-5)
)
ALL = {
    "nothing": NOTHING,
    "sample": SAMPLE,
    "noise": NOISE,
    "client": CLIENT,
    "masked": MASKED,
    "both": DISTRIBUTED,
}


def accepted_by(text: str, max_epsilon: float = 8.0) -> set[str]:
    requirement = parse_requirement(text)
    return {name for name, terms in ALL.items() if not objection(terms, [requirement], max_epsilon)}


@pytest.mark.parametrize(
    ("text", "plans"),
    [
        ("sample-dp", {"sample", "noise"}),
        ("sample-dp eps<=8", {"sample", "noise"}),
        ("sample-dp eps<=3", {"sample"}),
        ("sample-dp eps<=2.9", set()),
        ("sample-dp delta<=1e-6", set()),
        ("client-dp eps<=6", {"client", "both"}),
        ("client-dp eps<=5 delta<=1e-5", {"both"}),
        ("client-dp delta<=1e-6", {"client"}),
        ("distributed-dp", {"both"}),
        ("secagg", {"masked", "both"}),
        ("secagg n>=5", {"masked", "both"}),
        ("secagg n>=6", set()),
    ],
)
def test_what_meets_a_requirement(text: str, plans: set[str]) -> None:
    assert accepted_by(text) == plans


def test_what_the_device_never_exceeds_counts_for_a_plan_that_states_noise_only() -> None:
    assert accepted_by("sample-dp eps<=2", max_epsilon=2.0) == {"sample", "noise"}


def test_all_requirements_must_be_met() -> None:
    required = [parse_requirement("sample-dp eps<=3"), parse_requirement("secagg")]
    both = PrivacyTerms(sample=SAMPLE.sample, secagg=MASKED.secagg)
    assert not objection(both, required, 8.0)
    assert "'secagg'" in objection(SAMPLE, required, 8.0)
    assert "'sample-dp eps<=3'" in objection(MASKED, required, 8.0)


def test_without_requirements_any_plan_will_do() -> None:
    assert not any(objection(terms, [], 8.0) for terms in ALL.values())


def test_an_objection_names_requirement_value_and_what_the_plan_states() -> None:
    text = objection(SAMPLE, [parse_requirement("sample-dp eps<=2")], 8.0)
    assert "'sample-dp eps<=2'" in text
    assert "eps 3" in text
    assert describe(SAMPLE) in text
    assert "no privacy terms" in objection(NOTHING, [parse_requirement("secagg")], 8.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown layer"),
        ("sampel-dp", "did you mean 'sample-dp'"),
        ("sample-dp eps<8", "eps<=NUMBER"),
        ("sample-dp n>=3", "no bound of sample-dp"),
        ("secagg n<=3", "n>=NUMBER"),
        ("sample-dp eps<=much", "not a number"),
        ("sample-dp eps<=0", "never be met"),
        ("sample-dp eps<=nan", "never be met"),
    ],
)
def test_a_slip_in_a_requirement_is_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.require") as caught:
        parse_requirement(text)
    assert said in str(caught.value)
