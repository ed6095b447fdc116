"""A device and an aggregator that lies, is deceived, or repeats itself: nothing is revealed that should not be."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.identities import Identities
from edge_agent.secure_update import SecureUpdate
from edge_agent.session import Event, MasksReady, WorkFailed
from federation.errors import PeerError, Rejection
from federation.wire import masking
from federation.wire.messages import DeclineCode, FullModel, RoundPlan, TaskSpec, TrainSpec, decode_msgpack
from federation.wire.signing import AGGREGATOR, Envelope, Purpose, seal
from federation.wire.terms import PrivacyTerms, SecAggTerms
from federation.wire.transfer import make_ref
from privacy.secagg import server_messages as machine
from privacy.secagg.agreement import PublicKeys, Terms, context_of
from privacy.secagg.server import Server

FEDERATION = "home"
NAMES = ("a", "b", "c", "d")
BASE = "2" * 64


def plan_of(number: int = 3, attempt: int = 1) -> RoundPlan:
    secagg = SecAggTerms(clip_norm=1.0, modulus_bits=16, min_agents=3, dropouts=0.25, rotation_seed=bytes(16))
    return RoundPlan(
        run="0123456789abcdef",
        round=number,
        attempt=attempt,
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
        privacy=PrivacyTerms(secagg=secagg),
    )


@dataclass
class Fleet:
    """Four devices and an aggregator that speaks as it should, until a test speaks for it."""

    folder: Path
    plan: RoundPlan = field(default_factory=plan_of)
    pinned: Path | None = None
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    events: list[tuple[str, Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
        self.devices = {name: self.device(name) for name in NAMES}
        self.begin(self.plan)

    def begin(self, plan: RoundPlan) -> None:
        self.plan = plan
        context = context_of(*masking.masking_context(FEDERATION, plan))
        self.server = Server(context, NAMES, Terms(3, 0.25), phase_s=60)
        self.server.start(0.0)
        self.sent.clear()
        self.events.clear()
        self.signed: dict[str, bytes] = {}
        self.agreed: dict[str, bytes] = {}

    def device(self, name: str) -> SecureUpdate:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return SecureUpdate(
            folder,
            federation=FEDERATION,
            agent=name,
            key=self.keys[name],
            aggregator_key=self.key.public_key(),
            identities=Identities(FEDERATION, seen=folder / "roster", pinned=self.pinned),
            publish=lambda data: self.sent.append((name, data)),
        )

    def note(self, name: str, events: list[Event]) -> None:
        self.events += [(name, event) for event in events]

    def join(self) -> None:
        for name, device in self.devices.items():
            self.note(name, device.join(self.plan, 0.0))

    def said(self, kind: type) -> list[str]:
        """Who has sent a message of this kind."""
        return [name for name, data in self.sent if isinstance(masking.body_up(data), kind)]

    def commands(self) -> list[machine.ServerCommand]:
        """The aggregator hears what was sent; what it would say."""
        sent, commands = list(self.sent), []
        self.sent.clear()
        for name, data in sent:
            commands += self.server.handle(self.heard(name, data), 0.0)
        return commands

    def heard(self, name: str, data: bytes) -> machine.ServerEvent:
        match masking.body_up(data):
            case masking.MaskingKeys() as keys:
                self.signed[name] = data
                return machine.KeysArrived(name, PublicKeys(keys.mask, keys.seal, keys.seed_commitment))
            case masking.SealedShares(sealed=sealed):
                return machine.SharesArrived(name, sealed)
            case masking.Agreement(digest=digest):
                self.agreed[name] = data
                return machine.AgreementArrived(name, digest)
            case masking.Reveal(seeds=seeds, keys=keys_of):
                return machine.RevealArrived(name, seeds, keys_of)

    def message(self, command: machine.ServerCommand) -> tuple[str, masking.DownMessage]:
        here = {"run": self.plan.run, "round": self.plan.round, "attempt": self.plan.attempt}
        match command:
            case machine.SendRoster(to, names, neighbours):
                members = {
                    name: masking.Member(
                        identity=self.keys[name].public_key().public_bytes_raw(), keys=self.signed[name]
                    )
                    for name in neighbours
                }
                return to, masking.Roster(**here, names=names, members=members)  # type: ignore[arg-type]
            case machine.SendShares(to, sealed):
                return to, masking.SealedShares(**here, sealed=dict(sealed))  # type: ignore[arg-type]
            case machine.SendSurvivors(to, names):
                return to, masking.Survivors(**here, names=names)  # type: ignore[arg-type]
            case machine.SendAgreements(to, signers):
                signed = {name: self.agreed[name] for name in signers}
                return to, masking.Agreements(**here, signed=signed)  # type: ignore[arg-type]
        raise AssertionError(command)

    def tell(self, name: str, message: masking.DownMessage, key: Ed25519PrivateKey | None = None) -> None:
        data = seal(
            message,
            purpose=Purpose.MASKING_DOWN,
            federation=FEDERATION,
            sender=AGGREGATOR,
            key=key or self.key,
        )
        self.note(name, self.devices[name].message(data, 0.0))

    def go_on(self) -> None:
        """One honest step: hear, and say what follows."""
        for command in self.commands():
            self.tell(*self.message(command))

    def until_masked(self) -> None:
        self.join()
        self.go_on()
        self.go_on()
        assert [name for name, event in self.events if isinstance(event, MasksReady)] == list(NAMES)
        for device in self.devices.values():
            device.masked(self.plan.attempt, 0.0)

    def until_agreed(self) -> None:
        self.until_masked()
        for name in NAMES:
            for command in self.server.handle(machine.MaskedStored(name), 0.0):
                self.tell(*self.message(command))
        assert self.said(masking.Agreement) == list(NAMES)

    def failures(self) -> dict[str, str]:
        found = {}
        for name, event in self.events:
            if isinstance(event, WorkFailed):
                assert event.code is DeclineCode.TERMS
                found[name] = event.reason
        return found


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def opened(fleet: Fleet, name: str) -> bool:
    return (fleet.folder / name / "opened").exists()


def test_an_honest_aggregator_gets_its_shares_once_it_is_on_disk_that_they_are_given(fleet: Fleet) -> None:
    fleet.until_agreed()
    assert not any(opened(fleet, name) for name in NAMES)
    fleet.go_on()
    assert set(fleet.said(masking.Reveal)) == set(NAMES)
    assert all(opened(fleet, name) for name in NAMES)
    assert fleet.failures() == {}


# --- the roster ---------------------------------------------------------------------------------------------------


def rosters(fleet: Fleet) -> dict[str, masking.Roster]:
    fleet.join()
    found = dict(fleet.message(command) for command in fleet.commands())
    assert all(isinstance(message, masking.Roster) for message in found.values())
    return found  # type: ignore[return-value]


def test_keys_that_their_owner_has_not_signed_are_refused(fleet: Fleet) -> None:
    roster = rosters(fleet)["a"]
    theirs = masking.body_up(roster.members["b"].keys)
    assert isinstance(theirs, masking.MaskingKeys)
    forged = seal(
        theirs,
        purpose=Purpose.MASKING_KEYS,
        federation=FEDERATION,
        sender="b",
        key=Ed25519PrivateKey.generate(),
    )
    member = msgspec.structs.replace(roster.members["b"], keys=forged)
    fleet.tell("a", msgspec.structs.replace(roster, members=roster.members | {"b": member}))
    assert "not signed with the key known for 'b'" in fleet.failures()["a"]
    assert fleet.said(masking.SealedShares) == []


@pytest.mark.parametrize(("number", "attempt"), [(2, 1), (3, 2)])
def test_keys_of_another_round_or_attempt_are_refused(fleet: Fleet, number: int, attempt: int) -> None:
    roster = rosters(fleet)["a"]
    theirs = masking.body_up(roster.members["b"].keys)
    other = msgspec.structs.replace(theirs, round=number, attempt=attempt)
    replayed = seal(
        other, purpose=Purpose.MASKING_KEYS, federation=FEDERATION, sender="b", key=fleet.keys["b"]
    )
    member = msgspec.structs.replace(roster.members["b"], keys=replayed)
    fleet.tell("a", msgspec.structs.replace(roster, members=roster.members | {"b": member}))
    assert f"the keys of 'b' are of round {number}, attempt {attempt}" in fleet.failures()["a"]


def test_a_signature_for_another_purpose_is_none_for_keys(fleet: Fleet) -> None:
    roster = rosters(fleet)["a"]
    theirs = masking.body_up(roster.members["b"].keys)
    wrong = seal(theirs, purpose=Purpose.MASKING, federation=FEDERATION, sender="b", key=fleet.keys["b"])
    member = msgspec.structs.replace(roster.members["b"], keys=wrong)
    fleet.tell("a", msgspec.structs.replace(roster, members=roster.members | {"b": member}))
    assert "signed for 'masking', not 'masking-keys'" in fleet.failures()["a"]


def test_a_device_that_was_not_invited_is_refused(fleet: Fleet) -> None:
    roster = rosters(fleet)["a"]
    fleet.tell("a", msgspec.structs.replace(roster, names=(*roster.names, "e")))
    assert "'e' is in the roster, and not in the plan" in fleet.failures()["a"]


def test_a_roster_below_the_least_is_refused(fleet: Fleet) -> None:
    roster = rosters(fleet)["a"]
    members = {name: member for name, member in roster.members.items() if name in ("a", "b")}
    fleet.tell("a", msgspec.structs.replace(roster, names=("a", "b"), members=members))
    assert "2 devices in the roster, at least 3 were promised" in fleet.failures()["a"]


def test_a_roster_without_the_device_itself_is_refused(fleet: Fleet) -> None:
    roster = rosters(fleet)["a"]
    members = {name: member for name, member in roster.members.items() if name != "a"}
    fleet.tell("a", msgspec.structs.replace(roster, members=members))
    assert "another identity of this device" in fleet.failures()["a"]


def test_what_the_aggregator_has_not_signed_did_not_come(fleet: Fleet) -> None:
    roster = rosters(fleet)["a"]
    with pytest.raises(PeerError, match="not signed with the key known for 'aggregator'"):
        fleet.tell("a", roster, key=Ed25519PrivateKey.generate())
    fleet.tell("a", roster)
    assert fleet.failures() == {}
    assert fleet.said(masking.SealedShares) == ["a"]


def test_a_key_that_has_changed_is_refused_and_the_file_is_named(fleet: Fleet) -> None:
    fleet.until_masked()
    fleet.keys["b"] = Ed25519PrivateKey.generate()
    fleet.devices["b"] = fleet.device("b")
    fleet.begin(plan_of(4))
    fleet.join()
    fleet.go_on()
    assert set(fleet.failures()) == set(NAMES), (
        "it does not believe in itself either: its disk says otherwise"
    )
    assert "the key of 'b' is another one than in" in fleet.failures()["a"]
    assert "remove the line" in fleet.failures()["a"]


def test_with_a_pinned_roster_an_invented_device_is_refused(tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.toml"
    pinned.write_text("[home]\n")
    honest = Fleet(tmp_path)
    lines = [f'{name} = "{honest.keys[name].public_key().public_bytes_raw().hex()}"' for name in "abc"]
    pinned.write_text("\n".join(["[home]", *lines]) + "\n")
    honest.pinned = pinned
    honest.devices = {name: honest.device(name) for name in NAMES}
    honest.join()
    honest.go_on()
    assert "d not in the roster" in honest.failures()["a"]
    assert "bring it the new roster" in honest.failures()["a"]


# --- shares, survivors, agreements -------------------------------------------------------------------------------


def test_two_lists_of_survivors_make_nobody_reveal(fleet: Fleet) -> None:
    fleet.until_masked()
    here = {"run": fleet.plan.run, "round": 3, "attempt": 1}
    for name, names in (("a", NAMES), ("b", NAMES), ("c", NAMES[:3]), ("d", NAMES)):
        fleet.tell(name, masking.Survivors(**here, names=names))  # type: ignore[arg-type]
    for name, data in fleet.sent:
        if isinstance(masking.body_up(data), masking.Agreement):
            fleet.agreed[name] = data
    fleet.sent.clear()
    split = {"a": ("b",), "b": ("a",), "c": ("a", "b"), "d": ("c",)}
    for name, signers in split.items():
        signed = {signer: fleet.agreed[signer] for signer in signers}
        fleet.tell(name, masking.Agreements(**here, signed=signed))  # type: ignore[arg-type]
    assert fleet.said(masking.Reveal) == []
    assert not any(opened(fleet, name) for name in NAMES)


def test_one_device_is_not_shown_two_lists(fleet: Fleet) -> None:
    fleet.until_masked()
    here = {"run": fleet.plan.run, "round": 3, "attempt": 1}
    fleet.tell("a", masking.Survivors(**here, names=NAMES))  # type: ignore[arg-type]
    fleet.tell("a", masking.Survivors(**here, names=NAMES[:3]))  # type: ignore[arg-type]
    assert "two different lists of survivors" in fleet.failures()["a"]


@pytest.mark.parametrize("what", ["forged", "other attempt", "stranger"])
def test_agreements_that_do_not_count_do_not_make_a_device_reveal(fleet: Fleet, what: str) -> None:
    fleet.until_agreed()
    fleet.commands()  # the aggregator hears them, and says nothing yet
    here = {"run": fleet.plan.run, "round": 3, "attempt": 1}
    bad = {}
    for name in ("b", "c", "d"):
        genuine = masking.body_up(fleet.agreed[name])
        assert isinstance(genuine, masking.Agreement)
        body = msgspec.structs.replace(genuine, attempt=2) if what == "other attempt" else genuine
        key = Ed25519PrivateKey.generate() if what == "forged" else fleet.keys[name]
        sender = "e" if what == "stranger" else name
        bad[sender if what == "stranger" else name] = seal(
            body, purpose=Purpose.MASKING_AGREEMENT, federation=FEDERATION, sender=sender, key=key
        )
    fleet.tell("a", masking.Agreements(**here, signed=bad))  # type: ignore[arg-type]
    assert fleet.said(masking.Reveal) == []
    assert not opened(fleet, "a")


def test_shares_of_another_attempt_are_none_of_this_one(fleet: Fleet) -> None:
    fleet.join()
    fleet.go_on()
    commands = fleet.commands()
    to, shares = next(fleet.message(command) for command in commands)
    before = len(fleet.events)
    fleet.tell(to, msgspec.structs.replace(shares, attempt=2))
    assert len(fleet.events) == before


def test_a_device_opens_one_sum_of_a_round_also_after_a_restart(fleet: Fleet) -> None:
    fleet.until_agreed()
    fleet.go_on()
    assert opened(fleet, "a")
    fleet.devices["a"] = fleet.device("a")
    fleet.begin(plan_of(3, attempt=2))
    fleet.join()
    assert set(fleet.failures()) == set(NAMES)
    assert "has opened the sum of attempt 1" in fleet.failures()["a"]
    assert fleet.sent == []
    fleet.begin(plan_of(4))
    fleet.join()
    assert fleet.failures() == {}, "another round is another matter"
    assert fleet.said(masking.MaskingKeys) == list(NAMES)


def test_what_is_repeated_is_answered_alike(fleet: Fleet) -> None:
    fleet.until_agreed()
    commands = fleet.commands()
    for _ in range(2):
        for command in commands:
            fleet.tell(*fleet.message(command))
    reveals = [data for name, data in fleet.sent if name == "a"]
    assert len(reveals) == 2
    assert reveals[0] == reveals[1]


def test_the_purpose_of_an_envelope_decides_what_it_may_hold(fleet: Fleet) -> None:
    fleet.join()
    _, data = fleet.sent[0]
    envelope = decode_msgpack(data, Envelope)
    keys = fleet.keys["a"].public_key()
    again = msgspec.msgpack.encode(msgspec.structs.replace(envelope, purpose=Purpose.AGENT))
    with pytest.raises(PeerError) as refused:
        masking.unseal_up(again, federation=FEDERATION, sender="a", key=keys)
    assert refused.value.code is Rejection.BAD_SIGNATURE
    shares = masking.SealedShares(run=fleet.plan.run, round=3, attempt=1, sealed={})
    posing = seal(
        shares, purpose=Purpose.MASKING_KEYS, federation=FEDERATION, sender="a", key=fleet.keys["a"]
    )
    with pytest.raises(PeerError, match="malformed"):
        masking.unseal_up(posing, federation=FEDERATION, sender="a", key=keys)
