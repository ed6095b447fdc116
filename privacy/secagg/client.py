"""A device's side of secure aggregation: events and a clock in, commands out, no I/O.

::

    ROSTER --checked--> SHARES --at least t--> SURVIVORS --checked--> AGREEMENTS --at least t agree--> REVEALED
       any of them --an aggregator that is broken or lies, too few neighbours, cancelled--> ABORTED

What the device holds to, whatever the aggregator sends:

- One roster, one set of shares and one list of survivors per context. A second, different one ends it for good.
- It reveals for each neighbour either a share of the seed of its mask (it survived) or of its mask key (it vanished).
- It reveals after t holders of its own shares, itself among them, have signed the same list as it.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.secagg.agreement import (
    SEED_BYTES,
    PublicKeys,
    Terms,
    seed_commitment,
    survivors_digest,
)
from privacy.secagg.client_messages import (
    Abort,
    AgreementsArrived,
    ApplyMasks,
    Cancelled,
    ClientCommand,
    ClientEvent,
    ClientPhase,
    Ignored,
    RosterArrived,
    SendAgreement,
    SendKeys,
    SendReveal,
    SendShares,
    SharesArrived,
    SurvivorsArrived,
    Tick,
    VectorMasked,
)
from privacy.secagg.errors import RefusedError
from privacy.secagg.group import Group, UnacceptableError, checked
from privacy.secagg.masks import Mask, MaskPlan, own_mask, pair_mask
from privacy.secagg.sealing import Sealer, SharePair
from privacy.secagg.shamir import split

MAX_REPEAT_S = 60.0
"""A device that came too late for the roster waits for the next attempt, perhaps for long."""

_SAYING = (ClientPhase.ROSTER, ClientPhase.SHARES, ClientPhase.AGREEMENTS)
"""Phases that wait for the answer to a message, which may be lost. Who carries the masked vector repeats it by itself."""


@dataclass(slots=True)
class _Secrets:
    """What a device must not lose, and must forget in time.

    Attributes:
        seed: Of the mask of its own.
        mask_key: Private; the masks with neighbours follow from it.
        seal_key: Private; shares are sealed under what follows from it.
    """

    seed: bytes = field(default_factory=lambda: secrets.token_bytes(SEED_BYTES), repr=False)
    mask_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)
    seal_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)


class Client:
    """One device in one context. Feed it with :meth:`handle`; carry out what it returns, in order.

    Its secrets live in memory only: a device that restarts takes no further part in this context.

    Args:
        name: Of this device.
        context: ``agreement.context_of`` federation, run, round, attempt, base model...
        terms: Of the signed plan.
        repeat_s: Seconds after which a message that got no answer is repeated; doubled each time, to ``MAX_REPEAT_S``.

    Attributes:
        phase: What it waits for.
        revealed: Whether it has let go of shares. Then no other attempt of the round may mask the same vector.
    """

    def __init__(self, name: str, context: bytes, terms: Terms, *, repeat_s: float = 10.0) -> None:
        self.phase = ClientPhase.ROSTER
        self.revealed = False
        self._name, self._context, self._terms, self._repeat_s = name, context, terms, repeat_s
        self._secrets: _Secrets | None = _Secrets()
        self._keys = PublicKeys(
            mask=self._secrets.mask_key.public_key().public_bytes_raw(),
            seal=self._secrets.seal_key.public_key().public_bytes_raw(),
            seed_commitment=seed_commitment(context, name, self._secrets.seed),
        )
        self._group: Group | None = None
        self._masks: MaskPlan | None = None
        self._masked = False
        self._said: ClientCommand = SendKeys(self._keys)
        self._wait_s = repeat_s
        self._repeat_at: float | None = None

    def start(self, now: float) -> list[ClientCommand]:
        """Begin.

        Args:
            now: Monotonic seconds.

        Returns:
            The keys to send.
        """
        self._repeat_at = now + self._wait_s
        return [self._said]

    def handle(self, event: ClientEvent, now: float) -> list[ClientCommand]:
        """Take one event.

        Args:
            event: What happened.
            now: Monotonic seconds.

        Returns:
            What to do, in order. Whatever a peer sent, nothing is raised: it is ignored, or the device aborts.
        """
        if self.phase is ClientPhase.ABORTED:
            return []
        try:
            commands = self._take(event, now)
        except (UnacceptableError, RefusedError) as error:
            self._forget()
            return [Abort(str(error))]
        if any(isinstance(command, SendShares | SendAgreement) for command in commands):
            self._wait_s = self._repeat_s
            self._repeat_at = now + self._wait_s
        return commands

    def next_wakeup(self) -> float | None:
        """When :class:`Tick` can next matter, monotonic seconds; None when only an event can."""
        return self._repeat_at if self.phase in _SAYING else None

    def _take(self, event: ClientEvent, now: float) -> list[ClientCommand]:
        match event:
            case RosterArrived():
                return self._on_roster(event)
            case SharesArrived(sealed):
                return self._on_shares(sealed)
            case VectorMasked():
                self._masked, self._masks = True, None
                return []
            case SurvivorsArrived(names):
                return self._on_survivors(names)
            case AgreementsArrived(digests):
                return self._on_agreements(digests)
            case Cancelled():
                self._forget()
                return []
            case Tick():
                return self._repeat(now)

    def _repeat(self, now: float) -> list[ClientCommand]:
        wakeup = self.next_wakeup()
        if wakeup is None or now < wakeup:
            return []
        self._wait_s = min(2 * self._wait_s, max(MAX_REPEAT_S, self._repeat_s))
        self._repeat_at = now + self._wait_s
        return [self._said]

    # --- the roster -----------------------------------------------------------------------------------------------

    def _on_roster(self, roster: RosterArrived) -> list[ClientCommand]:
        if self._group is not None:
            if roster != self._group.arrived:
                raise UnacceptableError("the aggregator sent two different rosters")
            return [self._said] if self.phase is ClientPhase.SHARES else []
        group = checked(roster, self._name, self._keys, self._context, self._terms)
        assert self._secrets is not None
        points = {group.graph.point(holder): holder for holder in group.graph.holders(self._name)}
        seeds = split(self._secrets.seed, group.threshold, points)
        keys = split(self._secrets.mask_key.private_bytes_raw(), group.threshold, points)
        shares = {holder: SharePair(seeds[point], keys[point]) for point, holder in points.items()}
        for neighbour in group.neighbours:
            group.sealers[neighbour] = Sealer(
                self._secrets.seal_key, roster.keys[neighbour].seal, group.digest, self._name, neighbour
            )
        group.held = {self._name: shares[self._name]}
        self._group, self.phase = group, ClientPhase.SHARES
        self._said = SendShares({to: sealer.seal(shares[to]) for to, sealer in group.sealers.items()})
        return [self._said]

    # --- shares ---------------------------------------------------------------------------------------------------

    def _on_shares(self, sealed: Mapping[str, bytes]) -> list[ClientCommand]:
        group = self._group
        if group is None:
            return [Ignored("shares came before the roster")]
        if group.sharing is not None:
            if sealed != group.sharing:
                raise UnacceptableError("the aggregator sent two different sets of shares")
            return []
        if strangers := sealed.keys() - group.neighbours:
            raise UnacceptableError(f"shares of {min(strangers)!r}, who is no neighbour")
        ignored: list[ClientCommand] = []
        for sender, ciphertext in sealed.items():
            try:
                group.held[sender] = group.sealers[sender].open(ciphertext)
            except RefusedError as error:
                # The sender is masked with all the same: the aggregator counts it, and others may hold good shares of it.
                ignored.append(Ignored(str(error)))
        if len(group.held) < group.threshold:
            raise UnacceptableError(f"shares of {len(group.held)} holders, {group.threshold} are needed")
        group.sharing, group.sealers = dict(sealed), {}
        self._masks = MaskPlan(self._masks_of(group))
        # Masks and shares are made: no later step needs the keys.
        self._secrets = None
        self.phase = ClientPhase.SURVIVORS
        return [*ignored, ApplyMasks(self._masks)]

    def _masks_of(self, group: Group) -> list[Mask]:
        assert self._secrets is not None
        own = own_mask(self._secrets.seed, group.digest)
        key, keys = self._secrets.mask_key, group.arrived.keys
        return [
            own,
            *(
                pair_mask(key, keys[peer].mask, group.digest, self._name, peer)
                for peer in group.sharing or ()
            ),
        ]

    # --- survivors ------------------------------------------------------------------------------------------------

    def _on_survivors(self, names: tuple[str, ...]) -> list[ClientCommand]:
        group = self._group
        if group is None or group.sharing is None:
            return [Ignored("survivors came before the shares")]
        if group.survivors is not None:
            if names != group.survivors:
                raise UnacceptableError(
                    "the aggregator sent two different lists of survivors: it may be lying"
                )
            return [self._agreement(group)]
        self._check_survivors(group, names)
        group.survivors = names
        self.phase = ClientPhase.AGREEMENTS
        self._said = self._agreement(group)
        return [self._said]

    def _check_survivors(self, group: Group, names: tuple[str, ...]) -> None:
        group.check_survivors(names, self._name, self._terms.min_agents)
        if not self._masked:
            raise UnacceptableError("this device is counted as a survivor, but has sent no vector")

    def _agreement(self, group: Group) -> SendAgreement:
        return SendAgreement(survivors_digest(group.digest, group.survivors or ()))

    # --- the reveal -----------------------------------------------------------------------------------------------

    def _on_agreements(self, digests: Mapping[str, bytes]) -> list[ClientCommand]:
        group = self._group
        if group is None or group.survivors is None:
            return [Ignored("agreements came before the survivors")]
        if self.phase is ClientPhase.REVEALED:
            return [self._said]
        mine = self._agreement(group).digest
        signers = {
            signer for signer in group.neighbours & set(group.survivors) if digests.get(signer) == mine
        }
        if len(signers) + 1 < group.threshold:
            return [
                Ignored(f"{len(signers) + 1} holders agree on the survivors, {group.threshold} are needed")
            ]
        survivors = set(group.survivors)
        self._said = SendReveal(
            seeds={owner: pair.seed for owner, pair in group.held.items() if owner in survivors},
            keys={owner: pair.key for owner, pair in group.held.items() if owner not in survivors},
        )
        group.held = {}
        self.phase, self.revealed = ClientPhase.REVEALED, True
        return [self._said]

    def _forget(self) -> None:
        self.phase = ClientPhase.ABORTED
        if self._masks is not None:
            self._masks.wipe()
        self._secrets, self._group, self._masks, self._repeat_at = None, None, None, None
        self._said = Ignored("over")
