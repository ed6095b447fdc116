"""aggregator.status: what devices write about themselves is shown, not obeyed."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from releases import add_release, in_order, share_between

from aggregator.releases.records import ReleaseState
from aggregator.releases.rollout_events import Announce, Mark
from aggregator.releases.store import ReleaseStore
from aggregator.status import Report, RoundStatus, collect
from aggregator.status_view import render
from aggregator.store import Store
from federation.errors import ReleaseFault
from federation.wire.predictions import ModelState
from federation.wire.release import Channel, ReleaseReport, RolloutState

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


def test_releases_and_the_devices_that_follow_them_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    names = in_order("home", 2, ["pi1", "pi2", "pi3"])
    with Store(tmp_path / "state", "home", create=True) as database:
        store = ReleaseStore(database)
        for _ in range(2):
            add_release(store, tmp_path)
        share = share_between("home", 2, names[1], names[2])
        store.carry_out(
            [
                Announce(Channel.STABLE, 1, 1.0, 10),
                Mark(1, ReleaseState.STABLE, "released to all devices at once"),
                Announce(Channel.CANARY, 2, share, 20),
                Mark(2, ReleaseState.CANARY, "released as a canary"),
            ]
        )
        model = ModelState(
            installed_version="1",
            latest_version="2",
            in_progress=False,
            title="home",
            online=True,
            session="1" * 16,
        )
        for name in names:
            store.record_model(name, model)
        report = ReleaseReport(
            session="1" * 16,
            number=2,
            sha256="b" * 64,
            manifest=20,
            state=RolloutState.ROLLED_BACK,
            time=1.0,
            fault=ReleaseFault.TOO_SLOW,
            detail="9 ms, at most 5 \x1b[31m[/red]",
            running=1,
        )
        store.record_report(names[0], report)
        old = msgspec.structs.replace(report, manifest=19)
        store.record_report(names[1], old)
    collected = collect(tmp_path / "state")
    stable, canary = collected.releases
    assert (stable.state, stable.share, stable.devices, stable.waiting) == ("stable", 1.0, 1, 1)
    assert (canary.devices, canary.confirmed, canary.failed, canary.waiting) == (2, 0, 1, 1)
    assert canary.faults == {"too_slow": 1}, "of this attempt, not of an earlier one"
    device = next(row for row in collected.followers if row.agent == names[0])
    assert (device.running, device.release, device.state, device.fault) == (1, 2, "rolled_back", "too_slow")
    decoded = json.loads(collected.to_json())
    assert [row["number"] for row in decoded["releases"]] == [1, 2]
    shown = render(collected)
    for part in (
        "too_slow 1",
        "2 rolled_back",
        "int8",
        "90.00%",
        "released as a canary",
        "9 ms, at most 5 ?[31m[/red]",
    ):
        assert part in shown
    assert "\x1b" not in shown
