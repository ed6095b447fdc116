"""What a device refuses to mask, and what a masked update is made of."""

import msgspec
import numpy as np
import pytest
from memory_federation import SHAPES, TASK, base_arrays

from edge_agent.guard import TermsUnfitError
from edge_agent.masking import ROUNDING_OF_EARLIER_ROUNDS, check_promise, mask_update
from federation.errors import ConfigError
from federation.wire.codec import schema_of
from federation.wire.masking import scale_of
from federation.wire.messages import FullModel, RoundPlan, TrainSpec
from federation.wire.terms import PrivacyTerms, SecAggTerms
from federation.wire.transfer import make_ref
from privacy.distributed import epsilon_of, least_agents
from privacy.rounded_sum import NoisySum
from privacy.secagg.masks import MaskPlan

SCHEMA = schema_of(base_arrays())
TERMS = SecAggTerms(
    clip_norm=0.5,
    modulus_bits=8,
    min_agents=3,
    dropouts=0.3,
    rotation_seed=bytes(16),
    noise_multiplier=2.0,
    epsilon=8.0,
    delta=1e-5,
)


def plan_of(terms: SecAggTerms | None = TERMS, *, number: int = 1, size: int = 10) -> RoundPlan:
    return RoundPlan(
        run="0" * 16,
        round=number,
        attempt=1,
        task=TASK,
        train=TrainSpec(),
        base="1" * 64,
        full=FullModel(version="1" * 64, object=make_ref(b"model", 64)),
        deltas=(),
        up_encoding=f"masked:{terms.modulus_bits}" if terms else "float32",
        max_noise=0.0,
        cohort=tuple(f"pi{index}" for index in range(size)),
        deadline_s=60.0,
        issued_at=0.0,
        upload_chunk_bytes=1024,
        privacy=PrivacyTerms(secagg=terms),
    )


def epsilon_after(plan: RoundPlan) -> float:
    scale = scale_of(plan, SCHEMA)
    each = NoisySum.of(noise_multiplier=2.0, clip_norm=0.5, step=scale.step, largest=scale.largest)
    return epsilon_of({each: plan.round}, 1e-5)


def test_without_noise_there_is_nothing_to_check() -> None:
    check_promise(plan_of(None), SCHEMA)
    quiet = msgspec.structs.replace(TERMS, noise_multiplier=0.0, epsilon=0.0, modulus_bits=16)
    check_promise(plan_of(quiet), SCHEMA)


def test_a_promise_holds_until_the_rounds_have_used_it_up() -> None:
    last = max(number for number in range(1, 50) if epsilon_after(plan_of(number=number)) <= 8.0)
    assert last > 2
    for number in range(1, last + 1):
        check_promise(plan_of(number=number), SCHEMA)
    with pytest.raises(TermsUnfitError, match=f"promises epsilon 8 at delta 1e-05, but {last + 2} rounds"):
        check_promise(plan_of(number=last + 2), SCHEMA)


def test_a_hair_more_is_let_pass_since_earlier_rounds_may_have_been_cheaper() -> None:
    epsilon = epsilon_after(plan_of(number=3))
    for share, passes in ((1.01, True), (1.01 * ROUNDING_OF_EARLIER_ROUNDS, False)):
        plan = plan_of(msgspec.structs.replace(TERMS, epsilon=epsilon / share), number=3)
        if passes:
            check_promise(plan, SCHEMA)
        else:
            with pytest.raises(TermsUnfitError):
                check_promise(plan, SCHEMA)


def test_a_later_attempt_that_promises_too_much_is_not_masked() -> None:
    liar = plan_of(msgspec.structs.replace(TERMS, noise_multiplier=0.05))
    with pytest.raises(TermsUnfitError, match="this device takes no part"):
        mask_update(liar, base_arrays(), MaskPlan([]))


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    plan = msgspec.structs.replace(plan_of(), up_encoding="masked:16")
    with pytest.raises(ConfigError, match="the plan's encoding is 'masked:16'"):
        mask_update(plan, base_arrays(), MaskPlan([]))


def test_the_share_of_the_noise_is_in_what_is_masked() -> None:
    """Without masks, and with an update that is zero, what goes out is the noise alone."""
    schema = {"w": (60_000,)}
    plan = plan_of()
    zero = {"w": np.zeros(schema["w"], dtype=np.float32)}
    scale = scale_of(plan, schema)
    noise = np.frombuffer(mask_update(plan, zero, MaskPlan([])), dtype=np.int8).astype(np.float64)
    assert noise.size == scale.size
    expected = (2.0 * 0.5 / scale.step) ** 2 / least_agents(10, 0.3)
    # 62,000 values: the variance is known to 0.6 %.
    assert noise.var() == pytest.approx(expected, rel=0.04)
    assert abs(noise.mean()) < 6 * np.sqrt(expected / noise.size)
    again = mask_update(plan, zero, MaskPlan([]))
    assert not np.array_equal(np.frombuffer(again, dtype=np.int8), noise), "noise is new each time"


def test_without_noise_the_integers_give_the_update_back() -> None:
    terms = msgspec.structs.replace(TERMS, noise_multiplier=0.0, epsilon=0.0, delta=0.0, modulus_bits=32)
    plan = plan_of(terms)
    delta = {name: array * np.float32(0.001) for name, array in base_arrays().items()}
    scale = scale_of(plan, SCHEMA)
    data = np.frombuffer(mask_update(plan, delta, MaskPlan([])), dtype=scale.dtype)
    back = scale.mean(data, bytes(16), 1)
    assert {name: array.shape for name, array in back.items()} == SHAPES
    for name, array in delta.items():
        np.testing.assert_allclose(back[name], array, atol=1e-7)
