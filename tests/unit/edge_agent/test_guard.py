"""The guard: from a plan to a paid round, and every way in which it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.config import PrivacyLimits
from edge_agent.guard import Guard, TermsUnfitError, owner_of
from federation.bundle import Bundle
from federation.errors import BudgetExhaustedError, ConfigError, VerificationError
from federation.wire.messages import FullModel, RoundPlan, TaskSpec, TrainSpec
from federation.wire.terms import PrivacyTerms, SampleTerms
from federation.wire.transfer import make_ref
from privacy.ledger import Owner, read_entries
from privacy.ledger_format import ledger_key

OWNER = Owner("clinic", "pi1", ledger_key(b"s" * 32, "clinic", "pi1"))
SAMPLES = 6000
PLAN = RoundPlan(
    run="0" * 16,
    round=1,
    attempt=2,
    task=TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,)),
    train=TrainSpec(batch_size=32),
    base="b" * 64,
    full=FullModel(version="b" * 64, object=make_ref(b"model" * 20, 64)),
    deltas=(),
    up_encoding="float32",
    max_noise=0.0,
    cohort=("pi1",),
    deadline_s=600.0,
    issued_at=1_750_000_000.0,
    upload_chunk_bytes=64,
)


def plan(round_: int = 1, *, rounds: int = 5, **terms: Any) -> RoundPlan:
    given = {"clip_norm": 1.0, "delta": 1e-5, "rounds": rounds, "epsilon": 2.0} | terms
    sample = msgspec.convert(given, SampleTerms)
    return msgspec.structs.replace(PLAN, round=round_, privacy=PrivacyTerms(sample=sample))


def guard(
    folder: Path, limits: PrivacyLimits | None = None, *, clock: float = PLAN.issued_at, owner: Owner = OWNER
) -> Guard:
    return Guard(folder, owner, limits or PrivacyLimits(), data="digits", clock=lambda: clock)


def test_a_plan_without_terms_for_samples_costs_nothing(tmp_path: Path) -> None:
    assert guard(tmp_path / "ledger").reserve(PLAN, SAMPLES) is None
    assert not (tmp_path / "ledger").exists()


def test_what_is_told_is_what_is_on_disk(tmp_path: Path) -> None:
    paid = guard(tmp_path).reserve(plan(), SAMPLES)
    assert paid is not None
    (entry,) = read_entries(tmp_path, OWNER)
    assert entry.spend == paid.private.spend
    assert (entry.run, entry.round, entry.attempt, entry.model) == (PLAN.run, 1, PLAN.attempt, PLAN.base)
    assert (entry.data, entry.clip_norm, entry.delta) == ("digits", 1.0, 1e-5)
    spent = paid.spent
    assert (spent.entry, spent.steps, spent.noise_multiplier) == (1, entry.steps, entry.noise_multiplier)
    assert 0 < spent.epsilon == spent.round_epsilon < 2.0
    assert spent.head == (tmp_path / "entries").read_text().splitlines()[-1].split()[0]


def test_a_target_is_kept_over_restarts_and_repeated_rounds(tmp_path: Path) -> None:
    last = None
    for round_ in (1, 2, 2, 3, 4, 5):
        one = guard(tmp_path)
        last = one.reserve(plan(round_), SAMPLES)
        one.close()
    assert last is not None
    assert 1.9 < last.spent.epsilon <= 2.0
    with pytest.raises(BudgetExhaustedError, match="of 2 is spent"):
        guard(tmp_path).reserve(plan(5), SAMPLES)
    assert len(read_entries(tmp_path, OWNER)) == 6, "a refusal costs nothing"


def test_the_device_has_the_last_word(tmp_path: Path) -> None:
    one = guard(tmp_path, PrivacyLimits(max_epsilon=0.5))
    with pytest.raises(BudgetExhaustedError, match=r"this device allows 0\.5"):
        one.reserve(plan(epsilon=0.0, noise_multiplier=0.6), SAMPLES)
    assert one.reserve(plan(epsilon=0.0, noise_multiplier=4.0), SAMPLES) is not None, "it goes on with less"


@pytest.mark.parametrize(("terms", "samples"), [({"delta": 1e-4}, SAMPLES), ({}, 31)])
def test_terms_that_do_not_fit_are_told_apart(tmp_path: Path, terms: dict[str, Any], samples: int) -> None:
    with pytest.raises(TermsUnfitError):
        guard(tmp_path).reserve(plan(**terms), samples)


def test_a_ledger_of_another_device_pays_for_nothing(tmp_path: Path) -> None:
    other = guard(tmp_path)
    other.reserve(plan(), SAMPLES)
    other.close()
    stranger = Owner("clinic", "pi2", ledger_key(b"t" * 32, "clinic", "pi2"))
    with pytest.raises(VerificationError, match="'pi1' in federation 'clinic'"):
        guard(tmp_path, owner=stranger).reserve(plan(), SAMPLES)


def test_a_ledger_in_use_is_tried_again_in_the_next_round(tmp_path: Path) -> None:
    first, second = guard(tmp_path), guard(tmp_path)
    assert first.reserve(plan(1), SAMPLES) is not None
    with pytest.raises(VerificationError, match="in use"):
        second.reserve(plan(1), SAMPLES)
    first.close()
    assert second.reserve(plan(2), SAMPLES) is not None


def test_a_full_disk_is_told_and_mended(tmp_path: Path) -> None:
    one = guard(tmp_path)
    assert one.reserve(plan(1), SAMPLES) is not None
    assert one._ledger is not None
    os.dup2(os.open("/dev/full", os.O_WRONLY), one._ledger._file)
    with pytest.raises(ConfigError, match="no space left"):
        one.reserve(plan(2), SAMPLES)
    paid = one.reserve(plan(3), SAMPLES)
    assert paid is not None
    assert paid.spent.entry == 2


def test_a_clock_that_runs_ahead_does_not_lock_the_ledger(tmp_path: Path) -> None:
    ahead = guard(tmp_path, clock=PLAN.issued_at + 1e8)
    ahead.reserve(plan(1), SAMPLES)
    ahead.close()
    assert guard(tmp_path).reserve(plan(2), SAMPLES) is not None


def test_every_device_and_federation_has_a_key_of_its_own() -> None:
    fields: dict[str, Any] = {
        "aggregator_key": "0" * 64,
        "broker": "mqtt://127.0.0.1:1",
        "username": "x",
        "password": "x",
    }
    owners = [
        owner_of(Bundle(federation=federation, agent=agent, private_key=key * 32, **fields))
        for federation in ("clinic", "farm")
        for agent in ("pi1", "pi2")
        for key in ("01", "02")
    ]
    assert len({owner.key for owner in owners}) == len(owners)


def test_an_agent_that_waits_has_not_loaded_the_mathematics() -> None:
    code = "import sys, edge_agent.agent; sys.exit(bool({'scipy', 'dp_accounting'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
