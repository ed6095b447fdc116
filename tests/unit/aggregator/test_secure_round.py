"""The aggregator's room for masked sums: what is refused, what is journaled, and how it goes on after a crash."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from memory_link import ADDRESS, MemoryBroker

from aggregator.masking_journal import Journal, Record, What, journal_path
from aggregator.rounds import AgentOut, Event, SumFailed, Unmasked
from aggregator.secure_round import SecureRounds
from aggregator.status import collect
from aggregator.status_view import render
from aggregator.store import Store
from federation.errors import ConfigError
from federation.wire import masking
from federation.wire.fields import Wire
from federation.wire.messages import FullModel, RoundPlan, TaskSpec, TrainSpec, decode_msgpack
from federation.wire.signing import Envelope, Purpose, seal
from federation.wire.terms import PrivacyTerms, SecAggTerms
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref
from privacy.secagg import client_messages as machine
from privacy.secagg.agreement import PublicKeys, Terms, context_of
from privacy.secagg.client import Client

TOPICS = Topics("home")
NAMES = ("a", "b", "c", "d")
BASE = "2" * 64
PHASE_S = 60.0
HERE = {"run": "0123456789abcdef", "round": 3, "attempt": 1}

PLAN = RoundPlan(
    **HERE,  # type: ignore[arg-type]
    task=TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,)),
    train=TrainSpec(),
    base=BASE,
    full=FullModel(version=BASE, object=make_ref(b"model", 64)),
    deltas=(),
    up_encoding="masked:16",
    max_noise=0.0,
    cohort=NAMES,
    deadline_s=600.0,
    issued_at=0.0,
    upload_chunk_bytes=65536,
    privacy=PrivacyTerms(
        secagg=SecAggTerms(
            clip_norm=1.0, modulus_bits=16, min_agents=3, dropouts=0.25, rotation_seed=bytes(16)
        )
    ),
)


@dataclass
class Room:
    """The room, four devices' machines, and what was said to them."""

    folder: Path
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
        self.broker = MemoryBroker()
        self.store = Store(self.folder / "state", "home", create=True)
        self.clients = {
            name: Client(name, context_of(*masking.masking_context("home", PLAN)), Terms(3, 0.25))
            for name in NAMES
        }
        self.said: dict[str, list[machine.ClientCommand]] = {}
        self.start()

    def start(self) -> None:
        """Begin, or begin again after a crash."""
        link = self.broker.make_link(ADDRESS, "aggregator", on_event=lambda _: None)
        link.start()
        self.secure = SecureRounds(
            link=link,
            topics=TOPICS,
            store=self.store,
            key=self.key,
            key_of=lambda name: self.keys[name].public_key() if name in self.keys else None,
            phase_s=PHASE_S,
        )
        self.secure.open(PLAN)
        self.events += self.secure.announced(0.0)

    def send(self, name: str, message: Wire, purpose: Purpose, **forged: object) -> None:
        how = {"purpose": purpose, "federation": "home", "sender": name, "key": self.keys.get(name)} | forged
        self.events += self.secure.message(name, seal(message, **how), 1.0)  # type: ignore[arg-type]

    def keys_of(self, name: str) -> masking.MaskingKeys:
        if name not in self.said:
            self.said[name] = self.clients[name].start(0.0)
        (command,) = self.said[name]
        assert isinstance(command, machine.SendKeys)
        made = command.keys
        return masking.MaskingKeys(
            **HERE,  # type: ignore[arg-type]
            base=BASE,
            mask=made.mask,
            seal=made.seal,
            seed_commitment=made.seed_commitment,
        )

    def hear(self) -> dict[str, list[masking.DownMessage]]:
        """What each device was told since the last call."""
        heard: dict[str, list[masking.DownMessage]] = {}
        for _, topic, payload in self.broker.log:
            agent = TOPICS.parse_agent(topic)
            assert agent is not None
            body = decode_msgpack(payload, Envelope).body
            message = decode_msgpack(
                body,
                masking.Roster | masking.SealedShares | masking.Survivors | masking.Agreements,  # type: ignore[arg-type]
            )
            heard.setdefault(agent.agent, []).append(message)
        self.broker.log.clear()
        return heard

    def all_keys(self) -> None:
        for name in NAMES:
            self.send(name, self.keys_of(name), Purpose.MASKING_KEYS)

    def shares(self) -> dict[str, masking.SealedShares]:
        """What the devices answer to the roster."""
        made = {}
        for name, messages in self.hear().items():
            roster = messages[-1]
            assert isinstance(roster, masking.Roster)
            keys = {member: self.public(roster.members[member].keys) for member in roster.members}
            (command,) = self.clients[name].handle(machine.RosterArrived(roster.names, keys), 0.0)
            assert isinstance(command, machine.SendShares)
            made[name] = masking.SealedShares(**HERE, sealed=dict(command.sealed))  # type: ignore[arg-type]
        return made

    def public(self, data: bytes) -> PublicKeys:
        keys = masking.body_up(data)
        assert isinstance(keys, masking.MaskingKeys)
        return PublicKeys(keys.mask, keys.seal, keys.seed_commitment)

    def until_masked(self) -> None:
        self.all_keys()
        for name, shares in self.shares().items():
            self.send(name, shares, Purpose.MASKING)
        for name, messages in self.hear().items():
            relayed = messages[-1]
            assert isinstance(relayed, masking.SealedShares)
            self.clients[name].handle(machine.SharesArrived(relayed.sealed), 0.0)
            self.clients[name].handle(machine.VectorMasked(), 0.0)
        assert self.secure.members == set(NAMES)

    def agreements(self, delivered: tuple[str, ...] = NAMES) -> dict[str, masking.Agreement]:
        self.events += self.secure.unmask(delivered, 2.0)
        made = {}
        for name, messages in self.hear().items():
            survivors = messages[-1]
            assert isinstance(survivors, masking.Survivors)
            (command,) = self.clients[name].handle(machine.SurvivorsArrived(survivors.names), 0.0)
            assert isinstance(command, machine.SendAgreement)
            made[name] = masking.Agreement(**HERE, digest=command.digest)  # type: ignore[arg-type]
        return made

    def reveals(self) -> dict[str, masking.Reveal]:
        made = {}
        for name, messages in self.hear().items():
            agreed = messages[-1]
            assert isinstance(agreed, masking.Agreements)
            digests = {}
            for signer, data in agreed.signed.items():
                body = masking.body_up(data)
                assert isinstance(body, masking.Agreement)
                digests[signer] = body.digest
            (command,) = self.clients[name].handle(machine.AgreementsArrived(digests), 0.0)
            assert isinstance(command, machine.SendReveal)
            made[name] = masking.Reveal(**HERE, seeds=dict(command.seeds), keys=dict(command.keys))  # type: ignore[arg-type]
        return made

    def refused(self) -> list[tuple[str, str, str]]:
        return [(agent, code, detail) for _, agent, code, detail, _ in self.store.refusals()]

    def journaled(self) -> int:
        journal = Journal(journal_path(self.store.folder, 3, 1))
        journal.close()
        return len(journal.records)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_the_sum_of_those_that_delivered_is_opened(room: Room) -> None:
    room.until_masked()
    for name, agreement in room.agreements(("a", "b", "d")).items():
        room.send(name, agreement, Purpose.MASKING_AGREEMENT)
    for name, reveal in room.reveals().items():
        assert set(reveal.keys) == {"c"}
        room.send(name, reveal, Purpose.MASKING)
    assert room.events == [Unmasked()]
    plan = room.secure.unmask_plan
    assert plan is not None
    assert plan.survivors == ("a", "b", "d")
    assert set(plan.private_keys) == {"c"}
    assert room.refused() == []


