"""aggregator.releases.rollouts under any weather: devices come, go, confirm and fail, operators intervene, the server is killed."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregator.config import ReleaseConfig
from aggregator.releases.records import ReleaseState
from aggregator.releases.rollout_events import (
    Announce,
    CanaryRecord,
    Command,
    Event,
    FollowerGone,
    FollowerSeen,
    LinkDown,
    LinkUp,
    Mark,
    Note,
    Released,
    Reported,
    RolledBack,
    Tick,
)
from aggregator.releases.rollouts import FAILED, SLACK, Rollouts
from federation.wire.release import Channel, RolloutState

AGENTS = ("a", "b", "c", "d", "e")
STEP_S, GIVE_UP_S = 100.0, 1000.0
STEPS_TO_ALL = 6
"""From the smallest first share, 5 %, by the smallest factor, 2: 0.05, 0.1, 0.2, 0.4, 0.8, 1."""

agent_names = st.sampled_from(AGENTS)
shares = st.sampled_from([0.05, 0.3, 0.7])


class Server(RuleBasedStateMachine):
    """A server whose disk is a few attributes, whose clock is a number, and whose devices are names."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.config = ReleaseConfig()
        self.machine = Rollouts("home", self.config)
        # what the disk remembers
        self.stable: int | None = None
        self.canary: Announce | None = None
        self.began = 0.0
        self.states: dict[int, ReleaseState] = {}
        self.reports: dict[tuple[int, str], Reported] = {}
        self.followers: set[str] = set()
        self.version = 0
        # what is so just now
        self.link = False
        self.gone: dict[str, float] = {}
        self.asked = False
        self.newest = 0

    @initialize(
        widen=st.sampled_from([2.0, 5.0]),
        min_reports=st.integers(1, 3),
        percent=st.sampled_from([0, 10, 34, 60]),
        online=st.sets(agent_names),
        offline=st.sets(agent_names),
        share=shares,
    )
    def begin(
        self,
        widen: float,
        min_reports: int,
        percent: int,
        online: set[str],
        offline: set[str],
        share: float,
    ) -> None:
        self.config = ReleaseConfig(
            widen=widen,
            min_reports=min_reports,
            max_failures=percent / 100,
            step_s=STEP_S,
            give_up_s=GIVE_UP_S,
        )
        self.machine = Rollouts("home", self.config)
        self.carry_out(self.machine.start(self.now, ()))
        self.comes_up()
        for agent in sorted(online | offline):
            self.comes_online(agent)
        for agent in sorted(offline):
            self.goes_offline(agent)
        self.somebody_releases(share, Channel.CANARY, same=False)

    # --- the weather --------------------------------------------------------------------------------------------

    @rule(agent=agent_names)
    def comes_online(self, agent: str) -> None:
        if self.link:
            self.followers.add(agent)
            self.gone.pop(agent, None)
            self.feed(FollowerSeen(agent, online=True))

    @rule(agent=agent_names)
    def goes_offline(self, agent: str) -> None:
        if self.link and agent in self.followers:
            self.gone.setdefault(agent, self.now)
            self.feed(FollowerSeen(agent, online=False))

    @precondition(lambda self: self.canary is not None and self.link)
    @rule(agent=agent_names, state=st.sampled_from(RolloutState), late=st.booleans())
    def reports_on_the_canary(self, agent: str, state: RolloutState, late: bool) -> None:
        assert self.canary is not None
        assert self.canary.number is not None
        if agent not in self.followers:
            self.gone[agent] = self.now  # it has not said that it is there
        manifest = self.canary.first_manifest - late
        self.hears(Reported(agent, self.canary.number, manifest, state))

    @precondition(lambda self: self.newest > 0 and self.link)
    @rule(agent=agent_names, state=st.sampled_from(RolloutState))
    def reports_on_another_release(self, agent: str, state: RolloutState) -> None:
        number = self.newest - 1
        if agent in self.followers and (self.canary is None or number != self.canary.number):
            self.hears(Reported(agent, number, self.version, state))

    @rule(agent=agent_names)
    def is_revoked(self, agent: str) -> None:
        self.followers.discard(agent)
        self.gone.pop(agent, None)
        self.reports = {key: report for key, report in self.reports.items() if key[1] != agent}
        self.feed(FollowerGone(agent))

    @rule(seconds=st.sampled_from([0.0, 5.0, 60.0, 150.0, 1200.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @rule()
    def sleeps_until_the_wakeup(self) -> None:
        wakeup = self.machine.next_wakeup()
        if wakeup is not None:
            self.now = wakeup
            self.feed(Tick())

    @precondition(lambda self: self.link)
    @rule()
    def goes_down(self) -> None:
        self.link = False
        self.feed(LinkDown())

    @precondition(lambda self: not self.link)
    @rule()
    def comes_up(self) -> None:
        self.link = True
        self.gone = dict.fromkeys(self.followers, self.now)
        self.feed(LinkUp())

    # --- operators ----------------------------------------------------------------------------------------------

    @rule(share=shares, channel=st.sampled_from(Channel), same=st.booleans())
    def somebody_releases(self, share: float, channel: Channel, same: bool) -> None:
        again = same and self.newest > 0 and self.newest != self.stable
        number = self.newest if again else self.newest + 1
        self.newest = number
        self.asked = True
        self.feed(Released(number, channel, share, self.version + 1))
        self.asked = False
        assert number in (self.stable, None if self.canary is None else self.canary.number)

    @precondition(lambda self: self.newest > 1)
    @rule(further=st.booleans())
    def somebody_goes_back(self, further: bool) -> None:
        self.asked = True
        self.feed(RolledBack(1 if further else None))
        self.asked = False
        assert self.canary is None

    # --- death ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.canary is not None and self.link)
    @rule(agent=agent_names, state=st.sampled_from(RolloutState))
    def is_killed_between_a_report_and_what_follows_from_it(self, agent: str, state: RolloutState) -> None:
        assert self.canary is not None
        assert self.canary.number is not None
        self.followers.add(agent)
        report = Reported(agent, self.canary.number, self.canary.first_manifest, state)
        self.reports[report.number, agent] = report
        self.restarts(0.0)

    @rule(down_s=st.sampled_from([0.0, 30.0, 5000.0]), clock_s=st.sampled_from([0.0, -1e6, 1e6]))
    def is_killed_and_started_again(self, down_s: float, clock_s: float) -> None:
        before = self.machine.tally(self.now)
        self.restarts(down_s, clock_s)
        if self.canary is None:  # halted for what could not be acted upon without a link
            return
        after = self.machine.tally(self.now)
        lost = before.faults.get("lost", 0)
        assert (after.devices, after.confirmed, after.failed) == (
            before.devices,
            before.confirmed,
            before.failed - lost,
        ), "nothing that was heard is forgotten"

    def restarts(self, down_s: float, clock_s: float = 0.0) -> None:
        self.now += down_s
        self.machine = Rollouts("home", self.config, stable=self.stable)
        record, reports = None, []
        if self.canary is not None and self.canary.number is not None:
            elapsed_s = self.now - self.began + clock_s
            record = CanaryRecord(
                self.canary.number, self.canary.share, self.canary.first_manifest, elapsed_s
            )
            reports = [one for (number, _), one in self.reports.items() if number == self.canary.number]
        self.link = False
        self.gone = dict.fromkeys(self.followers, self.now)
        self.carry_out(self.machine.start(self.now, sorted(self.followers), record, reports))

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def sleeps_whenever_it_cannot_act(self) -> None:
        wakeup = self.machine.next_wakeup()
        assert wakeup is None or wakeup > self.now, "a wakeup in the past would keep a processor busy"
        assert self.machine.handle(Tick(), self.now) == [], "what is decided is decided at once, and once"

    @invariant()
    def agrees_with_the_disk(self) -> None:
        assert self.machine.stable == self.stable
        assert self.machine.canary == (None if self.canary is None else self.canary.number)
        assert self.machine.share == (0 if self.canary is None else self.canary.share)
        in_canary = [number for number, state in self.states.items() if state is ReleaseState.CANARY]
        assert in_canary == ([] if self.canary is None else [self.canary.number])
        is_stable = [number for number, state in self.states.items() if state is ReleaseState.STABLE]
        assert is_stable == ([] if self.stable is None else [self.stable])

    @invariant()
    def no_canary_goes_on_with_too_many_failures(self) -> None:
        if self.canary is None or not self.link:  # without a link nobody can tell who is lost
            return
        tally = self.machine.tally(self.now)
        assert tally.failed <= self.config.max_failures * tally.devices + SLACK

    def hears(self, report: Reported) -> None:
        """It is on the disk before the machine hears of it."""
        self.followers.add(report.agent)
        if self.canary is None or report.manifest >= self.canary.first_manifest:
            self.reports[report.number, report.agent] = report
        self.feed(report)

    def feed(self, event: Event) -> None:
        self.carry_out(self.machine.handle(event, self.now))

    def carry_out(self, commands: list[Command]) -> None:
        before, seen = self.canary, self.tally_on_disk()
        for command in commands:
            match command:
                case Announce(Channel.STABLE, number, share):
                    assert share == 1
                    assert number is not None
                    if not self.asked:
                        self.is_promoted(number, before, seen)
                    self.stable = number
                case Announce(Channel.CANARY, None, _):
                    assert self.canary is not None, "a channel is emptied once"
                    self.canary = None
                case Announce(Channel.CANARY):
                    self.grows(command, seen)
                case Mark(number, state):
                    assert self.states.get(number) is not state, "a decision is taken once"
                    self.states[number] = state
                case Note("canary_halted", number):
                    assert self.states[number] is ReleaseState.HALTED
                    assert not self.asked
                case Note():
                    pass
        self.version += sum(isinstance(command, Announce) for command in commands)

    def grows(self, command: Announce, seen: tuple[int, int]) -> None:
        former, self.canary, self.began = self.canary, command, self.now
        if former is None or former.number != command.number:
            assert self.asked, "only an operator begins a canary"
            return
        assert command.share >= former.share, "a share never falls"
        assert command.first_manifest == former.first_manifest
        if not self.asked:
            assert command.share > former.share
            self.went_well(seen)

    def is_promoted(self, number: int, before: Announce | None, seen: tuple[int, int]) -> None:
        assert before is not None
        assert (before.number, before.share) == (number, 1.0), "all devices had it before"
        confirmed, _ = seen
        assert confirmed or not self.followers, "somebody has confirmed it"
        self.went_well(seen)

    def went_well(self, seen: tuple[int, int]) -> None:
        confirmed, failed = seen
        assert self.link, "not while silence means nothing"
        assert failed <= self.config.max_failures * (confirmed + failed) + SLACK

    def tally_on_disk(self) -> tuple[int, int]:
        """Devices that have confirmed the canary, and that have failed with it, of those that are enrolled."""
        if self.canary is None:
            return 0, 0
        states = [
            one.state
            for (number, agent), one in self.reports.items()
            if number == self.canary.number
            and one.manifest >= self.canary.first_manifest
            and agent in self.followers
        ]
        return states.count(RolloutState.CONFIRMED), sum(state in FAILED for state in states)

    # --- whatever has happened: once everybody is there and confirms, a canary comes to its end -------------------

    def teardown(self) -> None:
        if not self.link:
            self.comes_up()
        for agent in AGENTS:
            self.comes_online(agent)
        for _ in range(3 * STEPS_TO_ALL):
            if self.canary is None:
                break
            for agent in sorted(self.machine.in_step()):
                if self.canary is not None:
                    self.reports_on_the_canary(agent, RolloutState.CONFIRMED, late=False)
            self.sleeps_until_the_wakeup()
        assert self.canary is None, "it does not hang"


TestServer = Server.TestCase
TestServer.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
