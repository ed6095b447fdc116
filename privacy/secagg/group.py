"""Those with whom a device works together, and what it checks before it believes the aggregator about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from privacy.secagg.agreement import PublicKeys, Terms, roster_digest
from privacy.secagg.client_messages import RosterArrived
from privacy.secagg.graph import Graph, graph_of
from privacy.secagg.sealing import Sealer, SharePair


class UnacceptableError(Exception):
    """The aggregator is broken or lies: the device takes no further part."""


@dataclass(slots=True)
class Group:
    """A roster that was checked, and what has come of it.

    Attributes:
        arrived: The roster as it came.
        digest: Of its names.
        graph: Of all.
        neighbours: Of this device.
        sealers: For each neighbour.
        sharing: Neighbours that shared too, by what they sealed; None until it came.
        held: Shares of those neighbours, as far as they could be opened, and of this device itself.
        survivors: Names as they came; None until then.
    """

    arrived: RosterArrived
    digest: bytes
    graph: Graph
    neighbours: frozenset[str]
    sealers: dict[str, Sealer] = field(default_factory=dict)
    sharing: Mapping[str, bytes] | None = None
    held: dict[str, SharePair] = field(default_factory=dict, repr=False)
    survivors: tuple[str, ...] | None = None

    @property
    def threshold(self) -> int:
        """t, of shares and of signatures."""
        return self.graph.size.threshold

    def check_survivors(self, names: tuple[str, ...], me: str, min_agents: int) -> None:
        """Refuse a list of survivors under which this device's vector might not be hidden.

        Args:
            names: As they came.
            me: This device.
            min_agents: That were promised.

        Raises:
            UnacceptableError: It says what is wrong.
        """
        if not _sorted_names(names) or not set(names) <= set(self.graph.names):
            raise UnacceptableError("the survivors are not sorted, or not of the roster")
        if me not in names:
            raise UnacceptableError("this device is not among the survivors: its vector came too late")
        if len(names) < min_agents:
            raise UnacceptableError(f"{len(names)} survivors, at least {min_agents} were promised")
        surviving = self.neighbours & set(names)
        if unknown := surviving - (self.sharing or {}).keys():
            raise UnacceptableError(f"{min(unknown)!r} survives, but its shares never came")
        if len(surviving) + 1 < self.threshold:
            raise UnacceptableError(f"{len(surviving) + 1} holders survive, {self.threshold} are needed")


def checked(roster: RosterArrived, me: str, keys: PublicKeys, context: bytes, terms: Terms) -> Group:
    """Refuse a roster that breaks a promise, or that does not give this device the neighbours that follow from it.

    Args:
        roster: As it came; the owners' signatures on the keys are verified.
        me: This device.
        keys: That it has published.
        context: To which all is bound.
        terms: Of the plan.

    Returns:
        The group.

    Raises:
        UnacceptableError: It says what is wrong.
    """
    names = roster.names
    if not _sorted_names(names):
        raise UnacceptableError("the names of the roster are not sorted, or one is there twice")
    if me not in names:
        raise UnacceptableError("the roster is without this device")
    if len(names) < terms.min_agents:
        raise UnacceptableError(
            f"{len(names)} devices in the roster, at least {terms.min_agents} were promised"
        )
    digest = roster_digest(context, names)
    graph = graph_of(names, digest, terms)
    neighbours = graph.neighbours(me)
    if roster.keys.keys() != neighbours | {me}:
        raise UnacceptableError(
            "the roster brings the keys of others than the neighbours that follow from it"
        )
    if roster.keys[me] != keys:
        raise UnacceptableError("the roster has other keys of this device, perhaps from before it restarted")
    return Group(roster, digest, graph, neighbours)


def _sorted_names(names: tuple[str, ...]) -> bool:
    return all(name < following for name, following in pairwise(names))
