"""How the updates of an attempt at a masked sum became integers."""

from dataclasses import dataclass

from federation.wire.shared_scale import SharedScale


@dataclass(frozen=True, slots=True)
class Masking:
    """How the updates of an attempt became integers.

    Attributes:
        attempt: Of the plan.
        scale: Common to all.
        seed: Of the rotations.
    """

    attempt: int
    scale: SharedScale
    seed: bytes

    @property
    def bytes(self) -> int:
        """Of a masked update, exactly."""
        return self.scale.size * self.scale.dtype.itemsize
