"""aggregator.masked_noise: paid for before it is announced, for the costliest attempt, never beyond the budget."""

from pathlib import Path

import pytest
from memory_federation import TASK, base_arrays

from aggregator.config import AggregatorConfig, RoundsConfig
from aggregator.masked_noise import MaskedNoise, distributed_privacy, noisy_sum, paid_rounds
from aggregator.privacy_config import PrivacyConfig, SecAggConfig
from aggregator.promises import terms_of
from aggregator.records import StoredVersion
from aggregator.store import Store
from federation.errors import BudgetExhaustedError, ConfigError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.wire.codec import schema_of
from federation.wire.messages import FullModel, RoundPlan, TrainSpec
from federation.wire.transfer import make_ref
from privacy.distributed import epsilon_of
from privacy.rounded_sum import NoisySum

BASE = "0" * 64
SCHEMA = schema_of(base_arrays())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "state", "garden", create=True)
    write_model(store, 0)
    return store


def write_model(store: Store, number: int) -> None:
    info = CheckpointInfo(federation="garden", round=number, task=TASK)
    store.write_checkpoint(number, checkpoint_bytes(info, base_arrays()))


def config(*, count: int = 10, **secagg: object) -> AggregatorConfig:
    settings = {"enabled": True, "noise_multiplier": 2.0, "epsilon": 8.0, "clip_norm": 0.5} | secagg
    return AggregatorConfig(
        rounds=RoundsConfig(count=count, min_agents=3),
        privacy=PrivacyConfig(secagg=SecAggConfig(**settings)),  # type: ignore[arg-type]
    )


def plan_of(
    settings: AggregatorConfig, store: Store, number: int, *, attempt: int = 1, size: int = 3
) -> RoundPlan:
    return RoundPlan(
        run=store.run,
        round=number,
        attempt=attempt,
        task=TASK,
        train=TrainSpec(),
        base=BASE,
        full=FullModel(version=BASE, object=make_ref(b"model", 64)),
        deltas=(),
        up_encoding=f"masked:{settings.privacy.secagg.modulus_bits}",
        max_noise=0.0,
        cohort=tuple(f"pi{index}" for index in range(size)),
        deadline_s=60.0,
        issued_at=0.0,
        upload_chunk_bytes=1024,
        privacy=terms_of(settings, store.run, number, attempt),
    )


def open_round(
    settings: AggregatorConfig,
    store: Store,
    number: int,
    *,
    attempt: int = 1,
    size: int = 3,
    closed: bool = True,
) -> None:
    plan = plan_of(settings, store, number, attempt=attempt, size=size)
    MaskedNoise(settings, store).pay(plan)
    store.open_round(number, attempt, plan.cohort, base=BASE, encoding=plan.up_encoding, deadline_s=1.0)
    if closed:
        write_model(store, number)
        store.close_round(number, 0.1, StoredVersion("1" * 64, "full"))


def cost(settings: AggregatorConfig, size: int = 3) -> NoisySum:
    terms = terms_of(settings, "0" * 16, 1, 1).secagg
    assert terms is not None
    return noisy_sum(terms, SCHEMA, size)


def test_without_noise_nothing_is_paid_or_promised(store: Store) -> None:
    for settings in (config(noise_multiplier=0.0), config(enabled=False, noise_multiplier=0.0)):
        noise = MaskedNoise(settings, store)
        noise.check()
        noise.pay(plan_of(settings, store, 1))
        assert noise.budget() is None
    assert not paid_rounds(store)
    assert distributed_privacy(store) is None


def test_a_round_is_paid_for_once_for_its_costliest_attempt(store: Store) -> None:
    settings = config(modulus_bits=8)
    dear, cheap = cost(settings, 60), cost(settings, 3)
    assert epsilon_of([dear], 1e-5) > epsilon_of([cheap], 1e-5), "a larger cohort needs a coarser grid"
    open_round(settings, store, 1, closed=False)
    assert [row.sum for row in paid_rounds(store)] == [cheap]
    open_round(settings, store, 1, attempt=2, size=60, closed=False)
    assert [row.sum for row in paid_rounds(store)] == [dear]
    open_round(settings, store, 1, attempt=3, size=3)
    assert [row.sum for row in paid_rounds(store)] == [dear]


