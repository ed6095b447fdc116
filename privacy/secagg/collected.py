"""What an aggregator has collected in one context, and whether that is enough to go on."""

from collections.abc import Collection, Iterable

from privacy.secagg.agreement import PublicKeys, Terms, roster_digest, survivors_digest
from privacy.secagg.graph import Graph, graph_of
from privacy.secagg.recovery import Recovery
from privacy.secagg.server_messages import ServerPhase


class Collected:
    """The state behind :class:`privacy.secagg.server.Server`, phase by phase.

    Args:
        context: ``agreement.context_of`` federation, run, round, attempt, base model...
        invited: Who may take part.
        terms: Of the signed plan.

    Attributes:
        gone: Who vanished; nobody waits for them.
        keys: Of those who sent theirs.
        graph: Once the roster is closed.
        members: The roster; empty until then.
        sealed: Sender to receiver to ciphertext, as long as it may be asked for.
        sharing: Who has shared: they mask with each other.
        stored: Whose masked vectors are there.
        survivors: Whose masked vectors make the sum, sorted; empty until that is decided.
        agreed: Who has signed the survivors.
        revealed: Who has revealed.
        recovery: Of the secrets, once shares are revealed.
    """

    def __init__(self, context: bytes, invited: Collection[str], terms: Terms) -> None:
        self._context, self._terms = context, terms
        self._roster = b""
        self.invited = frozenset(invited)
        self.gone: set[str] = set()
        self.keys: dict[str, PublicKeys] = {}
        self.graph: Graph | None = None
        self.members: frozenset[str] = frozenset()
        self.sealed: dict[str, dict[str, bytes]] = {}
        self.sharing: frozenset[str] = frozenset()
        self.stored: set[str] = set()
        self.survivors: tuple[str, ...] = ()
        self.agreed: set[str] = set()
        self.revealed: set[str] = set()
        self.recovery: Recovery | None = None

    @property
    def agreement(self) -> bytes:
        """The digest that survivors sign."""
        return survivors_digest(self._roster, self.survivors)

    def missing(self, phase: ServerPhase) -> frozenset[str]:
        """Whose message a phase has not got, gone or not."""
        match phase:
            case ServerPhase.KEYS:
                return self.invited - self.keys.keys()
            case ServerPhase.SHARES:
                return self.members - self.sealed.keys()
            case ServerPhase.MASKED:
                return self.sharing - self.stored
            case ServerPhase.AGREEMENTS:
                return frozenset(self.survivors) - self.agreed
            case ServerPhase.REVEALS:
                return frozenset(self.agreed - self.revealed)
            case _:
                return frozenset()

    def lacking(self, phase: ServerPhase) -> str:
        """Why a phase cannot end with what is there; empty if it can."""
        ready: Collection[str]
        poor = ""
        match phase:
            case ServerPhase.KEYS:
                ready = self.keys.keys() - self.gone
            case ServerPhase.SHARES:
                ready = self._sharers()
            case ServerPhase.MASKED:
                ready, poor = self.stored, self._unrecoverable(self.sharing, frozenset(self.stored))
            case _:
                ready, poor = self.agreed, self._unrecoverable(self.sharing, self._willing())
        if len(ready) < self._terms.min_agents:
            return (
                f"{len(ready)} devices in phase {phase.value}, at least {self._terms.min_agents} are needed"
            )
        return f"too few devices are left to recover the secret of {poor!r}" if poor else ""

    # --- the end of each phase ------------------------------------------------------------------------------------

    def close_roster(self) -> None:
        """Those who are there and have sent keys take part; their graph follows."""
        names = tuple(sorted(self.keys.keys() - self.gone))
        self.members = frozenset(names)
        self._roster = roster_digest(self._context, names)
        self.graph = graph_of(names, self._roster, self._terms)

    def close_shares(self) -> None:
        """Those who have shared mask with each other."""
        self.sharing = self._sharers()

    def close_masking(self) -> None:
        """Those whose vectors are there make the sum."""
        self.survivors = tuple(sorted(self.stored))
        self.sealed.clear()

    def close_agreements(self) -> None:
        """From now on shares are revealed: seeds of survivors, mask keys of those that vanished."""
        vanished = self.sharing - frozenset(self.survivors)
        self.recovery = Recovery(
            self._context, self._roster, self._graph(), self.keys, self.survivors, vanished
        )

    # --- who can do what ------------------------------------------------------------------------------------------

    def holders_agreed(self, name: str) -> frozenset[str]:
        """Holders of a device's shares that have signed the survivors; empty if fewer than t: it would not reveal."""
        holders = self._graph().holders(name) & self.agreed
        return holders if len(holders) >= self._threshold else frozenset()

    def _graph(self) -> Graph:
        assert self.graph is not None, "the roster is still open"
        return self.graph

    @property
    def _threshold(self) -> int:
        return self._graph().size.threshold

    def _unrecoverable(self, owners: Iterable[str], holders: frozenset[str]) -> str:
        """A device of which fewer than t of these hold shares; empty if there is none."""
        graph = self._graph()
        return next(
            (owner for owner in sorted(owners) if len(graph.holders(owner) & holders) < self._threshold), ""
        )

    def _sharers(self) -> frozenset[str]:
        """Who is there and has shared, less those of whom too few neighbours are: they would abort."""
        sharing = frozenset(self.sealed.keys() - self.gone)
        while poor := self._unrecoverable(sharing, sharing):
            sharing -= {poor}
        return sharing

    def _willing(self) -> frozenset[str]:
        """Who will reveal."""
        return frozenset(name for name in self.agreed if self.holders_agreed(name))
