"""What secure aggregation costs, and whether its sums are exact: ``python -m benchmarks.secagg``.

Parts:

- ``core``: CPU of a device and of the aggregator per cohort, modulus and vector, and bytes, without a broker. Each device and the
  aggregator are the real machines, one after the other in this process; bytes are those of the fields, with a signature of
  64 bytes where one belongs.
- ``memory``: 1,000 devices over links in memory, with 0, 10 and 30 % of them vanishing: half before they have sent a masked vector, the
  others in equal parts before they agree and before they reveal.
- ``broker``: real devices and a real broker (``benchmarks/secagg_broker.py``).
- ``distributed``: the noise that devices add together (``benchmarks/distributed.py``).

A part that adds ``exact`` or ``dropouts_survived`` says so for itself; the result is the worst of all.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np

from benchmarks.runner import BenchmarkError, Figure, Options, Results, main, middle, say
from privacy.secagg import client_messages as device
from privacy.secagg import server_messages as aggregator
from privacy.secagg.agreement import PublicKeys, Terms, context_of
from privacy.secagg.client import Client
from privacy.secagg.graph import graph_size
from privacy.secagg.masks import MaskedVector, dtype_of
from privacy.secagg.server import Server
from privacy.secagg.unmask import MaskedSum, UnmaskPlan

QUESTION = "are masked sums exact, with how many dropouts, and what do they cost?"
PARTS = ("core", "memory", "broker", "distributed")
ELSEWHERE: Final = {"broker": "benchmarks.secagg_broker", "distributed": "benchmarks.distributed"}
WORST_OF_ALL: Final = ("exact", "dropouts_survived")

SIGNATURE_BYTES: Final = 64
REPEATS: Final = 3
PHASE_S: Final = 1e9
"""Nothing is slow here: what ends a phase is that the others have vanished."""

T = TypeVar("T")
Small = device.ClientEvent | aggregator.ServerEvent


@dataclass(frozen=True, slots=True)
class Case:
    """One cohort.

    Attributes:
        devices: n.
        terms: From which k and t follow.
        bits: Of the modulus.
        length: Of the vectors.
        lost: Share of the devices that vanish.
    """

    devices: int
    terms: Terms
    bits: int
    length: int
    lost: float = 0.0

    def __str__(self) -> str:
        size = graph_size(self.devices, self.terms.dropouts, self.terms.colluders)
        shape = f"{self.devices}, {size.neighbours}, {size.threshold}, 2^{self.bits}"
        return f"{shape:<22} {self.length:>9,} {self.lost:>5.0%}"


THIRD: Final = Terms(2, 1 / 3)
CASES: Final = (
    Case(10, THIRD, 16, 1_000_000),
    Case(50, THIRD, 16, 1_000_000),
    Case(100, THIRD, 16, 1_000_000),
    Case(100, THIRD, 16, 1_000_000, lost=0.3),
    Case(100, THIRD, 8, 1_000_000),
    # Few dropouts, nobody who conspires: what an aggregator that is honest but curious asks for.
    Case(100, Terms(2, 0.2, colluders=0.0), 16, 1_000_000),
)
LARGE: Final = Terms(2, 0.3)
LARGE_QUICK: Final = Terms(2, 0.3, colluders=0.0)
"""With a third of the neighbours."""

LOST: Final = (0.0, 0.1, 0.3)
LOST_QUICK: Final = (0.0, 0.3)


@dataclass(slots=True)
class Outcome:
    """What one sum cost.

    Attributes:
        client_s: CPU seconds by device.
        server_s: CPU seconds of the aggregator's machine.
        sum_s: Of adding up.
        unmask_s: Of taking the masks off.
        up: Bytes by device, the masked vector included.
        down: Bytes by device.
        survivors: In the sum.
        exact: Whether it is their plain sum.
    """

    client_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    server_s: float = 0.0
    sum_s: float = 0.0
    unmask_s: float = 0.0
    up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    survivors: tuple[str, ...] = ()
    exact: bool = False


class Run:
    """A cohort whose messages are handed over in this process, phase by phase.

    Args:
        case: The cohort.
        folder: For masked vectors, as the aggregator keeps them.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._folder = case, folder
        self._context = context_of("benchmark", case.devices)
        self._names = tuple(f"agent-{number:04}" for number in range(case.devices))
        self._server = Server(self._context, self._names, case.terms, phase_s=PHASE_S)
        self._clients: dict[str, Client] = {}
        self._keys: dict[str, PublicKeys] = {}
        self._digests: dict[str, bytes] = {}
        self._gone: set[str] = set()
        self._plan: UnmaskPlan | None = None
        self._down: list[aggregator.ServerCommand] = []
        self.outcome = Outcome()

    def carry_out(self) -> Outcome:
        """Everything, to the sum.

        Returns:
            What it cost.

        Raises:
            BenchmarkError: If no sum came about.
        """
        self._server.start(0.0)
        before_vectors, before_agreements, before_reveals = self._who_vanishes()
        for name in self._names:
            self._clients[name] = self._charged(name, partial(Client, name, self._context, self._case.terms))
            self._said(name, self._clients[name].start(0.0))
        self._deliver()  # rosters: shares come back
        self._vanish(before_vectors)
        self._deliver()  # shares: masked vectors come back
        self._vanish(before_agreements)
        self._deliver()  # survivors: agreements come back
        self._vanish(before_reveals)
        self._deliver()  # agreements: reveals come back
        if self._plan is None:
            self._server_takes(aggregator.Tick(), now=2 * PHASE_S)
        if self._plan is None:
            raise BenchmarkError(f"no sum came about: {self._down}")
        self._sum(self._plan)
        return self.outcome

    def vector(self, name: str) -> MaskedVector:
        """What a device has to add: made anew each time, so that nobody need keep it."""
        draw = np.random.default_rng(int(name.rpartition("-")[2]))
        values: MaskedVector = draw.integers(
            0, 1 << self._case.bits, self._case.length, dtype_of(self._case.bits).type
        )
        return values

    def _who_vanishes(self) -> tuple[list[str], list[str], list[str]]:
        lost = [
            str(name)
            for name in np.random.default_rng(0).permutation(self._names)[
                : int(self._case.lost * self._case.devices)
            ]
        ]
        half, quarter = -(-len(lost) // 2), -(-len(lost) // 4)
        return lost[:half], lost[half : half + quarter], lost[half + quarter :]

    def _vanish(self, names: Iterable[str]) -> None:
        for name in names:
            self._gone.add(name)
            self._server_takes(aggregator.AgentGone(name))

    def _deliver(self) -> None:
        """Hand over all that the aggregator has said; it hears the answers."""
        said, self._down = self._down, []
        for command in said:
            if isinstance(command, aggregator.Abort | aggregator.Unmask) or command.to in self._gone:
                continue
            name, event = command.to, self._event(command)
            signatures = len(event.keys) if isinstance(event, device.RosterArrived) else 1
            if isinstance(event, device.AgreementsArrived):
                signatures = 1 + len(event.digests)
            self.outcome.down[name] += self._bytes(event, signatures)
            self._said(
                name,
                self._charged(name, partial(self._clients[name].handle, event, 0.0)),
            )

    def _event(
        self,
        command: aggregator.SendRoster
        | aggregator.SendShares
        | aggregator.SendSurvivors
        | aggregator.SendAgreements,
    ) -> device.ClientEvent:
        match command:
            case aggregator.SendRoster(_, names, neighbours):
                return device.RosterArrived(names, {name: self._keys[name] for name in neighbours})
            case aggregator.SendShares(_, sealed):
                return device.SharesArrived(sealed)
            case aggregator.SendSurvivors(_, names):
                return device.SurvivorsArrived(names)
            case aggregator.SendAgreements(_, signers):
                return device.AgreementsArrived({name: self._digests[name] for name in signers})

    def _said(self, name: str, commands: Iterable[device.ClientCommand]) -> None:
        for command in commands:
            event: aggregator.ServerEvent
            match command:
                case device.SendKeys(keys):
                    self._keys[name] = keys
                    event = aggregator.KeysArrived(name, keys)
                case device.SendShares(sealed):
                    event = aggregator.SharesArrived(name, sealed)
                case device.ApplyMasks(plan):
                    vector = self.vector(name)
                    self._charged(name, partial(plan.apply, vector))
                    self._clients[name].handle(device.VectorMasked(), 0.0)
                    vector.tofile(self._folder / name)
                    self.outcome.up[name] += vector.nbytes
                    event = aggregator.MaskedStored(name)
                case device.SendAgreement(digest):
                    self._digests[name] = digest
                    event = aggregator.AgreementArrived(name, digest)
                case device.SendReveal(seeds, keys_of):
                    event = aggregator.RevealArrived(name, seeds, keys_of)
                case device.Ignored(reason) | device.Abort(reason):
                    raise BenchmarkError(f"{name}: {reason}")
            self.outcome.up[name] += self._bytes(event, 1)
            self._server_takes(event)

    def _server_takes(self, event: aggregator.ServerEvent, now: float = 0.0) -> None:
        began = time.process_time()
        commands = self._server.handle(event, now)
        self.outcome.server_s += time.process_time() - began
        self._down += commands
        for command in commands:
            if isinstance(command, aggregator.Unmask):
                self._plan = command.plan

    def _sum(self, plan: UnmaskPlan) -> None:
        began = time.process_time()
        running = MaskedSum(self._case.length, self._case.bits)
        for name in plan.survivors:
            running.add(np.fromfile(self._folder / name, dtype_of(self._case.bits)))
        self.outcome.sum_s = time.process_time() - began
        began = time.process_time()
        total = running.unmask(plan)
        self.outcome.unmask_s = time.process_time() - began
        plain = MaskedSum(self._case.length, self._case.bits)
        for name in plan.survivors:
            plain.add(self.vector(name))
        self.outcome.survivors = plan.survivors
        self.outcome.exact = bool(np.array_equal(total, plain.total))

    @staticmethod
    def _bytes(event: Small, signatures: int) -> int:
        return len(msgspec.msgpack.encode(event)) + signatures * SIGNATURE_BYTES

    def _charged(self, name: str, work: Callable[[], T]) -> T:
        began = time.process_time()
        try:
            return work()
        finally:
            self.outcome.client_s[name] += time.process_time() - began


HEAD = f"{'n, k, t, modulus':<22} {'values':>9} {'lost':>5}  {'device':>9} {'machine':>9} {'adding':>9} {'unmasking':>9}  {'up':>10} {'down':>9}"


def tell(case: Case, outcome: Outcome) -> None:
    """A row of the table: CPU of a device, in ms, of the aggregator, in s, and bytes of a device."""
    say(
        f"{case}  {1e3 * middle(outcome.client_s.values()):>6.1f} ms {outcome.server_s:>7.3f} s {outcome.sum_s:>7.3f} s "
        f"{outcome.unmask_s:>7.3f} s  {middle(outcome.up.values()):>10,.0f} {middle(outcome.down.values()):>9,.0f}"
        f"  {'exact' if outcome.exact else 'WRONG'}, {len(outcome.survivors)} in the sum"
    )


def carried_out(case: Case, folder: Path, repeats: int) -> list[Outcome]:
    """Run a case some times; the table shows the first."""
    outcomes = []
    for _ in range(repeats):
        outcomes.append(Run(case, folder).carry_out())
        if len(outcomes) == 1:
            tell(case, outcomes[0])
    return outcomes


def judge(results: Results, runs: Iterable[tuple[Case, list[Outcome]]], where: str) -> None:
    """The figures that all parts have."""
    done = [(case, outcome) for case, outcomes in runs for outcome in outcomes]
    exact = all(outcome.exact for _, outcome in done)
    results.add("exact", float(exact), "", f"every sum equals the plain one, mod 2^bits ({where})")
    survived = max((case.lost for case, outcome in done if outcome.exact), default=0.0)
    results.add("dropouts_survived", survived, "", f"largest share of the cohort that vanished ({where})")


def core(options: Options, results: Results) -> None:
    """CPU and bytes by cohort."""
    say(HEAD)
    repeats = 1 if options.quick else REPEATS
    runs = [(case, carried_out(case, options.folder, repeats)) for case in CASES]
    judge(results, runs, "machines")
    case, outcomes = next(
        (case, outcomes) for case, outcomes in runs if case.devices == 100 and case.bits == 16
    )
    cpu = [seconds for outcome in outcomes for seconds in outcome.client_s.values()]
    results.add("client_cpu_s_100", middle(cpu), "s", f"CPU of a device, median of {len(cpu)}: {case}")
    sent = [outcome.up[name] + outcome.down[name] for outcome in outcomes for name in outcome.survivors]
    results.add(
        "bytes_ratio_int8",
        middle(sent) / case.length,
        "x",
        f"all bytes of a device, up and down, over one a value: {case}",
    )


def memory(options: Options, results: Results) -> None:
    """A thousand devices."""
    say(HEAD)
    terms = LARGE_QUICK if options.quick else LARGE
    lost_shares = LOST_QUICK if options.quick else LOST
    cases = [Case(1000, terms, 32, 100_000, lost) for lost in lost_shares]
    runs = [(case, carried_out(case, options.folder, 1)) for case in cases]
    judge(results, runs, "1,000 devices in memory")
    case, outcomes = runs[-1]
    results.add("client_cpu_s_1000", middle(outcomes[0].client_s.values()), "s", f"CPU of a device: {case}")
    server = outcomes[0].server_s + outcomes[0].sum_s + outcomes[0].unmask_s
    results.add("server_cpu_s_1000", server, "s", f"CPU of the aggregator: {case}")


def measure(options: Options, results: Results) -> None:
    """All parts that were asked for."""
    worst: dict[str, Figure] = {}
    for part in PARTS:
        if part not in options.parts:
            continue
        say(f"{part}:")
        run = (
            import_module(ELSEWHERE[part]).measure
            if part in ELSEWHERE
            else {"core": core, "memory": memory}[part]
        )
        run(options, results)
        for key in WORST_OF_ALL:
            figure = results.figures.pop(key, None)
            if figure is not None and (key not in worst or figure.value < worst[key].value):
                worst[key] = figure
    results.figures |= worst


if __name__ == "__main__":
    main("secagg", QUESTION, measure, PARTS)
