"""What training up to a round has cost, as a release says it: the most, over everybody who took part.

A release tells an epsilon only if *all* rounds that made its model were private. One round without noise, and the figure of the
others would mean nothing for the model that comes out; then the release tells none, and whoever makes it is told why.
"""

from collections.abc import Collection

import msgspec

from aggregator.masked_noise import paid_rounds
from aggregator.round_noise import bare_rounds, noisy_rounds
from aggregator.store import Store
from federation.wire.release import ReleasePrivacy
from federation.wire.terms import Spent
from privacy.accounting import epsilon_pld
from privacy.distributed import epsilon_of


def privacy_of(store: Store, number: int) -> tuple[ReleasePrivacy | None, str]:
    """What the model after a round has cost in privacy.

    Where devices and the aggregator both add noise, the client-level figure is told: it hides whole devices, so each of their
    samples too. Epsilons are upper bounds at the largest delta of all that count.

    Args:
        store: Of the state folder. Rounds of former runs count: their model went on.
        number: Of the round.

    Returns:
        The figure, or None if training was not private; and in one line why there is none though something was paid for, or what
        it leaves out, else "".
    """
    rounds = [row.round for row in store.rounds() if row.round <= number]
    client, why_not = _client_level(store, number, rounds)
    if client is not None:
        return client, ""
    sample, remark = _sample_level(store, number, rounds)
    return sample, remark or why_not


def _client_level(store: Store, number: int, rounds: Collection[int]) -> tuple[ReleasePrivacy | None, str]:
    central = [row for row in noisy_rounds(store) if row.round <= number]
    if central:
        bare = [each for each in bare_rounds(store) if each <= number]
        if bare:
            return None, _bare(bare, "client-level")
        delta = max(row.delta for row in central)
        epsilon = epsilon_pld([row.spend for row in central], delta)
        return ReleasePrivacy(epsilon=epsilon, delta=delta, level="client"), ""
    masked = [row for row in paid_rounds(store) if row.round <= number]
    if masked:
        paid = {row.round for row in masked}
        bare = [each for each in rounds if each not in paid]
        if bare:
            return None, _bare(bare, "distributed")
        delta = max(row.delta for row in masked)
        return ReleasePrivacy(
            epsilon=epsilon_of([row.sum for row in masked], delta), delta=delta, level="client"
        ), ""
    return None, ""


def _sample_level(store: Store, number: int, rounds: Collection[int]) -> tuple[ReleasePrivacy | None, str]:
    """Each device's own ledger counts over all rounds, so its largest word up to the round is what it has spent."""
    rows = store.read(
        "SELECT round, agent, entry, spent FROM spent WHERE round <= ? ORDER BY rowid", (number,)
    ).fetchall()
    if not rows:
        return None, ""
    said = {(row[0], row[1]) for row in rows}
    bare = sorted({each for each in rounds for agent in store.updates(each) if (each, agent) not in said})
    if bare:
        return None, _bare(bare, "sample-level")
    words = [msgspec.json.decode(row[3], type=Spent) for row in rows]
    privacy = ReleasePrivacy(
        epsilon=max(word.epsilon for word in words), delta=max(word.delta for word in words), level="sample"
    )
    entries: dict[str, int] = {}
    restored = set()
    for _, agent, entry, _ in rows:
        if entry <= entries.get(agent, 0):
            restored.add(agent)
        entries[agent] = entry
    if not restored:
        return privacy, ""
    return privacy, (
        f"epsilon leaves something out: the ledgers of {', '.join(sorted(restored))} were restored from backups or begun anew"
    )


def _bare(rounds: Collection[int], what: str) -> str:
    return (
        f"no epsilon is told: {len(rounds)} of the rounds that made this model had no {what} noise "
        f"(first {min(rounds)})"
    )
