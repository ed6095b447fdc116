"""The state machine of masked sums, made from a plan and fed from a journal."""

from pathlib import Path

from aggregator.masking_journal import FOLDER, Record, What, read_journal
from federation.wire.masking import (
    Agreement,
    MaskingKeys,
    Reveal,
    SealedShares,
    UpMessage,
    body_up,
    masking_context,
)
from federation.wire.messages import RoundPlan
from privacy.distributed import least_survivors
from privacy.secagg import server_messages as machine
from privacy.secagg.agreement import PublicKeys, Terms, context_of
from privacy.secagg.server import Server


def server_of(plan: RoundPlan, federation: str, phase_s: float) -> Server:
    """The machine of one attempt.

    Args:
        plan: With terms of secure aggregation.
        federation: Its name.
        phase_s: Seconds that each step may last.
    """
    terms = plan.privacy.secagg
    assert terms is not None
    least = least_survivors(
        terms.min_agents,
        agents=len(plan.cohort),
        dropouts=terms.dropouts,
        noise_multiplier=terms.noise_multiplier,
    )
    context = context_of(*masking_context(federation, plan))
    return Server(context, plan.cohort, Terms(min_agents=least, dropouts=terms.dropouts), phase_s=phase_s)


def standing(folder: Path, federation: str, number: int, attempt: int) -> tuple[str, list[str]] | None:
    """Where an attempt stands, read from its journal beside a running server.

    Args:
        folder: ``STATE``.
        federation: Its name.
        number: Of the round.
        attempt: Of the round.

    Returns:
        What is being collected, and of whom it has not come; None if nothing is known.
    """
    path = folder / FOLDER / f"{number:06d}-{attempt:06d}"
    if not path.exists():
        return None
    plan, records, _ = read_journal(path)
    if plan is None:
        return None
    server = server_of(plan, federation, 0.0)
    for record in records:
        server.replay(event_of(record, body_up(record.data) if record.what is What.MESSAGE else None))
    return server.phase.value, sorted(server.missing)


def event_of(record: Record, message: UpMessage | None) -> machine.ServerEvent:
    """What a record is to the machine.

    Args:
        record: From the journal, or about to be.
        message: What its data is, for a message.
    """
    agent = record.agent
    match record.what, message:
        case What.MESSAGE, MaskingKeys() as keys:
            return machine.KeysArrived(agent, PublicKeys(keys.mask, keys.seal, keys.seed_commitment))
        case What.MESSAGE, SealedShares() as shares:
            return machine.SharesArrived(agent, shares.sealed)
        case What.MESSAGE, Agreement() as agreement:
            return machine.AgreementArrived(agent, agreement.digest)
        case What.MESSAGE, Reveal() as reveal:
            return machine.RevealArrived(agent, reveal.seeds, reveal.keys)
        case What.STORED, _:
            return machine.MaskedStored(agent)
        case What.GONE, _:
            return machine.AgentGone(agent)
        case What.CLOSE, _:
            return machine.CloseMasking()
        case _:
            return machine.Tick()