# --- what is refused ----------------------------------------------------------------------------------------------


def test_keys_are_only_taken_from_who_has_signed_them(room: Room) -> None:
    room.send("a", room.keys_of("a"), Purpose.MASKING_KEYS, key=Ed25519PrivateKey.generate())
    room.send("e", room.keys_of("a"), Purpose.MASKING_KEYS, key=Ed25519PrivateKey.generate())
    room.send("b", room.keys_of("b"), Purpose.MASKING_KEYS, sender="a")
    room.send("c", room.keys_of("c"), Purpose.AGENT)
    assert [code for _, code, _ in reversed(room.refused())] == [
        "bad_signature",
        "unknown_agent",
        "wrong_sender",
        "bad_signature",
    ]
    assert room.journaled() == 0


@pytest.mark.parametrize("other", [{"round": 2}, {"attempt": 2}, {"run": "f" * 16}])
def test_what_belongs_to_another_attempt_is_ignored(room: Room, other: dict[str, object]) -> None:
    room.send("a", msgspec.structs.replace(room.keys_of("a"), **other), Purpose.MASKING_KEYS)
    assert (room.journaled(), room.events, room.refused()) == (0, [], [])


def test_keys_for_another_model_are_refused(room: Room) -> None:
    room.send("a", msgspec.structs.replace(room.keys_of("a"), base="3" * 64), Purpose.MASKING_KEYS)
    assert [code for _, code, _ in room.refused()] == ["wrong_base"]


