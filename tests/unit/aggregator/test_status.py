"""aggregator.status: what devices write about themselves is shown, not obeyed."""

from typing import Any

import pytest

from aggregator.status import Report, RoundStatus
from aggregator.status_view import render

ROUND = RoundStatus(
    round=1,
    phase="open",
    attempt=2,
    cohort=5,
    delivered=1,
    seconds=None,
    train_s=1.5,
    fold_s=None,
    bytes_up=2000,
    loss=None,
    accuracy=0.5,
    evaluate_s=None,
    waiting_for=["pi1", "pi2", "pi3", "pi4"],
)


def report(device: str = "cpu", detail: str = "L2 norm 9, at most 5") -> Report:
    agent: dict[str, Any] = {
        "agent": "pi1",
        "online": True,
        "changed_at": 0.0,
        "capabilities": {"device": device, "samples": 10},
        "telemetry": {"phase": device},
        "upload": None,
        "spent": {"epsilon": 1.234, "delta": 1e-5, "went_back": True},
        "last_round": None,
    }
    refusal = {"round": 1, "agent": "pi1", "code": "norm_too_large", "detail": detail, "at": 0.0}
    decline = {"round": 1, "agent": "pi2", "code": "terms", "reason": f"no masks {device}", "at": 0.0}
    return Report("home", "0" * 16, [ROUND], [agent], [refusal], {"norm_too_large": 1}, [decline])


def test_rounds_agents_and_refusals_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = render(report())
    for part in (
        "home",
        "attempt 2",
        "pi1, pi2, pi3 …",
        "1/5",
        "50.00%",
        "cpu",
        "> 1.23 (1e-05)",
        "norm_too_large 1",
        "at most 5",
        "pi2  terms: no masks",
    ):
        assert part in shown


def test_markup_and_terminal_commands_of_a_device_are_only_text() -> None:
    shown = render(report(device="[/red]", detail="[bold]x[/nothing] \x1b[31m\n\a"))
    assert "[/red]" in shown
    assert "[bold]x[/nothing] ?[31m??" in shown
    assert "\x1b" not in shown
