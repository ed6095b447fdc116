"""Versions of the global model: what tells one from another, and how a device gets from the one that it holds to the next.

A version is known by its digest, the SHA-256 of::

    msgpack   the tensors' names and shapes, [[name, [dimension, ...]], ...], in the order of the names
    values    of each tensor in that order, float32, little-endian

so it does not depend on a file format. Deltas are lossy, and what they give *is* the next version: the aggregator adopts
it, so all ends agree bit for bit. Pure: no disks, no sockets.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import sha256

import msgspec
import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection
from federation.wire.codec import decode, schema_of
from federation.wire.messages import FullModel, ModelDelta, RoundPlan

Model = Mapping[str, NDArray[np.float32]]
"""Tensors by name, float32."""


@dataclass(frozen=True, slots=True)
class Held:
    """Start from a version that is here."""

    version: str


@dataclass(frozen=True, slots=True)
class Built:
    """Start from the model that the task builds under a seed."""

    version: str
    seed: int


Start = Held | Built | FullModel


@dataclass(frozen=True, slots=True)
class Route:
    """How to get to a version.

    Attributes:
        start: Where from.
        deltas: To apply, in order.
        version: Where to.
    """

    start: Start
    deltas: tuple[ModelDelta, ...]
    version: str

    @property
    def fetched_bytes(self) -> int:
        """What has to be fetched for it."""
        full = self.start.object.length if isinstance(self.start, FullModel) else 0
        return full + sum(delta.object.length for delta in self.deltas)


def model_digest(model: Model) -> str:
    """The digest of a version, hex."""
    names = sorted(model)
    digest = sha256(msgspec.msgpack.encode([(name, model[name].shape) for name in names]))
    for name in names:
        digest.update(np.ascontiguousarray(model[name], dtype="<f4").data)
    return digest.hexdigest()


def cheapest_route(plan: RoundPlan, held: AbstractSet[str], *, may_build: bool) -> Route:
    """The way to the plan's base model that fetches least; at the same cost, over fewest deltas.

    Args:
        plan: Where to, and what can be fetched.
        held: Digests of the versions that are here.
        may_build: Whether a model may be built from its seed; False once that gave another model on this machine.
    """
    versions = [*(delta.base for delta in plan.deltas), plan.base]
    starts: list[Start] = [Held(version) for version in versions if version in held]
    if may_build and plan.full.seed is not None:
        starts.append(Built(plan.full.version, plan.full.seed))
    starts.append(plan.full)
    routes = [Route(start, plan.deltas[versions.index(start.version) :], plan.base) for start in starts]
    return min(routes, key=lambda route: (route.fetched_bytes, len(route.deltas)))


def apply_delta(model: Model, frame: bytes | memoryview, encoding: str) -> dict[str, NDArray[np.float32]]:
    """The next version: ``model + decode(frame)``, each sum rounded once to float32.

    Args:
        model: The version that the delta is against; not changed.
        frame: From anywhere.
        encoding: That the frame must be in.

    Raises:
        PeerError: As :func:`federation.wire.codec.decode`, and ``non_finite`` if a sum overflows.
    """
    following = decode(frame, schema_of(model), encoding)
    for name, change in following.items():
        with np.errstate(over="ignore"):
            np.add(model[name], change, out=change)
        if not np.isfinite(change).all():
            raise PeerError(Rejection.NON_FINITE, f"tensor {name!r} overflows")
    return following