def test_a_public_key_of_low_order_is_refused(room: Room) -> None:
    room.send("a", msgspec.structs.replace(room.keys_of("a"), mask=bytes(32)), Purpose.MASKING_KEYS)
    assert [agent for agent, _, _ in room.refused()] == ["a"]
    assert room.journaled() == 0


def test_shares_for_others_than_the_neighbours_are_refused(room: Room) -> None:
    room.all_keys()
    shares = room.shares()["a"]
    before = room.journaled()
    for sealed in (
        {"b": shares.sealed["b"]},
        shares.sealed | {"e": shares.sealed["b"]},
        dict.fromkeys(shares.sealed, b"x"),
    ):
        room.send("a", msgspec.structs.replace(shares, sealed=sealed), Purpose.MASKING)
    assert room.journaled() == before
    assert room.refused()


def test_an_agreement_on_other_survivors_is_refused(room: Room) -> None:
    room.until_masked()
    agreement = room.agreements()["a"]
    before = room.journaled()
    room.send("a", msgspec.structs.replace(agreement, digest=bytes(32)), Purpose.MASKING_AGREEMENT)
    assert "signed other survivors than it was told" in room.refused()[0][2]
    assert room.journaled() == before


def test_a_reveal_that_nobody_asked_for_is_refused(room: Room) -> None:
    room.until_masked()
    room.agreements()
    reveal = masking.Reveal(**HERE, seeds={"b": bytes(33)}, keys={})  # type: ignore[arg-type]
    room.send("a", reveal, Purpose.MASKING)
    assert "'a' was not asked to reveal" in room.refused()[0][2]


def test_forged_shares_in_a_reveal_are_made_up_for_by_the_others(room: Room) -> None:
    room.until_masked()
    for name, agreement in room.agreements().items():
        room.send(name, agreement, Purpose.MASKING_AGREEMENT)
    reveals = room.reveals()
    false = {owner: bytes(33) for owner in reveals["a"].seeds}
    room.send("a", msgspec.structs.replace(reveals["a"], seeds=false), Purpose.MASKING)
    for name in ("b", "c", "d"):
        room.send(name, reveals[name], Purpose.MASKING)
    assert room.events == [Unmasked()]


def test_after_too_few_agreements_nobody_was_asked_and_the_round_may_try_again(room: Room) -> None:
    room.until_masked()
    agreement = room.agreements()["a"]
    room.send("a", agreement, Purpose.MASKING_AGREEMENT)
    room.events += room.secure.tick(2.0 + PHASE_S)
    assert room.events == [SumFailed(asked=False)]
    assert room.hear() == {}


def test_after_too_few_reveals_the_sum_is_lost(room: Room) -> None:
    room.until_masked()
    for name, agreement in room.agreements().items():
        room.send(name, agreement, Purpose.MASKING_AGREEMENT)
    room.send("a", room.reveals()["a"], Purpose.MASKING)
    room.events += room.secure.tick(1e6)
    assert room.events == [SumFailed(asked=True)]
    assert room.secure.unmask_plan is None


