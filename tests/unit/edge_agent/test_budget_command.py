"""``edge-agent budget``: spent and left, round by round; its exit codes; beside an agent that spends."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.guard import owner_of
from federation.bundle import Bundle, write_bundle
from federation.errors import BudgetExhaustedError, ConfigError, FedgeError, VerificationError
from privacy.accounting import Spend, epsilon_pld
from privacy.ledger import Ledger

BUNDLE = Bundle(
    federation="clinic",
    agent="pi1",
    private_key="01" * 32,
    aggregator_key="02" * 32,
    broker="mqtt://127.0.0.1:1",
    username="pi1",
    password="x",
)
ROUNDS = (Spend(1.1, 0.01, 100), Spend(1.1, 0.01, 100), Spend(1.5, 0.02, 50))
SPENT = epsilon_pld(ROUNDS, 1e-5)


def device(folder: Path, rounds: tuple[Spend, ...] = ROUNDS) -> Ledger:
    """A device that has spent, and still holds its ledger."""
    write_bundle(folder / "pi1.bundle.json", BUNDLE)
    ledger = Ledger.open(folder / "pi1.state" / "ledger", owner_of(BUNDLE))
    for number, spend in enumerate(rounds, 1):
        ledger.reserve(
            spend,
            now=1_750_000_000.0,
            run="ab" * 8,
            round_=number,
            attempt=1,
            model="cd" * 32,
            clip_norm=1.0,
            delta=1e-5,
            data="digits",
        )
    return ledger


def budget(folder: Path, *arguments: str) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(app, ["budget", str(folder / "pi1.bundle.json"), *arguments])
    return done.stdout, None if isinstance(done.exception, SystemExit) else done.exception


def report(folder: Path, *arguments: str) -> dict[str, Any]:
    shown, error = budget(folder, "--json", *arguments)
    assert error is None or isinstance(error, BudgetExhaustedError)
    loaded: dict[str, Any] = json.loads(shown)
    return loaded


def test_it_shows_rounds_totals_and_what_comes_next(tmp_path: Path) -> None:
    ledger = device(tmp_path)  # the agent runs on
    told = report(tmp_path, "--max-epsilon", "3")
    assert (told["device"], told["federation"], told["entries"]) == ("pi1", "clinic", 3)
    assert told["spent"] == SPENT
    assert told["left"] == pytest.approx(3 - SPENT)
    assert told["after_next"] == epsilon_pld([*ROUNDS, ROUNDS[-1]], 1e-5)
    assert told["exhausted"] is False
    assert [row["total"] for row in told["rounds"]] == [epsilon_pld(ROUNDS[:n], 1e-5) for n in (1, 2, 3)]
    assert [row["epsilon"] for row in told["rounds"]] == [epsilon_pld([spend], 1e-5) for spend in ROUNDS]
    shown, error = budget(tmp_path, "--max-epsilon", "3")
    assert error is None
    assert f"spent  epsilon {SPENT:.3f} of 3, in 3 rounds" in shown
    assert f"to {told['after_next']:.3f}" in shown
    assert "2025-06-15 15:06" in shown
    ledger.close()


def test_the_newest_rounds_keep_their_totals(tmp_path: Path) -> None:
    device(tmp_path).close()
    (row,) = report(tmp_path, "--rounds", "1")["rounds"]
    assert (row["entry"], row["total"]) == (3, SPENT)
    assert len(report(tmp_path, "--rounds", "0")["rounds"]) == 3


def test_a_device_that_has_spent_nothing(tmp_path: Path) -> None:
    write_bundle(tmp_path / "pi1.bundle.json", BUNDLE)
    shown, error = budget(tmp_path)
    assert error is None
    assert "spent  epsilon 0.000 of 8, in 0 rounds" in shown
    assert not (tmp_path / "pi1.state").exists(), "it only looks"


@pytest.mark.parametrize(
    ("limit", "why"), [(SPENT * 1.001, "does not fit"), (SPENT / 2, "does not fit"), (0.0, "")]
)
def test_an_exhausted_budget_is_exit_4(tmp_path: Path, limit: float, why: str) -> None:
    device(tmp_path).close()
    shown, error = budget(tmp_path, "--max-epsilon", repr(limit))
    assert isinstance(error, BudgetExhaustedError)
    assert error.exit_code == 4
    assert why in str(error)
    assert "spent  epsilon" in shown, "the table comes first"
    assert report(tmp_path, "--max-epsilon", repr(limit))["exhausted"] is True


def test_a_damaged_ledger_is_exit_5_with_a_remedy(tmp_path: Path) -> None:
    device(tmp_path).close()
    file = tmp_path / "pi1.state" / "ledger" / "entries"
    file.write_bytes(file.read_bytes().replace(b'"steps":50', b'"steps":51'))
    shown, error = budget(tmp_path)
    assert isinstance(error, VerificationError)
    assert error.exit_code == 5
    assert shown == ""
    for part in ("is damaged: line 4", "No image and no model is lost", "move the folder away"):
        assert part in str(error)


@pytest.mark.parametrize("name", ["missing.json", "broken.json"])
def test_a_bundle_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    done = CliRunner().invoke(app, ["budget", str(tmp_path / name)])
    assert isinstance(done.exception, FedgeError | FileNotFoundError)
    assert not isinstance(done.exception, VerificationError | BudgetExhaustedError)
    assert ConfigError.exit_code == 2