def test_a_round_that_was_paid_for_but_never_opened_is_paid_for_anew(store: Store) -> None:
    settings = config(modulus_bits=8)
    MaskedNoise(settings, store).pay(plan_of(settings, store, 1, size=60))
    MaskedNoise(settings, store).pay(plan_of(settings, store, 1, size=5))
    assert [row.sum for row in paid_rounds(store)] == [cost(settings, 5)]


def test_a_new_run_in_the_same_folder_forgets_nothing(store: Store) -> None:
    settings = config()
    open_round(settings, store, 1)
    store.begin_run()
    open_round(settings, store, 2)
    report = distributed_privacy(store)
    assert report is not None
    assert report.paid_rounds == 2
    assert report.epsilon == epsilon_of([cost(settings)] * 2, 1e-5)


def test_the_budget_names_the_last_round_and_payment_is_refused_after_it(store: Store) -> None:
    limit = epsilon_of([cost(config())] * 3, 1e-5)
    settings = config(epsilon=limit)
    budget = MaskedNoise(settings, store).budget()
    assert budget is not None
    assert budget.last_round == 3
    assert "round 4 would exceed privacy.secagg.epsilon" in budget.reason
    for number in (1, 2):
        open_round(settings, store, number)
    again = MaskedNoise(settings, store).budget()
    assert again is not None
    assert again.last_round == 3, "after a restart too"
    open_round(settings, store, 3)
    with pytest.raises(BudgetExhaustedError, match=r"round 4 would exceed privacy\.secagg\.epsilon"):
        MaskedNoise(settings, store).pay(plan_of(settings, store, 4))
    report = distributed_privacy(store)
    assert report is not None
    assert report.exhausted
    assert report.epsilon <= limit < report.next_epsilon
    text = report.to_text()
    assert f"epsilon {limit:.3g} of {limit:g} at delta 1e-05 after 3 rounds" in text
    assert f"the budget is spent: one more round would make {report.next_epsilon:.3g}" in text


def test_an_interrupted_round_is_counted_once(store: Store) -> None:
    settings = config(epsilon=epsilon_of([cost(config())] * 2, 1e-5))
    open_round(settings, store, 1, closed=False)
    budget = MaskedNoise(settings, store).budget()
    assert budget is not None
    assert budget.last_round == 2


def test_rounds_of_other_noise_count_with_theirs(store: Store) -> None:
    loud, faint = config(noise_multiplier=3.0), config(noise_multiplier=1.0)
    open_round(loud, store, 1)
    open_round(faint, store, 2)
    report = distributed_privacy(store)
    assert report is not None
    assert report.epsilon == epsilon_of([cost(loud), cost(faint)], 1e-5)
    assert report.noise_multiplier == 1.0


def test_a_budget_that_pays_for_no_round_is_refused_with_the_noise_that_would_do(store: Store) -> None:
    with pytest.raises(
        ConfigError, match=r"one round .* costs 2\.\d+ .* takes a noise_multiplier of"
    ) as error:
        MaskedNoise(config(epsilon=0.5), store).check()
    enough = float(str(error.value).rsplit(maxsplit=1)[-1])
    settings = config(epsilon=0.5, noise_multiplier=enough)
    MaskedNoise(settings, store).check()
    budget = MaskedNoise(settings, store).budget()
    assert budget is not None
    assert budget.last_round == 10


def test_a_spent_budget_is_no_error_at_start(store: Store) -> None:
    settings = config(epsilon=epsilon_of([cost(config())], 1e-5))
    open_round(settings, store, 1)
    MaskedNoise(settings, store).check()
    budget = MaskedNoise(settings, store).budget()
    assert budget is not None
    assert budget.last_round == 1


def test_a_model_that_learned_without_noise_gets_no_promise(store: Store) -> None:
    open_round(config(noise_multiplier=0.0), store, 1)
    with pytest.raises(ConfigError, match=r"1 rounds of .* \(first 1\) had no noise"):
        MaskedNoise(config(), store).check()