def test_nobody_waits_for_who_is_not_in_the_roster(room: Room) -> None:
    for name in NAMES[:3]:
        room.send(name, room.keys_of(name), Purpose.MASKING_KEYS)
    room.events += room.secure.gone("d", 1.0)
    assert room.events == [AgentOut("d")]
    room.send("d", room.keys_of("d"), Purpose.MASKING_KEYS)
    assert room.refused() == [], "it came too late, and waits for the next attempt"


# --- crashes ------------------------------------------------------------------------------------------------------


def test_after_a_crash_the_same_attempt_goes_on(room: Room) -> None:
    room.all_keys()
    shares = room.shares()
    room.start()
    for name in NAMES:
        room.send(name, shares[name], Purpose.MASKING)
    room.start()
    for name, messages in room.hear().items():
        relayed = messages[-1]
        assert isinstance(relayed, masking.SealedShares)
        room.clients[name].handle(machine.SharesArrived(relayed.sealed), 0.0)
        room.clients[name].handle(machine.VectorMasked(), 0.0)
    agreements = room.agreements()
    room.send("a", agreements["a"], Purpose.MASKING_AGREEMENT)
    room.start()
    assert set(room.hear()) == {"b", "c", "d"}, "whoever has not answered is told again"
    for name in ("b", "c", "d"):
        room.send(name, agreements[name], Purpose.MASKING_AGREEMENT)
    for name, reveal in room.reveals().items():
        room.send(name, reveal, Purpose.MASKING)
    assert room.events == [Unmasked()]
    room.start()
    assert room.events == [Unmasked(), Unmasked()]
    assert room.secure.unmask(NAMES, 9.0) == [Unmasked()]


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_torn_record_never_happened(room: Room, cut: int) -> None:
    for name in NAMES[:2]:
        room.send(name, room.keys_of(name), Purpose.MASKING_KEYS)
    path = journal_path(room.store.folder, 3, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    assert room.journaled() == 1
    room.start()
    room.all_keys()
    assert set(room.hear()) == set(NAMES)


def test_a_record_with_a_flipped_bit_and_all_behind_it_never_happened(room: Room) -> None:
    for name in NAMES[:3]:
        room.send(name, room.keys_of(name), Purpose.MASKING_KEYS)
    path = journal_path(room.store.folder, 3, 1)
    data = bytearray(path.read_bytes())
    data[-len(msgspec.msgpack.encode(Record(what=What.TICK))) - 300] ^= 4
    path.write_bytes(data)
    assert room.journaled() < 3


def test_a_journal_of_another_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal._append(b"\x81\xa1x\x01")
    journal.close()
    with pytest.raises(ConfigError, match=r"another version of fedge .* delete it"):
        Journal(tmp_path / "journal")


def test_what_opened_a_sum_is_deleted_with_its_round(room: Room) -> None:
    room.all_keys()
    room.secure.discard()
    assert list((room.store.folder / "secagg").iterdir()) == []


def test_the_status_tells_which_step_waits_for_whom(room: Room) -> None:
    room.store.open_round(3, 1, NAMES, base=BASE, encoding="masked:16", deadline_s=60, masked=True)

    def shown() -> tuple[str, str, list[str]]:
        row = collect(room.store.folder).rounds[-1]
        return row.phase, row.masking, row.waiting_for

    room.send("a", room.keys_of("a"), Purpose.MASKING_KEYS)
    assert shown() == ("open", "keys", ["b", "c", "d"])
    room.until_masked()
    assert shown() == ("open", "masked", list(NAMES))
    agreement = room.agreements()["b"]
    room.store.start_unmasking(3)
    room.send("b", agreement, Purpose.MASKING_AGREEMENT)
    assert shown() == ("unmasking", "agreements", ["a", "c", "d"])
    assert "unmasking, agreements: waiting for a, c, d" in render(collect(room.store.folder))
