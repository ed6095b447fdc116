"""Plans, offers and receipts for the tests of an agent's session."""

from hashlib import sha256

from edge_agent.session import Command, Event, Session
from federation.errors import Rejection
from federation.wire.messages import (
    FullModel,
    IdlePlan,
    Receipt,
    RoundPlan,
    TaskSpec,
    TrainMetrics,
    TrainSpec,
    UpdateOffer,
)
from federation.wire.terms import PrivacyTerms, SecAggTerms
from federation.wire.transfer import make_ref

RUN, OTHER_RUN = "0123456789abcdef", "fedcba9876543210"
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))


def base_of(number: int, run: str = RUN) -> str:
    """The version that a round starts from."""
    return sha256(f"{run} {number}".encode()).hexdigest()


def full_of(number: int, run: str = RUN, chunk_bytes: int = 64) -> FullModel:
    data = f"model {run} {number} ".encode() * 20
    return FullModel(version=base_of(number, run), object=make_ref(data, chunk_bytes))


def plan(
    number: int = 1,
    *,
    run: str = RUN,
    attempt: int = 1,
    cohort: tuple[str, ...] = ("me", "you"),
    full: FullModel | None = None,
) -> RoundPlan:
    return RoundPlan(
        run=run,
        round=number,
        attempt=attempt,
        task=TASK,
        train=TrainSpec(),
        base=base_of(number, run),
        full=full or full_of(number, run),
        deltas=(),
        up_encoding="float32",
        max_noise=0.0,
        cohort=cohort,
        deadline_s=60,
        issued_at=0,
        upload_chunk_bytes=64,
    )


def idle(number: int, run: str = RUN) -> IdlePlan:
    return IdlePlan(run=run, round=number, finished=False, reason="", issued_at=0)


def offer(number: int = 1, run: str = RUN, data: str = "update") -> UpdateOffer:
    return UpdateOffer(
        run=run,
        round=number,
        base=base_of(number, run),
        object=make_ref(f"{data} {run} {number} ".encode() * 10, 64),
        encoding="float32",
        samples=10,
        metrics=TrainMetrics(loss=1.0, accuracy=0.5, steps=1, train_s=1.0),
    )


def receipt(of: UpdateOffer, code: Rejection | None = None) -> Receipt:
    return Receipt(run=of.run, round=of.round, sha256=of.object.sha256, accepted=code is None, code=code)


def feed(session: Session, *events: Event, now: float = 0.0) -> list[Command]:
    return [command for event in events for command in session.handle(event, now)]


MASKED = PrivacyTerms(
    secagg=SecAggTerms(clip_norm=1.0, modulus_bits=16, min_agents=2, dropouts=0.0, rotation_seed=bytes(16))
)
