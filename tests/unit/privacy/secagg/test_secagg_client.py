"""privacy.secagg.client: what a device refuses, and that it reveals once, for one list, one kind of share each."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from masking_cohort import CONTEXT, Cohort, names_of, without

from privacy.secagg.agreement import Terms, context_of
from privacy.secagg.client import MAX_REPEAT_S, Client
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
from privacy.secagg.server_messages import ServerPhase

ME = "agent-0001"
TERMS = Terms(3, 0.2)

Kind = TypeVar("Kind", bound=ClientEvent)


def cohort_before(phase: ServerPhase, count: int = 6) -> Cohort:
    """Six devices, of which t = 4 are needed; the aggregator has just begun the phase, and told nobody yet."""
    cohort = Cohort(names_of(count), TERMS)
    cohort.reach(phase)
    return cohort


def under_way(cohort: Cohort, kind: type[Kind], name: str = ME) -> Kind:
    """What the aggregator has just sent to a device."""
    return next(event for to, event in cohort.down if to == name and isinstance(event, kind))


def aborted(commands: list[ClientCommand], why: str) -> bool:
    return len(commands) == 1 and isinstance(commands[0], Abort) and why in commands[0].reason


# --- the roster ---------------------------------------------------------------------------------------------------


def changed_names(roster: RosterArrived, change: Callable[[list[str]], list[str]]) -> RosterArrived:
    return replace(roster, names=tuple(change(list(roster.names))))


BAD_ROSTERS: dict[str, tuple[Callable[[RosterArrived], RosterArrived], str]] = {
    "too small": (lambda roster: changed_names(roster, lambda names: names[:2]), "at least 3"),
    "without me": (
        lambda roster: changed_names(roster, lambda names: [n for n in names if n != ME]),
        "without",
    ),
    "unsorted": (lambda roster: changed_names(roster, lambda names: names[::-1]), "not sorted"),
    "a name twice": (lambda roster: changed_names(roster, lambda names: [names[0], *names]), "twice"),
    "a neighbour's keys are missing": (
        lambda roster: replace(roster, keys={k: v for k, v in roster.keys.items() if k != "agent-0003"}),
        "keys of others",
    ),
    "keys of a stranger": (
        lambda roster: replace(roster, keys={**roster.keys, "stranger": roster.keys[ME]}),
        "keys of others",
    ),
    "other keys of mine": (
        lambda roster: replace(roster, keys={**roster.keys, ME: roster.keys["agent-0002"]}),
        "other keys of this device",
    ),
    "a key of low order": (
        lambda roster: replace(
            roster, keys={**roster.keys, "agent-0002": replace(roster.keys["agent-0002"], seal=bytes(32))}
        ),
        "X25519",
    ),
}


@pytest.mark.parametrize("case", BAD_ROSTERS)
def test_a_bad_roster_ends_it(case: str) -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    change, why = BAD_ROSTERS[case]
    commands = cohort.clients[ME].handle(change(under_way(cohort, RosterArrived)), 0.0)
    assert aborted(commands, why), commands
    assert cohort.clients[ME].phase is ClientPhase.ABORTED
    assert cohort.clients[ME].handle(under_way(cohort, RosterArrived), 0.0) == []


def test_the_same_roster_again_is_answered_alike() -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    roster, client = under_way(cohort, RosterArrived), cohort.clients[ME]
    first = client.handle(roster, 0.0)
    assert isinstance(first[0], SendShares)
    assert client.handle(roster, 1.0) == first


def test_another_roster_ends_it() -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    roster, client = under_way(cohort, RosterArrived), cohort.clients[ME]
    client.handle(roster, 0.0)
    other = replace(
        roster, names=roster.names[:-1], keys={k: v for k, v in roster.keys.items() if k != "agent-0005"}
    )
    assert aborted(client.handle(other, 0.0), "two different rosters")


# --- shares -------------------------------------------------------------------------------------------------------


def test_shares_of_a_stranger_end_it() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    shares = under_way(cohort, SharesArrived)
    stranger = SharesArrived({**shares.sealed, "stranger": bytes(82)})
    assert aborted(cohort.clients[ME].handle(stranger, 0.0), "no neighbour")


@pytest.mark.parametrize("place", [0, 40, 81])
def test_a_flipped_bit_in_sealed_shares_is_found(place: int) -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    shares = under_way(cohort, SharesArrived)
    damaged = bytearray(shares.sealed["agent-0002"])
    damaged[place] ^= 1
    commands = cohort.clients[ME].handle(SharesArrived({**shares.sealed, "agent-0002": bytes(damaged)}), 0.0)
    assert [type(command) for command in commands] == [Ignored, ApplyMasks]
    # It masks with the sender all the same: the aggregator counts on it.
    masks = commands[1]
    assert isinstance(masks, ApplyMasks)
    assert len(masks.plan) == 1 + 5


@pytest.mark.parametrize(
    "wrong", [b"", bytes(81), bytes(83)], ids=["none", "a byte short", "a byte too long"]
)
def test_shares_of_another_length_do_not_count(wrong: bytes) -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    sealed = under_way(cohort, SharesArrived).sealed
    commands = cohort.clients[ME].handle(SharesArrived({**sealed, "agent-0002": wrong}), 0.0)
    assert isinstance(commands[0], Ignored)
    assert "bytes" in commands[0].reason


def test_shares_for_another_device_do_not_count() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    mine, theirs = under_way(cohort, SharesArrived), under_way(cohort, SharesArrived, "agent-0003")
    swapped = SharesArrived({**mine.sealed, "agent-0002": theirs.sealed["agent-0002"]})
    assert "did not seal" in str(cohort.clients[ME].handle(swapped, 0.0)[0])


def test_one_neighbours_shares_do_not_pass_as_anothers() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    sealed = under_way(cohort, SharesArrived).sealed
    swapped = {**sealed, "agent-0002": sealed["agent-0003"], "agent-0003": sealed["agent-0002"]}
    commands = cohort.clients[ME].handle(SharesArrived(swapped), 0.0)
    assert [type(command) for command in commands] == [Ignored, Ignored, ApplyMasks]


def test_shares_of_another_roster_do_not_count() -> None:
    """The same devices with the same keys, but one more in the roster that some were told."""
    cohort = cohort_before(ServerPhase.SHARES)
    roster = under_way(cohort, RosterArrived, "agent-0002")
    fewer = RosterArrived(roster.names[:-1], {k: v for k, v in roster.keys.items() if k != "agent-0005"})
    said = cohort.clients["agent-0002"].handle(fewer, 0.0)[0]
    assert isinstance(said, SendShares)
    cohort.up = [(name, event) for name, event in cohort.up if name != "agent-0002"]
    cohort.tell_device(ME, under_way(cohort, RosterArrived))
    commands = cohort.clients[ME].handle(SharesArrived({"agent-0002": said.sealed[ME]}), 0.0)
    assert aborted(commands, "shares of 1 holders")


def test_too_few_neighbours_that_shared_end_it() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    sealed = under_way(cohort, SharesArrived).sealed
    three = dict(list(sealed.items())[:3])
    enough = Cohort(names_of(6), TERMS)
    enough.reach(ServerPhase.MASKED)
    assert isinstance(cohort.clients[ME].handle(SharesArrived(three), 0.0)[0], ApplyMasks)
    two = dict(list(under_way(enough, SharesArrived).sealed.items())[:2])
    assert aborted(enough.clients[ME].handle(SharesArrived(two), 0.0), "4 are needed")


def test_shares_before_the_roster_are_ignored() -> None:
    client = Client(ME, CONTEXT, TERMS)
    assert isinstance(client.handle(SharesArrived({}), 0.0)[0], Ignored)
    assert client.phase is ClientPhase.ROSTER


def test_masks_are_given_once_and_other_shares_end_it() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    shares, client = under_way(cohort, SharesArrived), cohort.clients[ME]
    first = client.handle(shares, 0.0)[0]
    assert isinstance(first, ApplyMasks)
    assert client.handle(shares, 0.0) == []
    assert aborted(
        client.handle(SharesArrived(without(shares.sealed, "agent-0002")), 0.0), "two different sets"
    )
    with pytest.raises(RefusedError):
        first.plan.apply(np.zeros(4, np.uint16))


# --- survivors ----------------------------------------------------------------------------------------------------

ALL = names_of(6)

BAD_SURVIVORS = {
    "without me": (tuple(name for name in ALL if name != ME), "too late"),
    "too few": (ALL[:2], "at least 3"),
    "unsorted": (ALL[::-1], "not sorted"),
    "one twice": ((ALL[0], *ALL), "not sorted"),
    "a stranger": ((*ALL, "stranger"), "not of the roster"),
    "below the threshold": (ALL[:3], "4 are needed"),
}


@pytest.mark.parametrize("case", BAD_SURVIVORS)
def test_bad_survivors_end_it(case: str) -> None:
    cohort = cohort_before(ServerPhase.AGREEMENTS)
    names, why = BAD_SURVIVORS[case]
    assert aborted(cohort.clients[ME].handle(SurvivorsArrived(names), 0.0), why)


def test_a_survivor_whose_shares_never_came_ends_it() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    shares = under_way(cohort, SharesArrived)
    client = cohort.clients[ME]
    client.handle(SharesArrived(without(shares.sealed, "agent-0002")), 0.0)
    client.handle(VectorMasked(), 0.0)
    assert aborted(client.handle(SurvivorsArrived(ALL), 0.0), "never came")


def test_being_counted_without_having_sent_anything_ends_it() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    client = cohort.clients[ME]
    client.handle(under_way(cohort, SharesArrived), 0.0)
    assert aborted(client.handle(SurvivorsArrived(ALL), 0.0), "has sent no vector")


def test_survivors_before_the_shares_are_ignored() -> None:
    cohort = cohort_before(ServerPhase.SHARES)
    client = cohort.clients[ME]
    assert isinstance(client.handle(SurvivorsArrived(ALL), 0.0)[0], Ignored)
    assert isinstance(client.handle(AgreementsArrived({}), 0.0)[0], Ignored)


@pytest.mark.parametrize("after_reveal", [False, True])
def test_a_second_list_of_survivors_ends_it_for_good(after_reveal: bool) -> None:
    cohort = cohort_before(ServerPhase.AGREEMENTS)
    client, survivors = cohort.clients[ME], under_way(cohort, SurvivorsArrived)
    said = client.handle(survivors, 0.0)
    assert client.handle(survivors, 0.0) == said, "the same list again is answered alike"
    if after_reveal:
        cohort.reach(ServerPhase.REVEALS)
        cohort.run()
        assert client.revealed
    other = SurvivorsArrived(ALL[:-1])
    assert aborted(client.handle(other, 0.0), "two different lists")
    for event in (survivors, other, AgreementsArrived(dict.fromkeys(ALL, bytes(32))), Tick()):
        assert client.handle(event, 1e9) == []


# --- the reveal ---------------------------------------------------------------------------------------------------


def agreeing(cohort: Cohort) -> tuple[Client, bytes]:
    """A device that has agreed, and the digest that it has signed."""
    client = cohort.clients[ME]
    said = client.handle(under_way(cohort, SurvivorsArrived), 0.0)[0]
    assert isinstance(said, SendAgreement)
    return client, said.digest


def test_fewer_than_t_signatures_reveal_nothing() -> None:
    client, digest = agreeing(cohort_before(ServerPhase.AGREEMENTS))
    two = AgreementsArrived({"agent-0002": digest, "agent-0003": digest})
    assert isinstance(client.handle(two, 0.0)[0], Ignored)
    assert not client.revealed
    three = AgreementsArrived({**two.digests, "agent-0004": digest})
    assert isinstance(client.handle(three, 0.0)[0], SendReveal), "the device itself is the fourth"
    assert client.revealed


def test_signatures_on_another_list_or_of_strangers_do_not_count() -> None:
    client, digest = agreeing(cohort_before(ServerPhase.AGREEMENTS))
    others = {
        "agent-0002": digest,
        "agent-0003": digest,
        "agent-0004": bytes(32),
        ME: digest,
        "stranger": digest,
    }
    assert isinstance(client.handle(AgreementsArrived(others), 0.0)[0], Ignored)
    assert not client.revealed


def test_signatures_of_those_that_vanished_do_not_count() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    cohort.vanish(["agent-0005"])
    cohort.reach(ServerPhase.AGREEMENTS)
    client, digest = agreeing(cohort)
    signers = AgreementsArrived(dict.fromkeys(("agent-0002", "agent-0003", "agent-0005"), digest))
    assert isinstance(client.handle(signers, 0.0)[0], Ignored)


def test_it_reveals_one_kind_of_share_for_each_neighbour_and_repeats_only_that() -> None:
    cohort = cohort_before(ServerPhase.MASKED)
    cohort.vanish(["agent-0005"])
    cohort.reach(ServerPhase.REVEALS)
    agreements = under_way(cohort, AgreementsArrived)
    said = cohort.clients[ME].handle(agreements, 0.0)
    assert isinstance(said[0], SendReveal)
    assert said[0].seeds.keys() == set(ALL[:-1])
    assert said[0].keys.keys() == {"agent-0005"}
    assert cohort.clients[ME].handle(agreements, 0.0) == said
    assert cohort.clients[ME].handle(AgreementsArrived({}), 0.0) == said


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [ServerPhase.SHARES, ServerPhase.MASKED, ServerPhase.AGREEMENTS])
def test_a_cancelled_device_forgets_its_secrets(phase: ServerPhase) -> None:
    cohort = cohort_before(phase)
    client = cohort.clients[ME]
    assert client.handle(Cancelled("the round is over"), 0.0) == []
    kept = [
        value for value in vars(client).values() if not isinstance(value, str | float | bool | type(None))
    ]
    assert not [
        value for value in kept if "Secrets" in type(value).__name__ or "Group" in type(value).__name__
    ]
    assert client.next_wakeup() is None


def test_keys_are_repeated_until_the_roster_comes() -> None:
    client = Client(ME, CONTEXT, TERMS, repeat_s=5.0)
    keys = client.start(100.0)
    assert isinstance(keys[0], SendKeys)
    assert client.next_wakeup() == 105.0
    assert client.handle(Tick(), 104.0) == []
    assert client.handle(Tick(), 105.0) == keys
    assert client.next_wakeup() == 115.0, "ever more patiently"
    now = 115.0
    for _ in range(5):
        assert client.handle(Tick(), now) == keys
        before, now = now, client.next_wakeup() or 0.0
    assert now == before + MAX_REPEAT_S


def test_each_context_has_fresh_secrets() -> None:
    first, second = (Client(ME, context_of(number), TERMS).start(0.0)[0] for number in (1, 2))
    assert isinstance(first, SendKeys)
    assert isinstance(second, SendKeys)
    assert not {first.keys.mask, first.keys.seal} & {second.keys.mask, second.keys.seal}


def test_no_secret_shows_in_what_is_logged() -> None:
    cohort = cohort_before(ServerPhase.REVEALS)
    reveal = cohort.clients[ME].handle(under_way(cohort, AgreementsArrived), 0.0)[0]
    assert isinstance(reveal, SendReveal)
    assert "\\x" not in repr(reveal)
