"""Who is whose neighbour, and how many shares recover a secret: computed alike by all from names and terms.

Up to :data:`COMPLETE_UP_TO` devices, all are neighbours. Beyond, the devices stand in a ring in an order that depends on a hash
of the roster, and the k/2 nearest on either side are neighbours (the Harary graph on a random permutation of Bell et al.
2020, section 3.2). The holders of a device's shares are its neighbours and itself: h = k + 1.

Threshold t. With s the colluders among the k/2 devices on one side of a device,

    t >= k/2 + 2 + s

gives, whatever the aggregator tells to whom:

- **A device's two secrets are never both recovered.** An honest holder reveals one kind of share only, so both kinds need 2t
  shares of the h holders with the colluders counted twice, and 2t > h + 2s.
- **The survivors hang together.** A run of k/2 places without an honest survivor would have a survivor at its end that knows at
  most k/2 + 1 + s surviving holders; it counts them, finds fewer than t, and aborts. So successive honest survivors are
  neighbours, their masks form a connected graph, and they cancel in the sum of all of them only (Bell et al., lemma 3.1 and 3.2).

k is the smallest for which s and the devices that vanish stay within what t allows, except with the probabilities below. Both
numbers are hypergeometric (a draw without replacement), and computed exactly, in integers: devices of all kinds must
come to the same k and t.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import ceil, comb, floor

from privacy.secagg.agreement import Terms

COMPLETE_UP_TO = 50
"""Devices. Up to here a sparse graph would save next to nothing."""

_LEAK_BITS = 40
"""2^-40: probability that colluders are so many around any one device that the threshold does not hold."""

_FAILURE_BITS = 10
"""2^-10: probability that a sum cannot be recovered when as many vanish as are tolerated. Another attempt follows."""

_ROUNDING = 1e-9
"""A third of 30 is 10, also in floating point."""


@dataclass(frozen=True, slots=True)
class GraphSize:
    """How dense the graph is.

    Attributes:
        neighbours: k, of each device.
        threshold: t, shares that recover a secret, and signatures that make a device reveal its own.
        colluders: How many may conspire with a lying aggregator: of all devices where all are neighbours, else of the
            k/2 devices on either side of any device.
    """

    neighbours: int
    threshold: int
    colluders: int

    @property
    def holders(self) -> int:
        """h: who has shares of a device's secrets: its neighbours and itself."""
        return self.neighbours + 1

    @property
    def dropouts(self) -> int:
        """How many of a device's holders may vanish."""
        return self.holders - self.threshold


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of one roster.

    Attributes:
        names: All devices, sorted.
        size: Its density.
        ring: The names in the order of the ring.
    """

    names: tuple[str, ...]
    size: GraphSize
    ring: tuple[str, ...]
    _places: dict[str, int]
    _points: dict[str, int]

    def neighbours(self, name: str) -> frozenset[str]:
        """Whose neighbour a device is; symmetric, never itself."""
        place, count, half = self._places[name], len(self.ring), self.size.neighbours // 2
        if self.size.neighbours == count - 1:
            return frozenset(self.names) - {name}
        offsets = (offset for distance in range(1, half + 1) for offset in (-distance, distance))
        return frozenset(self.ring[(place + offset) % count] for offset in offsets)

    def holders(self, name: str) -> frozenset[str]:
        """Who holds shares of a device's secrets: its neighbours and itself."""
        return self.neighbours(name) | {name}

    def point(self, name: str) -> int:
        """Where the polynomials are evaluated for a device's shares: 1 to n, in the order of names."""
        return self._points[name]


def graph_of(names: tuple[str, ...], roster: bytes, terms: Terms) -> Graph:
    """The graph that follows from a roster.

    Args:
        names: All devices, sorted, without repetition.
        roster: Their ``agreement.roster_digest``, which orders the ring.
        terms: Of the plan.

    Returns:
        The graph; the same on every machine.
    """
    ring = tuple(sorted(names, key=lambda name: sha256(roster + name.encode()).digest()))
    places = {name: place for place, name in enumerate(ring)}
    points = {name: point for point, name in enumerate(names, start=1)}
    return Graph(names, graph_size(len(names), terms.dropouts, terms.colluders), ring, places, points)


@lru_cache(maxsize=64)
def graph_size(devices: int, dropouts: float, colluders: float) -> GraphSize:
    """The smallest graph that keeps the promises above.

    Args:
        devices: n.
        dropouts: Share of them that may vanish.
        colluders: Share of them that may conspire with the aggregator.

    Returns:
        Neighbours and threshold. All are neighbours if n is small, or if nothing less is enough.
    """
    complete = _complete(devices, dropouts)
    if devices <= COMPLETE_UP_TO:
        return complete
    least, most = 1, (devices - 2) // 2
    if _sparse(devices, 2 * most, dropouts, colluders) is None:
        return complete
    # The promises get easier to keep with k, but for steps of rounding: the search ends at one that keeps them.
    while least < most:
        middle = (least + most) // 2
        if _sparse(devices, 2 * middle, dropouts, colluders) is None:
            least = middle + 1
        else:
            most = middle
    return _sparse(devices, 2 * most, dropouts, colluders) or complete


def _complete(devices: int, dropouts: float) -> GraphSize:
    """Everybody holds shares of everybody: t = ceil(2n/3), lowered for dropouts, but always a majority."""
    majority = devices // 2 + 1
    two_thirds = -(-2 * devices // 3)
    staying = devices - floor(dropouts * devices + _ROUNDING)
    threshold = max(majority, min(two_thirds, staying))
    # Honest holders reveal one kind of share each: both kinds need 2t of n with the colluders counted twice.
    return GraphSize(devices - 1, threshold, colluders=2 * threshold - devices - 1)


def _sparse(devices: int, neighbours: int, dropouts: float, colluders: float) -> GraphSize | None:
    """The graph with this k, or None if it cannot keep the promises."""
    others, half = devices - 1, neighbours // 2
    conspirators = min(others, ceil(colluders * devices - _ROUNDING))
    # Two sides of each device.
    on_one_side = _most(others, conspirators, half, 2 * devices << _LEAK_BITS)
    threshold = half + 2 + on_one_side
    vanishing = floor(dropouts * devices + _ROUNDING)
    # Whoever survives holds a share of its own; whoever vanished does not, but is one of those that vanished.
    failures = 2 * devices << _FAILURE_BITS
    left_of_survivor = neighbours + 1 - _most(others, vanishing, neighbours, failures)
    left_of_vanished = neighbours - _most(others, max(0, vanishing - 1), neighbours, failures)
    if min(left_of_survivor, left_of_vanished) < threshold:
        return None
    return GraphSize(neighbours, threshold, colluders=on_one_side)


def _most(population: int, marked: int, drawn: int, odds: int) -> int:
    """The largest number of marked ones among those drawn, except with probability 1 / odds.

    The smallest x with P[X > x] <= 1 / odds, where P[X = i] = C(marked, i) C(population - marked, drawn - i) /
    C(population, drawn).
    """
    allowed = comb(population, drawn)
    beyond = 0
    for count in range(min(marked, drawn), -1, -1):
        beyond += comb(marked, count) * comb(population - marked, drawn - count) * odds
        if beyond > allowed:
            return count
    return 0
