"""What ``edge-agent budget`` shows: spent and left, round by round, and what one more round would cost."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

from msgspec import Struct

from edge_agent.config import PrivacyLimits
from edge_agent.guard import owner_of
from federation.bundle import read_bundle
from federation.errors import VerificationError
from privacy.accounting import Spend, epsilon_pld, within
from privacy.errors import LedgerError
from privacy.ledger import read_entries
from privacy.ledger_format import Entry


class RoundSpent(Struct, frozen=True, kw_only=True):
    """One entry of the ledger.

    Attributes:
        entry: Its number.
        paid_at: Unix seconds.
        run: Of the plan.
        round: Of the plan.
        attempt: Of the plan.
        noise_multiplier: Of each step.
        clip_norm: Of each step.
        sample_rate: Of each step.
        steps: Paid for.
        epsilon: Of this entry alone.
        total: Of this entry and all before it.
    """

    entry: int
    paid_at: float
    run: str
    round: int
    attempt: int
    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    steps: int
    epsilon: float
    total: float


class BudgetReport(Struct, frozen=True, kw_only=True):
    """What is spent and what is left.

    Attributes:
        federation: Name.
        device: Name.
        max_epsilon: That this device allows in the federation.
        delta: At which every epsilon here is stated: that of the last plan.
        spent: Epsilon of all entries together.
        left: Epsilon up to ``max_epsilon``.
        after_next: Epsilon once a round like the last has been added; None without entries.
        exhausted: Whether such a round would be refused.
        entries: In the ledger.
        rounds: The newest entries, oldest first.
    """

    federation: str
    device: str
    max_epsilon: float
    delta: float
    spent: float
    left: float
    after_next: float | None
    exhausted: bool
    entries: int
    rounds: tuple[RoundSpent, ...]


def collect(bundle: Path, state: Path, limits: PrivacyLimits, newest: int) -> BudgetReport:
    """Read a ledger; the agent may be running.

    Args:
        bundle: The device's.
        state: The agent's state folder.
        limits: Of the device.
        newest: Entries that are listed; 0 for all.

    Raises:
        ConfigError: If the bundle cannot be read.
        VerificationError: If the ledger cannot be trusted.
    """
    identity = read_bundle(bundle)
    try:
        entries = read_entries(state / "ledger", owner_of(identity), clock=time.time)
    except LedgerError as error:
        raise VerificationError(str(error)) from error
    delta = entries[-1].delta if entries else limits.max_delta
    spends = [entry.spend for entry in entries]
    spent = epsilon_pld(spends, delta)
    again = [*spends, entries[-1].spend] if entries else []
    return BudgetReport(
        federation=identity.federation,
        device=identity.agent,
        max_epsilon=limits.max_epsilon,
        delta=delta,
        spent=spent,
        left=max(0.0, limits.max_epsilon - spent),
        after_next=epsilon_pld(again, delta) if entries else None,
        exhausted=not limits.max_epsilon or not within(again, delta, limits.max_epsilon),
        entries=len(entries),
        rounds=_rounds(entries, delta, newest),
    )


def _rounds(entries: Sequence[Entry], delta: float, newest: int) -> tuple[RoundSpent, ...]:
    first = max(0, len(entries) - newest) if newest else 0
    before: list[Spend] = [entry.spend for entry in entries[:first]]
    shown = entries[first:]
    totals = accumulate(([entry.spend] for entry in shown), initial=before)
    next(totals)
    return tuple(
        RoundSpent(
            entry=entry.number,
            paid_at=entry.time,
            run=entry.run,
            round=entry.round,
            attempt=entry.attempt,
            noise_multiplier=entry.noise_multiplier,
            clip_norm=entry.clip_norm,
            sample_rate=entry.sample_rate,
            steps=entry.steps,
            epsilon=epsilon_pld([entry.spend], delta),
            total=epsilon_pld(spends, delta),
        )
        for entry, spends in zip(shown, totals, strict=True)
    )


def render(report: BudgetReport) -> str:
    """Lay a report out for a terminal."""
    lines = [
        f"privacy budget of {report.device} in federation {report.federation}, at delta {report.delta:g}",
        f"spent  epsilon {report.spent:.3f} of {report.max_epsilon:g}, in {report.entries} rounds paid for",
        f"left   epsilon {report.left:.3f}",
    ]
    if report.after_next is not None:
        more = report.after_next - report.spent
        lines.append(f"next   one more round like the last: +{more:.3f}, to {report.after_next:.3f}")
    if not report.rounds:
        return "\n".join(lines)
    lines += ["", "entry  paid (UTC)        run       round  noise     rate      steps    epsilon  total"]
    for row in report.rounds:
        paid = datetime.fromtimestamp(row.paid_at, UTC).strftime("%Y-%m-%d %H:%M")
        lines.append(
            f"{row.entry:<5}  {paid}  {row.run[:8]}  {row.round:<5}  {row.noise_multiplier:<8g}  {row.sample_rate:<8g}  "
            f"{row.steps:<7}  {row.epsilon:<7.3f}  {row.total:.3f}"
        )
    return "\n".join(lines)


def exhausted_text(report: BudgetReport) -> str:
    """What to tell an operator whose device trains no more."""
    return (
        f"the privacy budget is exhausted: epsilon {report.spent:.3g} of {report.max_epsilon:g} is spent, and one more "
        f"round like the last does not fit: this device declines such rounds. Nothing is lost. Leave it so, or start the "
        "agent with a larger --max-epsilon if the owners of the data agree"
    )
