"""A cohort that masks and sums in memory: real machines on both sides, and a network that may do anything to their messages."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from privacy.secagg import client_messages as device
from privacy.secagg import server_messages as aggregator
from privacy.secagg.agreement import PublicKeys, Terms, context_of
from privacy.secagg.client import Client
from privacy.secagg.errors import RefusedError
from privacy.secagg.masks import MaskedVector, dtype_of
from privacy.secagg.server import Server
from privacy.secagg.unmask import MaskedSum, UnmaskPlan

CONTEXT = context_of("federation", "run", 1, 1, b"base")
PHASE_S = 30.0

FromDevice = (
    aggregator.KeysArrived
    | aggregator.SharesArrived
    | aggregator.MaskedStored
    | aggregator.AgreementArrived
    | aggregator.RevealArrived
)


def names_of(count: int) -> tuple[str, ...]:
    return tuple(f"agent-{number:04}" for number in range(count))


def vector_of(seed: int, *, length: int = 64, bits: int = 16) -> MaskedVector:
    values: MaskedVector = np.random.default_rng(seed).integers(0, 1 << bits, length, dtype_of(bits).type)
    return values


@dataclass(slots=True)
class Cohort:
    """n devices, one aggregator, and the messages between them.

    Attributes:
        heard: All events that the aggregator's machine was fed.
        stored: Masked vectors as they came in, by name.
        gone: Devices that have no power any more.
        hold_reveals: Whether reveals go to ``held`` instead of the network.
    """

    names: tuple[str, ...]
    terms: Terms
    bits: int = 16
    length: int = 64
    context: bytes = CONTEXT
    clients: dict[str, Client] = field(default_factory=dict)
    vectors: dict[str, MaskedVector] = field(default_factory=dict)
    stored: dict[str, MaskedVector] = field(default_factory=dict)
    keys: dict[str, PublicKeys] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    heard: list[aggregator.ServerEvent] = field(default_factory=list)
    journal: list[aggregator.ServerEvent] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    client_aborts: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    hold_reveals: bool = False
    held: list[aggregator.RevealArrived] = field(default_factory=list)
    up: list[tuple[str, FromDevice]] = field(default_factory=list)
    down: list[tuple[str, device.ClientEvent]] = field(default_factory=list)
    plan: UnmaskPlan | None = None
    aborted: aggregator.Abort | None = None
    now: float = 0.0
    server: Server = field(init=False)

    def __post_init__(self) -> None:
        self.server = Server(self.context, self.names, self.terms, phase_s=PHASE_S)
        self.server.start(self.now)
        for seed, name in enumerate(self.names):
            self.clients[name] = Client(name, self.context, self.terms)
            self.vectors[name] = vector_of(seed, length=self.length, bits=self.bits)
            self.device_says(name, self.clients[name].start(self.now))

    # --- both ends ------------------------------------------------------------------------------------------------

    def tell_server(self, event: aggregator.ServerEvent) -> None:
        """As its caller does it: what counts is journalled first."""
        self.heard.append(event)
        try:
            counts = self.server.changes(event, self.now)
            if counts:
                self.journal.append(event)
            # Their signed forms are passed on.
            match event:
                case aggregator.KeysArrived(agent, keys) if counts:
                    self.keys[agent] = keys
                case aggregator.AgreementArrived(agent, digest) if counts:
                    self.digests[agent] = digest
            self.server_says(self.server.handle(event, self.now))
        except RefusedError as error:
            self.refused.append(str(error))

    def server_says(self, commands: Iterable[aggregator.ServerCommand]) -> None:
        for command in commands:
            match command:
                case aggregator.SendRoster(to, names, neighbours):
                    keys = {name: self.keys[name] for name in neighbours}
                    self.down.append((to, device.RosterArrived(names, keys)))
                case aggregator.SendShares(to, sealed):
                    self.down.append((to, device.SharesArrived(sealed)))
                case aggregator.SendSurvivors(to, names):
                    self.down.append((to, device.SurvivorsArrived(names)))
                case aggregator.SendAgreements(to, signers):
                    digests = {name: self.digests[name] for name in signers}
                    self.down.append((to, device.AgreementsArrived(digests)))
                case aggregator.Unmask(plan):
                    self.plan = plan
                case aggregator.Abort():
                    self.aborted = command

    def tell_device(self, name: str, event: device.ClientEvent) -> None:
        if name not in self.gone:
            self.device_says(name, self.clients[name].handle(event, self.now))

    def device_says(self, name: str, commands: Iterable[device.ClientCommand]) -> None:
        for command in commands:
            match command:
                case device.SendKeys(keys):
                    self.send_up(aggregator.KeysArrived(name, keys))
                case device.SendShares(sealed):
                    self.send_up(aggregator.SharesArrived(name, sealed))
                case device.ApplyMasks(plan):
                    masked = self.vectors[name].copy()
                    plan.apply(masked)
                    self.tell_device(name, device.VectorMasked())
                    self.stored.setdefault(name, masked)
                    self.send_up(aggregator.MaskedStored(name))
                case device.SendAgreement(digest):
                    self.send_up(aggregator.AgreementArrived(name, digest))
                case device.SendReveal(seeds, keys):
                    self.send_up(aggregator.RevealArrived(name, seeds, keys))
                case device.Ignored(reason):
                    self.ignored.append(reason)
                case device.Abort(reason):
                    self.client_aborts[name] = reason

    def send_up(self, event: FromDevice) -> None:
        if isinstance(event, aggregator.RevealArrived) and self.hold_reveals:
            self.held.append(event)
        else:
            self.up.append((event.agent, event))

    # --- in good weather ------------------------------------------------------------------------------------------

    def run(self, *, until: Callable[[], bool] | None = None) -> None:
        """Carry all messages in order until there are none left, or ``until`` says so before the next one."""
        while (self.up or self.down) and not (until and until()):
            if self.up:
                sender, event = self.up.pop(0)
                if sender not in self.gone:
                    self.tell_server(event)
            else:
                name, message = self.down.pop(0)
                self.tell_device(name, message)

    def reach(self, phase: aggregator.ServerPhase) -> None:
        """Run until the aggregator has just begun a phase; what it says then is still under way."""
        self.run(until=lambda: self.server.phase is phase)

    def vanish(self, names: Iterable[str]) -> None:
        """Devices lose power, with all that they have not sent yet, and their last wills fire."""
        for name in names:
            self.gone.add(name)
            self.tell_server(aggregator.AgentGone(name))

    def time_out(self) -> None:
        """The time of the phase is up."""
        self.now += PHASE_S + 1
        masking = self.server.phase is aggregator.ServerPhase.MASKED
        self.tell_server(aggregator.CloseMasking() if masking else aggregator.Tick())

    @property
    def total(self) -> MaskedVector:
        """The sum as the aggregator computes it from what it has."""
        assert self.plan is not None, self.aborted
        running = MaskedSum(self.length, self.bits)
        for name in self.plan.survivors:
            running.add(self.stored[name])
        return running.unmask(self.plan)

    def plain_sum(self, names: Iterable[str]) -> MaskedVector:
        """What the vectors of these devices are together."""
        total: MaskedVector = np.zeros(self.length, dtype_of(self.bits))
        for name in names:
            total += self.vectors[name]
        return total


def without(mapping: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in mapping.items() if key != name}
