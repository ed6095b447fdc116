"""aggregator.central_noise: paid for before it is announced, never twice, never beyond the budget."""

from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from aggregator.central_noise import CentralNoise
from aggregator.central_report import client_privacy
from aggregator.config import AggregatorConfig, RoundsConfig
from aggregator.privacy_config import ClientConfig, PrivacyConfig
from aggregator.records import StoredVersion
from aggregator.round_noise import noisy_rounds
from aggregator.store import Store
from federation.errors import BudgetExhaustedError, ConfigError
from federation.wire.terms import ClientTerms
from privacy.accounting import Spend, epsilon_pld

BASE = "0" * 64
SCHEMA = {"w": (100, 9), "b": (100,)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state", "garden", create=True)


def config(**client: float) -> AggregatorConfig:
    settings = {"noise_multiplier": 2.0, "epsilon": 8.0, "clip_norm": 0.5} | client
    return AggregatorConfig(
        rounds=RoundsConfig(count=10), privacy=PrivacyConfig(client=ClientConfig(**settings))
    )


def open_round(noise: CentralNoise, store: Store, number: int, *, closed: bool = True) -> None:
    noise.open(number, SCHEMA, wanted=5, online=5)
    store.open_round(number, 1, ("pi1", "pi2"), base=BASE, encoding="float32", deadline_s=1.0)
    if not closed:
        return
    version = StoredVersion(f"{number:064x}", "full")
    of_round = noise.of_round(number)
    if of_round is not None:
        of_round.begin(SCHEMA)
        of_round.keep(version)
    store.close_round(number, 0.1, version)


def test_without_noise_nothing_is_paid_or_promised(store: Store) -> None:
    noise = CentralNoise(config(noise_multiplier=0.0), store)
    noise.check()
    open_round(noise, store, 1)
    assert (noise.budget(), noise.draw, noise.of_round(1), noisy_rounds(store)) == (None, None, None, [])
    assert noise.terms(1, 1).client is None
    assert client_privacy(store) is None


def test_a_round_is_paid_for_once_however_often_it_is_opened(store: Store) -> None:
    noise = CentralNoise(config(), store)
    open_round(noise, store, 1, closed=False)
    noise.open(1, SCHEMA, wanted=3, online=2)  # its second attempt, or after a restart
    (paid,) = noisy_rounds(store)
    assert (paid.round, paid.noise_multiplier, paid.clip_norm, paid.expected) == (1, 2.0, 0.5, 5.0)
    assert paid.spend == Spend(2.0, 1.0, 1)


def test_a_round_that_was_paid_for_but_never_opened_is_paid_for_anew_with_what_is_true_now(
    store: Store,
) -> None:
    noise = CentralNoise(config(), store)
    noise.open(1, SCHEMA, wanted=5, online=5)
    noise.open(1, SCHEMA, wanted=7, online=7)
    assert [paid.expected for paid in noisy_rounds(store)] == [7.0]


def test_a_new_run_in_the_same_folder_pays_again_and_forgets_nothing(store: Store) -> None:
    noise = CentralNoise(config(), store)
    open_round(noise, store, 1)
    open_round(noise, store, 2, closed=False)
    store.begin_run()
    open_round(noise, store, 2)
    assert [paid.round for paid in noisy_rounds(store)] == [1, 2, 2]
    report = client_privacy(store)
    assert report is not None
    assert report.epsilon == epsilon_pld([Spend(2.0, 1.0, 3)], 1e-5)


def test_the_divisor_is_known_before_anybody_delivers(store: Store) -> None:
    drawn = CentralNoise(config(sampling_rate=0.1), store)
    drawn.open(1, SCHEMA, wanted=2, online=300)
    assert noisy_rounds(store)[0].expected == pytest.approx(30.0)
    drawn.open(1, SCHEMA, wanted=0, online=3)
    assert noisy_rounds(store)[0].expected == 1.0, "fewer than one device would enlarge an update"


def test_the_budget_names_the_last_round_and_the_payment_is_refused_after_it(store: Store) -> None:
    limit = epsilon_pld([Spend(2.0, 1.0, 3)], 1e-5)
    noise = CentralNoise(config(epsilon=limit), store)
    budget = noise.budget()
    assert budget is not None
    assert budget.last_round == 3
    assert "round 4 would exceed privacy.client.epsilon" in budget.reason
    for number in (1, 2):
        open_round(noise, store, number)
    again = CentralNoise(config(epsilon=limit), store).budget()
    assert again is not None
    assert again.last_round == 3, "after a restart too"
    open_round(noise, store, 3)
    with pytest.raises(BudgetExhaustedError, match=r"round 4 would exceed privacy\.client\.epsilon"):
        noise.open(4, SCHEMA, wanted=5, online=5)
    assert len(noisy_rounds(store)) == 3
    report = client_privacy(store)
    assert report is not None
    assert report.exhausted
    assert report.epsilon <= limit < report.next_epsilon
    assert (
        f"after 3 rounds\n  the budget is spent: one more round would make {report.next_epsilon:.3g}\n"
        in report.to_text()
    )


def test_an_interrupted_round_is_counted_once(store: Store) -> None:
    limit = epsilon_pld([Spend(2.0, 1.0, 2)], 1e-5)
    noise = CentralNoise(config(epsilon=limit), store)
    open_round(noise, store, 1, closed=False)
    budget = CentralNoise(config(epsilon=limit), store).budget()
    assert budget is not None
    assert budget.last_round == 2


def test_rounds_of_other_noise_count_with_theirs(store: Store) -> None:
    open_round(CentralNoise(config(noise_multiplier=1.5), store), store, 1)
    open_round(CentralNoise(config(noise_multiplier=4.0, sampling_rate=0.5), store), store, 2)
    report = client_privacy(store)
    assert report is not None
    assert report.epsilon == epsilon_pld([Spend(1.5, 1.0, 1), Spend(4.0, 0.5, 1)], 1e-5)
    assert report.known_cohorts_epsilon == pytest.approx(
        epsilon_pld([Spend(1.5, 1.0, 1), Spend(4.0, 1.0, 1)], 1e-5)
    )
    assert "against whoever reads the plans" in report.to_text()


def test_whoever_knows_the_cohorts_is_told_the_rounds_of_the_device_that_was_drawn_most(
    store: Store,
) -> None:
    noise = CentralNoise(config(sampling_rate=0.1), store)
    for number, cohort in enumerate([("a",), ("b",), ("a", "b"), (), ("a",)], 1):
        noise.open(number, SCHEMA, wanted=len(cohort), online=20)
        store.open_round(number, 1, cohort, base=BASE, encoding="float32", deadline_s=1.0)
    report = client_privacy(store)
    assert report is not None
    assert report.known_cohorts_epsilon == pytest.approx(epsilon_pld([Spend(2.0, 1.0, 3)], 1e-5))
    assert report.epsilon < (report.known_cohorts_epsilon or 0.0)


def test_a_budget_that_pays_for_no_round_is_refused_with_the_noise_that_would_do(store: Store) -> None:
    with pytest.raises(
        ConfigError, match=r"one round .* costs 1\.99 .* takes a noise_multiplier of"
    ) as error:
        CentralNoise(config(epsilon=0.5), store).check()
    enough = float(str(error.value).rsplit(maxsplit=1)[-1])
    CentralNoise(config(epsilon=0.5, noise_multiplier=enough), store).check()
    budget = CentralNoise(config(epsilon=0.5, noise_multiplier=enough), store).budget()
    assert budget is not None
    assert budget.last_round == 10


def test_a_budget_for_which_no_noise_is_enough_is_refused_too(store: Store) -> None:
    with pytest.raises(ConfigError, match="no noise is enough for 10 rounds; raise epsilon"):
        CentralNoise(config(epsilon=1e-7), store).check()


def test_a_spent_budget_is_no_error_at_start(store: Store) -> None:
    noise = CentralNoise(config(epsilon=epsilon_pld([Spend(2.0, 1.0, 1)], 1e-5)), store)
    open_round(noise, store, 1)
    noise.check()
    budget = noise.budget()
    assert budget is not None
    assert budget.last_round == 1


def test_a_model_that_learned_without_noise_gets_no_promise(store: Store) -> None:
    open_round(CentralNoise(config(noise_multiplier=0.0), store), store, 1)
    with pytest.raises(ConfigError, match=r"rounds of .* \(first 1\) had no noise"):
        CentralNoise(config(), store).check()


@pytest.mark.parametrize("closed", [True, False])
def test_noise_that_a_former_run_paid_for_is_not_that_of_a_round_of_the_same_number(
    closed: bool, store: Store
) -> None:
    noisy, plain = CentralNoise(config(), store), CentralNoise(config(noise_multiplier=0.0), store)
    open_round(noisy, store, 1)
    open_round(noisy, store, 2, closed=False)
    store.begin_run()
    noisy.check()
    open_round(plain, store, 2, closed=closed)
    plain.check()
    report = client_privacy(store)
    assert report is not None
    assert report.bare_rounds == 1
    assert "not counted: 1 round that had no noise" in report.to_text()
    with pytest.raises(ConfigError, match=r"\(first 2\) had no noise" if closed else "set them back"):
        noisy.check()


@pytest.mark.parametrize(
    ("opened", "now"),
    [
        ({}, {"noise_multiplier": 1.9}),
        ({}, {"noise_multiplier": 0.0}),
        ({"noise_multiplier": 0.0}, {}),
        ({}, {"sampling_rate": 0.5}),
    ],
)
def test_an_open_round_keeps_what_it_has_promised(
    opened: dict[str, float], now: dict[str, float], store: Store
) -> None:
    open_round(CentralNoise(config(**opened), store), store, 1, closed=False)
    CentralNoise(config(**opened), store).check()
    with pytest.raises(ConfigError, match=r"round 1 is open and was announced with .*set them back"):
        CentralNoise(config(**now), store).check()


def test_plans_tell_the_present_clip_norm_which_follows_the_updates(store: Store) -> None:
    noise = CentralNoise(config(quantile=0.5), store)
    open_round(noise, store, 1, closed=False)
    terms = noise.terms(1, 1).client
    assert terms == ClientTerms(clip_norm=0.5, noise_multiplier=2.0, epsilon=8.0, delta=1e-5)
    of_round = noise.of_round(1)
    assert of_round is not None
    of_round.begin({"w": (2,)})
    of_round.keep(StoredVersion("2" * 64, "full"))
    store.close_round(1, 0.1, StoredVersion("2" * 64, "full"))
    open_round(noise, store, 2)
    (first, second) = noisy_rounds(store)
    assert first.next_clip_norm not in (None, 0.5)
    assert second.clip_norm == first.next_clip_norm
    later = noise.terms(2, 1).client
    assert later == msgspec.structs.replace(terms, clip_norm=second.clip_norm)
    report = client_privacy(store)
    assert report is not None
    assert report.clip_norm == second.next_clip_norm


def test_what_is_about_to_be_named_is_remembered(store: Store) -> None:
    noise = CentralNoise(config(), store)
    open_round(noise, store, 1, closed=False)
    of_round = noise.of_round(1)
    assert of_round is not None
    assert of_round.kept() is None
    of_round.begin({"w": (2,)})
    of_round.keep(StoredVersion("2" * 64, "sq:4"))
    later = CentralNoise(config(), store).of_round(1)
    assert later is not None
    assert later.kept() == StoredVersion("2" * 64, "sq:4")


@pytest.mark.parametrize(
    ("sample", "client", "equal"), [(0.0, 0.0, False), (1.0, 0.0, True), (0.0, 1.0, True)]
)
def test_under_any_terms_all_updates_weigh_the_same(
    sample: float, client: float, equal: bool, store: Store
) -> None:
    settings = config(noise_multiplier=client)
    privacy = msgspec.structs.replace(
        settings.privacy, sample=msgspec.structs.replace(settings.privacy.sample, noise_multiplier=sample)
    )
    assert CentralNoise(msgspec.structs.replace(settings, privacy=privacy), store).equal == equal


@pytest.mark.parametrize(("devices", "warned"), [(62, 1), (64, 0)])
def test_noise_in_which_nothing_can_be_learned_is_told_once(devices: int, warned: int, store: Store) -> None:
    """1,000 values and z = 2: the noise on the mean has an L2 norm of 63.2 C / n."""
    with capture_logs() as logs:
        noise = CentralNoise(config(), store)
        for number in (1, 2):
            noise.open(number, SCHEMA, wanted=devices, online=devices)
    told = [entry for entry in logs if entry["event"] == "noise_exceeds_updates"]
    assert len(told) == warned
    assert all(entry["noise_l2"] == pytest.approx(0.51, abs=0.005) for entry in told)
