"""What an aggregator can find out from all that it receives and stores, honest or not: nothing but the sum."""

from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from masking_cohort import Cohort, names_of

from privacy.secagg.agreement import Terms, context_of, roster_digest, seed_commitment, survivors_digest
from privacy.secagg.client_messages import (
    Abort,
    AgreementsArrived,
    ApplyMasks,
    Ignored,
    RosterArrived,
    SendAgreement,
    SendReveal,
    SharesArrived,
    SurvivorsArrived,
)
from privacy.secagg.errors import UnrecoverableError
from privacy.secagg.graph import graph_of
from privacy.secagg.masks import MaskedVector, apply_mask, own_mask, pair_mask
from privacy.secagg.server_messages import (
    RevealArrived,
    ServerPhase,
)
from privacy.secagg.server_messages import SharesArrived as SharesUp
from privacy.secagg.shamir import combine

TERMS = Terms(3, 0.3)
UNIFORM_LIMIT = 400.0
"""Of chi-squared with 255 degrees of freedom: exceeded once in ten million vectors that are uniform."""


def chi_squared(vector: MaskedVector) -> float:
    """How far the bytes of a vector are from uniform."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    expected = vector.nbytes / 256
    return float(((counts - expected) ** 2).sum() / expected)


def finished(count: int, *, lost: int, length: int = 8192) -> Cohort:
    """A sum of vectors that are anything but uniform, in which some vanished after they had shared, some with a vector."""
    cohort = Cohort(names_of(count), TERMS, length=length)
    for number, name in enumerate(cohort.names):
        cohort.vectors[name] = np.full(length, 7 * number, np.uint16)
    cohort.reach(ServerPhase.MASKED)
    cohort.vanish(cohort.names[1::3][:lost])
    cohort.run()
    assert cohort.plan is not None
    assert np.array_equal(cohort.total, cohort.plain_sum(cohort.plan.survivors))
    return cohort


def revealed(cohort: Cohort) -> tuple[dict[str, dict[int, bytes]], dict[str, dict[int, bytes]]]:
    """All shares that the aggregator was ever sent, by owner and point: of seeds, and of mask keys."""
    graph = graph_of(cohort.names, roster_digest(cohort.context, cohort.names), TERMS)
    seeds: dict[str, dict[int, bytes]] = {name: {} for name in cohort.names}
    keys: dict[str, dict[int, bytes]] = {name: {} for name in cohort.names}
    for event in cohort.heard:
        if isinstance(event, RevealArrived):
            for owner, share in event.seeds.items():
                seeds[owner][graph.point(event.agent)] = share
            for owner, share in event.keys.items():
                keys[owner][graph.point(event.agent)] = share
    return seeds, keys


# --- an honest aggregator that is curious ---------------------------------------------------------------------------


def test_each_masked_vector_looks_uniform_whatever_it_hides() -> None:
    cohort = finished(8, lost=0)
    assert chi_squared(cohort.vectors[cohort.names[1]]) > 1e5, "the test sees what is not uniform"
    for name in cohort.names:
        assert chi_squared(cohort.stored[name]) < UNIFORM_LIMIT
        # And so do differences: no mask is used twice.
        for other in cohort.names:
            assert name == other or chi_squared(cohort.stored[name] - cohort.stored[other]) < UNIFORM_LIMIT


def test_the_same_vector_is_masked_differently_each_time() -> None:
    first, second = finished(4, lost=0), finished(4, lost=0)
    for name in first.names:
        assert chi_squared(first.stored[name] - second.stored[name]) < UNIFORM_LIMIT


@pytest.mark.parametrize(("count", "lost"), [(7, 0), (7, 2), (12, 3), (60, 15)])
def test_all_that_was_revealed_unmasks_no_single_vector(count: int, lost: int) -> None:
    """Recover every secret that the shares give, take off all masks that follow from them: what is left is uniform."""
    cohort = finished(count, lost=lost)
    graph = graph_of(cohort.names, roster_digest(cohort.context, cohort.names), TERMS)
    threshold, roster = graph.size.threshold, roster_digest(cohort.context, cohort.names)
    seeds, keys = revealed(cohort)
    known_seeds = {
        owner: combine(dict(list(shares.items())[:threshold]))
        for owner, shares in seeds.items()
        if len(shares) >= threshold
    }
    known_keys = {
        owner: X25519PrivateKey.from_private_bytes(combine(dict(list(shares.items())[:threshold])))
        for owner, shares in keys.items()
        if len(shares) >= threshold
    }
    assert cohort.plan is not None
    assert known_seeds.keys() == set(cohort.plan.survivors)
    assert known_keys.keys() == set(cohort.names) - set(cohort.plan.survivors)
    assert not known_seeds.keys() & known_keys.keys(), "never both secrets of one device"
    assert all(not seeds[owner] or not keys[owner] for owner in cohort.names), (
        "not even single shares of both"
    )
    for name in cohort.stored:
        rest = cohort.stored[name].copy()
        if name in known_seeds:
            apply_mask(rest, own_mask(known_seeds[name], roster).inverted())
        for peer in graph.neighbours(name):
            if name in known_keys:
                mask = pair_mask(known_keys[name], cohort.keys[peer].mask, roster, name, peer)
                apply_mask(rest, mask.inverted())
            elif peer in known_keys:
                apply_mask(rest, pair_mask(known_keys[peer], cohort.keys[name].mask, roster, peer, name))
        assert chi_squared(rest) < UNIFORM_LIMIT, name


def test_a_vector_that_comes_too_late_stays_hidden() -> None:
    """The device was taken for vanished, and its mask key is known; the mask of its own still covers its vector."""
    cohort = Cohort(names_of(6), TERMS, length=8192)
    slow = cohort.names[2]
    cohort.reach(ServerPhase.MASKED)
    shares = next(event for to, event in cohort.down if to == slow and isinstance(event, SharesArrived))
    cohort.gone.add(slow)
    cohort.run()
    cohort.time_out()
    cohort.run()
    assert cohort.plan is not None
    late = np.zeros(8192, np.uint16)
    masks = cohort.clients[slow].handle(shares, cohort.now)[0]
    assert isinstance(masks, ApplyMasks)
    masks.plan.apply(late)
    private = X25519PrivateKey.from_private_bytes(cohort.plan.private_keys[slow])
    for peer, public in cohort.plan.neighbours[slow].items():
        apply_mask(late, pair_mask(private, public, cohort.plan.roster, slow, peer).inverted())
    assert chi_squared(late) < UNIFORM_LIMIT


def test_sealed_shares_show_no_share_to_the_aggregator() -> None:
    cohort = finished(7, lost=2)
    passed_on = b"".join(
        ciphertext
        for event in cohort.heard
        if isinstance(event, SharesUp)
        for ciphertext in event.sealed.values()
    )
    seeds, keys = revealed(cohort)
    shares = [share for kind in (seeds, keys) for by_point in kind.values() for share in by_point.values()]
    assert len(shares) > 30
    assert not any(share[1:] in passed_on for share in shares)


def test_a_commitment_is_of_no_use_under_another_name_or_context() -> None:
    seed = bytes(range(32))
    made = {
        seed_commitment(context_of(round_number), name, seed)
        for round_number in (1, 2)
        for name in ("a", "b")
    }
    assert len(made) == 4


# --- an aggregator that lies ----------------------------------------------------------------------------------------


def ready_to_agree(count: int) -> Cohort:
    cohort = Cohort(names_of(count), TERMS)
    cohort.reach(ServerPhase.AGREEMENTS)
    cohort.down.clear()
    return cohort


def agree(cohort: Cohort, name: str, survivors: tuple[str, ...]) -> bytes:
    """Tell a device who survives; returns what it signs."""
    said = cohort.clients[name].handle(SurvivorsArrived(survivors), 0.0)[0]
    assert isinstance(said, SendAgreement)
    return said.digest


@pytest.mark.parametrize("told_first", range(1, 10))
def test_two_lists_of_survivors_never_give_both_secrets_of_a_device(told_first: int) -> None:
    """Half of the devices are told that all survive, half that the victim vanished; each passes on all signatures."""
    cohort = ready_to_agree(10)
    victim = cohort.names[-1]
    lists = cohort.names, cohort.names[:-1]
    told = {name: lists[number >= told_first] for number, name in enumerate(cohort.names[:-1])}
    signed = {name: agree(cohort, name, survivors) for name, survivors in told.items()}
    reveals = [cohort.clients[name].handle(AgreementsArrived(signed), 0.0)[0] for name in told]
    of_seed = sum(isinstance(said, SendReveal) and victim in said.seeds for said in reveals)
    of_key = sum(isinstance(said, SendReveal) and victim in said.keys for said in reveals)
    assert min(of_seed, of_key) == 0, "fewer than t agree on at least one of the lists"
    threshold = 7
    assert (of_seed > 0) == (told_first >= threshold)
    assert (of_key > 0) == (9 - told_first >= threshold)


def test_split_evenly_nobody_reveals_anything() -> None:
    cohort = ready_to_agree(10)
    lists = cohort.names, cohort.names[:-1]
    signed = {name: agree(cohort, name, lists[number % 2]) for number, name in enumerate(cohort.names[:-1])}
    for name in signed:
        assert isinstance(cohort.clients[name].handle(AgreementsArrived(signed), 0.0)[0], Ignored)
        assert not cohort.clients[name].revealed


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_colluders_up_to_the_bound_who_sign_everything_do_not_help(colluders: int) -> None:
    """n = 10, t = 7: up to 2t - n - 1 = 3 devices sign both lists and give both shares away."""
    for first in range(10 - colluders):
        cohort = ready_to_agree(10)
        roster = roster_digest(cohort.context, cohort.names)
        victim, traitors = cohort.names[0], cohort.names[10 - colluders :]
        honest = cohort.names[1 : 10 - colluders]
        lists = cohort.names, cohort.names[1:]
        shares = []
        for number, survivors in enumerate(lists):
            told = honest[:first] if number == 0 else honest[first:]
            signed = {name: agree(cohort, name, survivors) for name in told}
            signed |= dict.fromkeys(traitors, survivors_digest(roster, survivors))
            said = [cohort.clients[name].handle(AgreementsArrived(signed), 0.0)[0] for name in told]
            shares.append(colluders + sum(isinstance(command, SendReveal) for command in said))
        # The victim itself agrees that it survives, and reveals the share of its seed that it kept.
        signed = dict.fromkeys((*honest[:first], *traitors), survivors_digest(roster, lists[0]))
        agree(cohort, victim, lists[0])
        last = cohort.clients[victim].handle(AgreementsArrived(signed), 0.0)[0]
        shares[0] += isinstance(last, SendReveal)
        assert min(shares) < 7, (first, shares)


def test_a_device_that_sees_both_lists_gives_up_for_good() -> None:
    cohort = ready_to_agree(10)
    name = cohort.names[0]
    digest = agree(cohort, name, cohort.names)
    commands = cohort.clients[name].handle(SurvivorsArrived(cohort.names[:-1]), 0.0)
    assert isinstance(commands[0], Abort)
    everybody = AgreementsArrived(dict.fromkeys(cohort.names, digest))
    assert cohort.clients[name].handle(everybody, 0.0) == []


def test_signatures_of_another_context_do_not_count() -> None:
    cohort = ready_to_agree(10)
    name = cohort.names[0]
    agree(cohort, name, cohort.names)
    elsewhere = survivors_digest(roster_digest(context_of("another round"), cohort.names), cohort.names)
    said = cohort.clients[name].handle(AgreementsArrived(dict.fromkeys(cohort.names, elsewhere)), 0.0)
    assert isinstance(said[0], Ignored)


def test_shares_of_another_round_cannot_be_replayed() -> None:
    """The same device, with the keys and shares that it sent in an earlier round."""
    earlier = Cohort(names_of(6), TERMS, context=context_of("round", 1))
    earlier.reach(ServerPhase.MASKED)
    now = Cohort(names_of(6), TERMS, context=context_of("round", 2))
    now.reach(ServerPhase.SHARES)
    me, replayed = now.names[0], now.names[1]
    roster = next(event for to, event in now.down if to == me and isinstance(event, RosterArrived))
    client = now.clients[me]
    client.handle(RosterArrived(roster.names, {**roster.keys, replayed: earlier.keys[replayed]}), 0.0)
    old = next(event for to, event in earlier.down if to == me and isinstance(event, SharesArrived))
    commands = client.handle(SharesArrived(old.sealed), 0.0)
    assert [type(command) for command in commands] == [Abort]


def test_fewer_holders_than_the_threshold_rebuild_nothing() -> None:
    """Any group of devices below the threshold that pools what it holds of a neighbour."""
    cohort = Cohort(names_of(7), TERMS)
    cohort.reach(ServerPhase.REVEALS)
    cohort.hold_reveals = True
    cohort.run()
    commitment = cohort.keys[cohort.names[0]].seed_commitment
    graph = graph_of(cohort.names, roster_digest(cohort.context, cohort.names), TERMS)
    shares = {graph.point(event.agent): event.seeds[cohort.names[0]] for event in cohort.held}
    threshold = graph.size.threshold
    enough = combine(dict(list(shares.items())[:threshold]))
    assert seed_commitment(cohort.context, cohort.names[0], enough) == commitment
    for chosen in combinations(shares, threshold - 1):
        known = {point: shares[point] for point in chosen}
        # The polynomial of lower degree through them is another one.
        assert _other(known, cohort, commitment)


def _other(known: dict[int, bytes], cohort: Cohort, commitment: bytes) -> bool:
    try:
        return seed_commitment(cohort.context, cohort.names[0], combine(known)) != commitment
    except UnrecoverableError:
        return True
