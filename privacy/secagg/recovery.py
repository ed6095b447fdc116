"""From revealed shares to the secrets that take the masks off a sum."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from hmac import compare_digest

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.secagg.agreement import PublicKeys, seed_commitment
from privacy.secagg.errors import RefusedError, UnrecoverableError
from privacy.secagg.graph import Graph
from privacy.secagg.shamir import check_share, recover
from privacy.secagg.unmask import UnmaskPlan


class Recovery:
    """Collects shares of one secret of each device: of a survivor's seed, or of the mask key of one that vanished.

    Args:
        context: To which the commitments are bound.
        roster: The roster's digest.
        graph: Says who holds shares of whom.
        keys: What each device has published.
        survivors: Whose vectors make the sum, sorted.
        vanished: Who shared its secrets, with whom others have masked, but whose vector is not in the sum.

    Attributes:
        suspects: Devices whose share was false at least once. (Or the owner had dealt them a false one.)
    """

    def __init__(
        self,
        context: bytes,
        roster: bytes,
        graph: Graph,
        keys: Mapping[str, PublicKeys],
        survivors: tuple[str, ...],
        vanished: Collection[str],
    ) -> None:
        self.suspects: set[str] = set()
        self._context, self._roster, self._graph, self._keys = context, roster, graph, keys
        self._survivors, self._vanished = survivors, frozenset(vanished)
        self._shares: dict[str, dict[str, bytes]] = {owner: {} for owner in (*survivors, *sorted(vanished))}
        self._secrets: dict[str, bytes] = {}

    def check(self, holder: str, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]) -> None:
        """Refuse what an honest holder does not reveal.

        Args:
            holder: Who reveals.
            seeds: Survivor to share of its seed.
            keys: Vanished device to share of its mask key.

        Raises:
            RefusedError: If it holds no such share, or a share is malformed.
        """
        owners = self._graph.holders(holder)  # holding is mutual
        if stray := seeds.keys() - (owners & set(self._survivors)):
            raise RefusedError(
                f"{holder!r} has no share of the seed of {min(stray)!r}, a survivor, to reveal"
            )
        if stray := keys.keys() - (owners & self._vanished):
            raise RefusedError(
                f"{holder!r} has no share of the key of {min(stray)!r}, who vanished, to reveal"
            )
        for share in (*seeds.values(), *keys.values()):
            check_share(share)

    def add(self, holder: str, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]) -> None:
        """Take the shares of one holder, which passed :meth:`check`."""
        for revealed in (seeds, keys):
            for owner, share in revealed.items():
                self._shares[owner][holder] = share

    @property
    def enough(self) -> bool:
        """Whether there are t shares of each secret."""
        threshold = self._graph.size.threshold
        return all(len(shares) >= threshold for shares in self._shares.values())

    def plan(self) -> UnmaskPlan:
        """Recover all secrets.

        Returns:
            What takes the masks off.

        Raises:
            UnrecoverableError: If one of them cannot be recovered; more shares may help.
        """
        for owner, shares in self._shares.items():
            if owner not in self._secrets:
                self._secrets[owner] = self._recovered(owner, shares)
        return UnmaskPlan(
            roster=self._roster,
            survivors=self._survivors,
            seeds={owner: self._secrets[owner] for owner in self._survivors},
            private_keys={owner: self._secrets[owner] for owner in sorted(self._vanished)},
            neighbours={owner: dict(self._peers(owner)) for owner in sorted(self._vanished)},
        )

    def _peers(self, vanished: str) -> Iterator[tuple[str, bytes]]:
        """Who masked with a vanished device and survived."""
        for name in sorted(self._graph.neighbours(vanished) & set(self._survivors)):
            yield name, self._keys[name].mask

    def _recovered(self, owner: str, shares: Mapping[str, bytes]) -> bytes:
        # Whoever lied before is asked last.
        trusted = sorted(shares, key=lambda holder: (holder in self.suspects, holder))
        by_point = {self._graph.point(holder): shares[holder] for holder in trusted}
        genuine = self._is_seed if owner in self._survivors else self._is_key
        try:
            secret, false = recover(by_point, self._graph.size.threshold, partial(genuine, owner))
        except UnrecoverableError as error:
            raise UnrecoverableError(f"secret of {owner!r}: {error}") from error
        self.suspects |= {holder for holder in shares if self._graph.point(holder) in false}
        return secret

    def _is_seed(self, owner: str, secret: bytes) -> bool:
        return compare_digest(
            seed_commitment(self._context, owner, secret), self._keys[owner].seed_commitment
        )

    def _is_key(self, owner: str, secret: bytes) -> bool:
        public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        return compare_digest(public, self._keys[owner].mask)
