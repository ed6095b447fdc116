"""The sum of masked vectors, and how the masks come off it: O(model) of memory, whatever the number of devices.

What is left of the masks in the sum of the survivors' vectors (Bonawitz et al. 2017, section 4.0.1):

    sum of y_u = sum of x_u + sum of PRG(b_u) over survivors u
                 +- sum of PRG(s_uv) over survivors u and their neighbours v that vanished after they had shared

Masks between two survivors have cancelled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.secagg.masks import Mask, MaskedVector, apply_mask, dtype_of, own_mask, pair_mask


@dataclass(frozen=True, slots=True)
class UnmaskPlan:
    """All that the aggregator learned to take the masks off one sum.

    Attributes:
        roster: The roster's digest.
        survivors: Whose masked vectors make the sum, sorted.
        seeds: Survivor to the seed of its own mask.
        private_keys: Vanished device to its private mask key, 32 bytes.
        neighbours: Vanished device to its surviving neighbours and their public mask keys.
    """

    roster: bytes
    survivors: tuple[str, ...]
    seeds: Mapping[str, bytes] = field(repr=False)
    private_keys: Mapping[str, bytes] = field(repr=False)
    neighbours: Mapping[str, Mapping[str, bytes]] = field(repr=False)

    @property
    def keystreams(self) -> int:
        """How many masks there are to expand: the cost in units of one pass over the vector."""
        return len(self.seeds) + sum(len(peers) for peers in self.neighbours.values())

    def masks(self) -> Iterator[Mask]:
        """What is to be applied to the sum."""
        for survivor in self.survivors:
            yield own_mask(self.seeds[survivor], self.roster).inverted()
        for vanished, peers in self.neighbours.items():
            private = X25519PrivateKey.from_private_bytes(self.private_keys[vanished])
            for peer, public in peers.items():
                # What the peer added is what the vanished one would have subtracted: its own masks cancel it.
                yield pair_mask(private, public, self.roster, vanished, peer)


class MaskedSum:
    """A running sum mod 2^modulus_bits.

    Args:
        length: Of each vector.
        modulus_bits: 8, 16 or 32.
    """

    def __init__(self, length: int, modulus_bits: int) -> None:
        self.total: MaskedVector = np.zeros(length, dtype_of(modulus_bits))

    def add(self, vector: MaskedVector) -> None:
        """Add a survivor's masked vector; the order does not matter.

        Args:
            vector: Shape ``(length,)``, of the type of the sum.

        Raises:
            ValueError: If shape or type differ.
        """
        if vector.shape != self.total.shape or vector.dtype != self.total.dtype:
            raise ValueError(
                f"{vector.dtype} of shape {vector.shape} cannot be added to {self.total.dtype} of {self.total.shape}"
            )
        np.add(self.total, vector, out=self.total)

    def unmask(self, plan: UnmaskPlan) -> MaskedVector:
        """Take the masks off.

        Args:
            plan: Of exactly those devices whose vectors were added.

        Returns:
            The sum of the survivors' vectors, shape ``(length,)``; the same array as :attr:`total`.
        """
        for mask in plan.masks():
            apply_mask(self.total, mask)
        return self.total
