"""What happened, read from the store, beside a running server or after it."""

from functools import reduce
from pathlib import Path
from typing import Any

import msgspec

from aggregator.central_report import ClientPrivacy, client_privacy
from aggregator.masked_noise import DistributedPrivacy, distributed_privacy
from aggregator.masking_machine import standing
from aggregator.releases.status import (
    FollowerStatus,
    ReleaseStatus,
    follower_statuses,
    release_statuses,
)
from aggregator.spending import StoredSpent, last_spent
from aggregator.store import Store
from aggregator.traffic import StoredTraffic, TrafficLog
from federation.wire.masking import MASKED
from federation.wire.messages import Traffic
from federation.wire.signing import AGGREGATOR


class RoundStatus(msgspec.Struct, frozen=True):
    """One round.

    Attributes:
        round: Number.
        phase: ``open``, ``unmasking``, ``folding`` or ``closed``.
        masking: Under secure aggregation what is being collected: ``keys``, ``shares``, ``masked`` updates, ``agreements`` or
            ``reveals``; empty otherwise.
        attempt: Higher than 1 when it was extended.
        cohort: Agents invited.
        delivered: Updates accepted.
        seconds: From opening to closing; None while open.
        train_s: Longest local training, seconds.
        fold_s: Averaging, seconds.
        bytes_up: Payload of the accepted updates.
        loss: Hold-out loss, nats.
        accuracy: Hold-out top-1, in [0, 1].
        evaluate_s: Evaluation, seconds.
        waiting_for: Members of the open round's cohort that have not delivered, or of whom another step is missing.
        agents_moved: What the agents say that the round has cost them on the wire, summed over those that have said it.
        server_moved: What the aggregator has moved itself while the round was open.
    """

    round: int
    phase: str
    attempt: int
    cohort: int
    delivered: int
    seconds: float | None
    train_s: float
    fold_s: float | None
    bytes_up: int
    loss: float | None
    accuracy: float | None
    evaluate_s: float | None
    waiting_for: list[str]
    agents_moved: Traffic = Traffic()
    server_moved: Traffic = Traffic()
    masking: str = ""


class Report(msgspec.Struct, frozen=True):
    """The state of a federation.

    Attributes:
        federation: Name.
        run: Identifier of the run.
        rounds: All rounds, oldest first.
        agents: As they last announced themselves.
        refusals: The newest, with code and detail.
        refusal_counts: By code.
        declines: The newest, with code and reason.
        client_privacy: What was spent of the run's budget; None without client-level privacy.
        distributed_privacy: The same for noise that the devices add together.
        releases: All, oldest first.
        followers: Devices that run models.
    """

    federation: str
    run: str
    rounds: list[RoundStatus]
    agents: list[dict[str, Any]]
    refusals: list[dict[str, Any]]
    refusal_counts: dict[str, int]
    declines: list[dict[str, Any]] = []
    client_privacy: ClientPrivacy | None = None
    distributed_privacy: DistributedPrivacy | None = None
    releases: list[ReleaseStatus] = []
    followers: list[FollowerStatus] = []

    def to_json(self) -> str:
        """One JSON object, indented, with a newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


def collect(folder: Path) -> Report:
    """Read the store; the server may be running.

    Raises:
        ConfigError: If the folder is not a state folder.
    """
    with Store(folder) as store:
        traffic = TrafficLog(store)
        of_round: dict[tuple[int, bool], Traffic] = {}
        of_agent: dict[str, list[StoredTraffic]] = {}
        for entry in traffic.read():
            key = entry.round, entry.agent == AGGREGATOR
            of_round[key] = of_round.get(key, Traffic()).plus(entry.moved)
            of_agent.setdefault(entry.agent, []).append(entry)
        uploads = {upload.agent: upload for upload in traffic.uploads()}
        spending = last_spent(store)
        rounds = []
        for row in store.rounds():
            updates = store.updates(row.round)
            waiting = [] if row.phase == "closed" else sorted(set(row.cohort) - set(updates))
            masking = ""
            if row.phase != "closed" and row.encoding.startswith(f"{MASKED}:"):
                masking, missing = standing(folder, store.federation, row.round, row.attempt) or (
                    "keys",
                    waiting,
                )
                # Which updates have come, the store knows before the journal.
                waiting = waiting if masking == "masked" else missing
            rounds.append(
                RoundStatus(
                    round=row.round,
                    phase=row.phase,
                    attempt=row.attempt,
                    cohort=len(row.cohort),
                    delivered=len(updates),
                    seconds=None if row.closed_at is None else row.closed_at - row.opened_at,
                    train_s=max((update.metrics.train_s for update in updates.values()), default=0.0),
                    fold_s=row.fold_s,
                    bytes_up=sum(update.bytes for update in updates.values()),
                    loss=row.loss,
                    accuracy=row.accuracy,
                    evaluate_s=row.evaluate_s,
                    waiting_for=waiting,
                    agents_moved=of_round.get((row.round, False), Traffic()),
                    server_moved=of_round.get((row.round, True), Traffic()),
                    masking=masking,
                )
            )
        agents = [
            {
                "agent": agent.agent,
                "online": agent.online,
                "changed_at": agent.changed_at,
                "capabilities": msgspec.to_builtins(agent.capabilities),
                "telemetry": msgspec.to_builtins(agent.telemetry),
                "upload": msgspec.to_builtins(uploads.get(agent.agent)),
                "spent": _spent(spending.get(agent.agent)),
                **_account(of_agent.get(agent.agent, [])),
            }
            for agent in store.agents()
        ]
        refusals = [
            {"round": number, "agent": agent, "code": code, "detail": detail, "at": at}
            for number, agent, code, detail, at in store.refusals()
        ]
        declines = [
            {"round": number, "agent": agent, "code": code, "reason": reason, "at": at}
            for number, agent, code, reason, at in store.declines()
        ]
        return Report(
            federation=store.federation,
            run=store.run,
            rounds=rounds,
            agents=agents,
            refusals=refusals,
            refusal_counts=store.refusal_counts(),
            declines=declines,
            client_privacy=client_privacy(store),
            distributed_privacy=distributed_privacy(store),
            releases=release_statuses(store),
            followers=follower_statuses(store),
        )


def _account(entries: list[StoredTraffic]) -> dict[str, Any]:
    """What an agent's rounds have cost it: the last that it has reported, and all of them."""
    if not entries:
        return {"last_round": None, "all_rounds": None}
    last = {"round": entries[-1].round, "moved": entries[-1].moved}
    whole = reduce(Traffic.plus, (entry.moved for entry in entries))
    return {"last_round": msgspec.to_builtins(last), "all_rounds": msgspec.to_builtins(whole)}


def _spent(last: StoredSpent | None) -> dict[str, Any] | None:
    """What a device says that it has spent on its data so far; ``went_back`` when that leaves something out."""
    if last is None:
        return None
    return {**msgspec.to_builtins(last.spent), "round": last.round, "went_back": last.went_back}
