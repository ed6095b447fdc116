"""Who is online: births, deaths and health reports, as far as they come from enrolled agents."""

from collections.abc import Callable

import structlog

from aggregator.rounds import AgentOffline, AgentOnline, Event
from aggregator.store import Store
from aggregator.traffic import TrafficLog
from federation.errors import PeerError
from federation.wire.messages import AgentState, RoundTraffic, Telemetry, decode_json

log = structlog.get_logger()

TELEMETRY_INTERVAL_S = 1.0
"""At most one health report per agent is kept in this time: each is a write to the disk."""


class Presence:
    """Turns what agents say of themselves into events of the run. Single-threaded.

    Args:
        store: Keeps everybody's last word.
        enrolled: Whether an agent is (still) enrolled.
        encoding: That an agent must be able to write to take part.
        on_gone: Called with the name of an agent that went away.
        on_back: Called with the name of an agent whose link is back, in the same life or in a new one.
    """

    def __init__(
        self,
        *,
        store: Store,
        enrolled: Callable[[str], bool],
        encoding: str,
        on_gone: Callable[[str], None],
        on_back: Callable[[str], None],
    ) -> None:
        self._store, self._enrolled = store, enrolled
        self._on_gone, self._on_back = on_gone, on_back
        self._family = encoding.partition(":")[0]
        self._sessions: dict[str, str] = {}
        # By agent: the last session whose death was heard over the present connection.
        self._died: dict[str, str] = {}
        self._reported_at: dict[str, float] = {}
        self._counting: set[str] = set()
        self._accounted: dict[str, RoundTraffic] = {}
        self._traffic = TrafficLog(store)

    def connected(self) -> None:
        """The aggregator's link is up: what is retained now may be newer than what was heard before."""
        self._died.clear()

    def state(self, agent: str, payload: bytes, *, retained: bool) -> list[Event]:
        """Take a birth or a death (JSON of :class:`AgentState`).

        Args:
            agent: Whose.
            payload: From anywhere.
            retained: Whether the broker had kept it. nats-server may deliver a retained birth after the death that has
                replaced it, where the subscription is as new as the death: such a birth is ignored.

        Returns:
            What it means for the run: nothing, for a repeat or for the will of an earlier session.
        """
        if not self._enrolled(agent):
            log.debug("state_ignored", agent=agent, reason="not enrolled")
            return self.revoked()
        try:
            state = decode_json(payload, AgentState)
        except PeerError as error:
            log.warning("refused", agent=agent, code=error.code.value, detail=error.detail)
            return []
        if state.state == "offline":
            return self._death(agent, state)
        if retained and self._died.get(agent) == state.session:
            return []
        return self._birth(agent, state)

    def _death(self, agent: str, state: AgentState) -> list[Event]:
        self._died[agent] = state.session
        if self._sessions.get(agent) != state.session:
            return []  # the will of an earlier connection, or of an earlier life
        self._forget(agent)
        self._store.record_agent(agent, state)
        log.info("agent_offline", agent=agent)
        return [AgentOffline(agent)]

    def _birth(self, agent: str, state: AgentState) -> list[Event]:
        self._died.pop(agent, None)
        known = self._sessions.get(agent)
        if known is not None:
            self._on_back(agent)
        if known == state.session:
            return []
        self._sessions[agent] = state.session
        self._store.record_agent(agent, state)
        able = state.capabilities
        if able is None or able.device == "none":
            return [AgentOffline(agent)]
        if self._family not in able.encodings:
            log.warning("agent_ineligible", agent=agent, reason=f"cannot encode {self._family!r}: upgrade it")
            return [AgentOffline(agent)]
        log.info("agent_online", agent=agent, device=able.device, samples=able.samples)
        return [AgentOnline(agent)]

    def revoked(self) -> list[Event]:
        """Forget the agents that are not enrolled any more: nothing that they send would count."""
        gone = [agent for agent in self._sessions if not self._enrolled(agent)]
        for agent in gone:
            self._forget(agent)
            log.info("agent_revoked", agent=agent)
        return [AgentOffline(agent) for agent in gone]

    def telemetry(self, agent: str, payload: bytes, now: float) -> None:
        """Take a health report (JSON of :class:`Telemetry`) of an agent that is online."""
        try:
            telemetry = decode_json(payload, Telemetry)
        except PeerError as error:
            log.debug("telemetry_refused", agent=agent, detail=error.detail)
            return
        if self._sessions.get(agent) != telemetry.session:
            return
        if telemetry.total is not None:
            self._counting.add(agent)
        last = self._reported_at.get(agent)
        if last is None or now >= last + TELEMETRY_INTERVAL_S:
            self._store.record_telemetry(agent, telemetry)
            self._reported_at[agent] = now
        elif telemetry.traffic is None or telemetry.traffic.round <= self._accounted_round(agent):
            return
        self._account(agent, telemetry.traffic)

    def owes_account(self, number: int, agents: frozenset[str]) -> bool:
        """Whether one of these agents, all at the end of this round, is online and is going to tell what it has cost."""
        return any(self._accounted_round(agent) < number for agent in self._counting & agents)

    def _accounted_round(self, agent: str) -> int:
        known = self._accounted.get(agent)
        return 0 if known is None else known.round

    def _account(self, agent: str, traffic: RoundTraffic | None) -> None:
        """Keep what a round has cost an agent: agents repeat it, since a report may be lost."""
        if traffic is None or traffic == self._accounted.get(agent) or traffic.run != self._store.run:
            return
        if traffic.round > self._store.newest_round():
            log.debug("traffic_ignored", agent=agent, round=traffic.round, reason="no such round")
            return
        self._accounted[agent] = traffic
        self._traffic.record(traffic.round, agent, traffic.moved)

    def _forget(self, agent: str) -> None:
        del self._sessions[agent]
        self._reported_at.pop(agent, None)
        self._counting.discard(agent)
        self._on_gone(agent)
