"""privacy.secagg under any loss, repetition, order, damage, dropout and restart: the exact sum of the survivors, or none."""

from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from masking_cohort import PHASE_S, Cohort, FromDevice, names_of

from privacy.secagg import client_messages as device
from privacy.secagg import server_messages as aggregator
from privacy.secagg.agreement import Terms
from privacy.secagg.server import Server
from privacy.secagg.server_messages import ServerPhase


def flipped(data: bytes, place: int) -> bytes:
    damaged = bytearray(data)
    damaged[place % len(data)] ^= 1 << place % 8
    return bytes(damaged)


def damaged(event: FromDevice, place: int) -> FromDevice:
    """One bit of a message is another. (Whoever uses the machines verifies signatures first; they must stand it all the same.)"""
    match event:
        case aggregator.KeysArrived(agent, keys):
            field = ("mask", "seal", "seed_commitment")[place % 3]
            return aggregator.KeysArrived(
                agent, replace(keys, **{field: flipped(getattr(keys, field), place)})
            )
        case aggregator.SharesArrived(agent, sealed) if sealed:
            to = sorted(sealed)[place % len(sealed)]
            return aggregator.SharesArrived(agent, {**sealed, to: flipped(sealed[to], place)})
        case aggregator.AgreementArrived(agent, digest):
            return aggregator.AgreementArrived(agent, flipped(digest, place))
        case aggregator.RevealArrived(agent, seeds, keys) if seeds:
            owner = sorted(seeds)[place % len(seeds)]
            return aggregator.RevealArrived(agent, {**seeds, owner: flipped(seeds[owner], place)}, keys)
        case _:
            return event


class Masking(RuleBasedStateMachine):
    """A cohort in bad weather."""

    cohort: Cohort

    @initialize(
        count=st.integers(2, 7),
        least=st.integers(2, 4),
        dropouts=st.sampled_from([0.0, 0.2, 1 / 3, 0.5]),
        bits=st.sampled_from([8, 16, 32]),
    )
    def begin(self, count: int, least: int, dropouts: float, bits: int) -> None:
        self.cohort = Cohort(names_of(count), Terms(least, dropouts), bits=bits, length=5)
        self.seen: dict[str, tuple[set[str], set[str]]] = {name: (set(), set()) for name in self.cohort.names}

    # --- the network ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.cohort.up)
    @rule(which=st.integers(0, 30), keep=st.booleans())
    def a_message_goes_up(self, which: int, keep: bool) -> None:
        """In any order; sometimes another copy stays under way."""
        place = which % len(self.cohort.up)
        sender, event = self.cohort.up[place] if keep else self.cohort.up.pop(place)
        if sender not in self.cohort.gone or keep:
            self.cohort.tell_server(event)

    @precondition(lambda self: self.cohort.down)
    @rule(which=st.integers(0, 30), keep=st.booleans())
    def a_message_goes_down(self, which: int, keep: bool) -> None:
        place = which % len(self.cohort.down)
        to, event = self.cohort.down[place] if keep else self.cohort.down.pop(place)
        self.cohort.tell_device(to, event)

    @rule(rounds=st.integers(1, 3))
    def fair_weather(self, rounds: int) -> None:
        """So that most runs get somewhere: all that is under way arrives."""
        for _ in range(rounds):
            up, self.cohort.up = self.cohort.up, []
            for sender, event in up:
                if sender not in self.cohort.gone:
                    self.cohort.tell_server(event)
            down, self.cohort.down = self.cohort.down, []
            for to, message in down:
                self.cohort.tell_device(to, message)

    @precondition(lambda self: self.cohort.up)
    @rule(which=st.integers(0, 30))
    def a_message_up_is_lost(self, which: int) -> None:
        self.cohort.up.pop(which % len(self.cohort.up))

    @precondition(lambda self: self.cohort.down)
    @rule(which=st.integers(0, 30))
    def a_message_down_is_lost(self, which: int) -> None:
        self.cohort.down.pop(which % len(self.cohort.down))

    @precondition(lambda self: self.cohort.up)
    @rule(which=st.integers(0, 30), place=st.integers(0, 255))
    def a_message_is_damaged(self, which: int, place: int) -> None:
        index = which % len(self.cohort.up)
        sender, event = self.cohort.up[index]
        self.cohort.up[index] = (sender, damaged(event, place))

    # --- both ends ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.cohort.gone) <= len(self.cohort.names) // 3)
    @rule(which=st.integers(0, 6), told=st.booleans())
    def a_device_vanishes(self, which: int, told: bool) -> None:
        name = self.cohort.names[which % len(self.cohort.names)]
        if told:
            self.cohort.vanish([name])
        else:
            self.cohort.gone.add(name)

    @rule(which=st.integers(0, 6))
    def a_device_is_offline_for_a_while(self, which: int) -> None:
        self.cohort.tell_server(aggregator.AgentGone(self.cohort.names[which % len(self.cohort.names)]))

    @rule()
    def devices_repeat(self) -> None:
        self.cohort.now += 11.0
        for name in self.cohort.names:
            self.cohort.tell_device(name, device.Tick())
            if name in self.cohort.stored:
                self.cohort.send_up(aggregator.MaskedStored(name))

    @rule()
    def time_passes(self) -> None:
        self.cohort.now += PHASE_S / 2 + 1
        self.cohort.tell_server(aggregator.Tick())

    @precondition(lambda self: self.cohort.stored)
    @rule()
    def the_round_ends(self) -> None:
        self.cohort.tell_server(aggregator.CloseMasking())

    @rule(clock=st.sampled_from([0.0, 1e6]))
    def the_aggregator_restarts(self, clock: float) -> None:
        """With another clock; what it was saying is lost, and its journal is there."""
        cohort = self.cohort
        again = Server(cohort.context, cohort.names, cohort.terms, phase_s=PHASE_S)
        again.start(clock)
        for event in cohort.journal:
            again.replay(event)
        assert again.phase is cohort.server.phase
        cohort.server, cohort.now = again, max(clock, cohort.now)
        cohort.down.clear()
        cohort.server_says(again.resume(cohort.now))

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def the_sum_is_exact(self) -> None:
        plan = self.cohort.plan
        if plan is not None:
            assert len(plan.survivors) >= self.cohort.terms.min_agents
            assert np.array_equal(self.cohort.total, self.cohort.plain_sum(plan.survivors))

    @invariant()
    def nobody_reveals_two_kinds_of_share_of_one_device(self) -> None:
        for event in self.cohort.heard:
            if isinstance(event, aggregator.RevealArrived):
                seeds, keys = self.seen[event.agent]
                seeds |= event.seeds.keys()
                keys |= event.keys.keys()
                assert not seeds & keys

    @invariant()
    def either_a_sum_or_none(self) -> None:
        cohort = self.cohort
        assert (cohort.plan is not None) == (cohort.server.phase is ServerPhase.DONE)
        assert (cohort.aborted is not None) == (cohort.server.phase is ServerPhase.ABORTED)

    def teardown(self) -> None:
        if not hasattr(self, "cohort"):
            return
        for _ in ServerPhase:
            self.cohort.run()
            self.devices_repeat()
            self.cohort.run()
            self.cohort.time_out()
        assert self.cohort.plan is not None or self.cohort.aborted is not None, "it ends"
        self.the_sum_is_exact()
        self.nobody_reveals_two_kinds_of_share_of_one_device()


Masking.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMasking = Masking.TestCase
