"""The doctor's checks beyond this device: the broker, the rights there, the aggregator and its plan.

They listen under a client id of their own and publish nothing, so an agent that runs with the same bundle goes on
undisturbed.
"""

import secrets
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from edge_agent.findings import Finding, Level, skipped
from federation.bundle import Bundle, address
from federation.errors import ConfigError, ExitCode, PeerError, TransportError
from federation.task.names import is_plugin
from federation.wire import reasons
from federation.wire.address import LARGEST_PACKET, BrokerAddress
from federation.wire.encodings import encoding_named
from federation.wire.link import Inbox, Link, LinkFailed, Message
from federation.wire.messages import (
    STATE_INTERVAL_S,
    AggregatorState,
    IdlePlan,
    Plan,
    RoundPlan,
    TaskSpec,
    decode_json,
)
from federation.wire.signing import AGGREGATOR, Purpose, public_key, unseal
from federation.wire.topics import Topics

CHECKS = ("name", "network", "login", "rights", "aggregator", "clock", "plan")

REACH_S = 10.0
"""For a TCP connection: slow phones' networks need seconds."""

LOGIN_S = 20.0
"""For TLS and the broker's answer, with one retry."""

LISTEN_S = 5.0
"""For the two retained messages: a broker sends them with its answer to the subscription."""

ALLOWED_SKEW_S = 120.0
"""Clocks that differ by less are in order. No agent acts on its clock, but TLS certificates and logs need it right to
minutes."""

MIN_PACKET_BYTES = 16 * 1024
"""A smaller limit cuts a model of 10 MB into more than 600 chunks, and a plan may not fit."""

_TEN_YEARS_S = 10 * 365 * 86400


@dataclass(slots=True)
class Heard:
    """What a broker told within the time.

    Attributes:
        aggregator: The payload of the aggregator's retained state; empty for none.
        plan: The payload of the retained plan; empty for none.
        refusals: What the broker refused.
    """

    aggregator: bytes = b""
    plan: bytes = b""
    refusals: list[str] = field(default_factory=list)


def examine_broker(bundle: Bundle) -> Generator[Finding, None, TaskSpec | None]:
    """Check everything beyond this device, in the order of :data:`CHECKS`.

    Returns:
        The task of the open round, where one is open and its plan can be trusted.
    """
    where = address(bundle)
    for number, check in enumerate((check_name, check_network), start=1):
        finding = check(where)
        yield finding
        if finding.failed:
            yield from skipped(CHECKS[number:], f"the check {finding.check!r} failed")
            return None
    inbox = Inbox()
    link = Link(
        where, f"{bundle.federation}-{bundle.agent}-doctor-{secrets.token_hex(4)}", on_event=inbox.put
    )
    try:
        finding = check_login(link, bundle)
        yield finding
        if finding.failed:
            yield from skipped(CHECKS[3:], "the check 'login' failed")
            return None
        topics = Topics(bundle.federation)
        heard = listen(link, inbox, topics, bundle.agent)
    finally:
        link.stop()
    yield check_rights(heard, topics, bundle.agent)
    yield from check_aggregator(heard.aggregator, now=time.time())
    finding, plan = check_plan(heard.plan, bundle)
    yield finding
    return plan.task if isinstance(plan, RoundPlan) else None


def check_name(where: BrokerAddress) -> Finding:
    """Whether the broker's host name has an address."""
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return _broker_failure("name", reasons.of_error(where, error).reason)
    addresses = sorted({str(entry[4][0]) for entry in found})
    return Finding(check="name", level=Level.OK, found=f"{where.host} is {', '.join(addresses)}")


def check_network(where: BrokerAddress) -> Finding:
    """Whether something takes TCP connections there."""
    began = time.monotonic()
    try:
        socket.create_connection((where.host, where.port), timeout=REACH_S).close()
    except OSError as error:
        return _broker_failure("network", reasons.of_error(where, error).reason)
    took_ms = 1000 * (time.monotonic() - began)
    return Finding(check="network", level=Level.OK, found=f"{where} takes connections, in {took_ms:.0f} ms")


def check_login(link: Link, bundle: Bundle) -> Finding:
    """Whether the broker lets this device in, and what it accepts then. Starts the link."""
    link.start()
    try:
        link.wait_connected(LOGIN_S)
    except TransportError as error:
        return _broker_failure(
            "login",
            str(error),
            "if the password is refused: enrol again with `aggregator enroll NAME --replace`",
        )
    limits = link.limits
    protocol = "5" if limits.protocol == 5 else "3.1.1"  # noqa: PLR2004 - the version's own name
    known = limits.max_packet_bytes < LARGEST_PACKET
    packets = f"packets up to {limits.max_packet_bytes // 1024} KiB" if known else "no packet limit announced"
    found = f"let in as {bundle.username!r}, MQTT {protocol}, {packets}"
    if limits.max_packet_bytes < MIN_PACKET_BYTES:
        return Finding(
            check="login",
            level=Level.WARN,
            found=found,
            remedy=f"raise the broker's packet limit to at least {MIN_PACKET_BYTES // 1024} KiB",
        )
    return Finding(check="login", level=Level.OK, found=found)


def listen(link: Link, inbox: Inbox, topics: Topics, agent: str) -> Heard:
    """Subscribe as the agent does, except to its state, and hear what is retained."""
    heard = Heard()
    link.subscribe([(topics.down(agent), 1), (topics.aggregator, 1), (topics.plan, 1)])
    deadline = time.monotonic() + LISTEN_S
    while not (heard.aggregator and heard.plan):
        match inbox.get(max(0.0, deadline - time.monotonic())):
            case Message(topic=topics.aggregator, payload=payload):
                heard.aggregator = payload
            case Message(topic=topics.plan, payload=payload):
                heard.plan = payload
            case LinkFailed(error):
                heard.refusals.append(error)
            case None:
                break
    return heard


def check_rights(heard: Heard, topics: Topics, agent: str) -> Finding:
    """Whether the broker refused a subscription that the agent needs. mosquitto refuses none, it stays silent."""
    if heard.refusals:
        return _broker_failure(
            "rights",
            "; ".join(heard.refusals),
            "reload the broker's access list (SIGHUP for mosquitto); its file is written by `aggregator enroll`",
        )
    return Finding(
        check="rights", level=Level.OK, found=f"may subscribe to {topics.down(agent)} and {topics.plan}"
    )


def check_aggregator(payload: bytes, *, now: float) -> list[Finding]:
    """Whether the server is there, and whether its clock agrees with this device's.

    Args:
        payload: Its retained state; empty for none.
        now: Unix seconds by this device's clock.
    """
    if not payload:
        return [
            Finding(
                check="aggregator",
                level=Level.WARN,
                found=f"nothing was heard of it within {LISTEN_S:.0f} s",
                remedy="start `aggregator serve` with this broker; if it runs, check this account's rights to read",
            ),
            *skipped(["clock"], "the aggregator has told no time"),
        ]
    try:
        state = decode_json(payload, AggregatorState)
    except PeerError as error:
        failed = _broker_failure("aggregator", f"its state cannot be read: {error.detail}", _SAME_VERSION)
        return [failed, *skipped(["clock"], "the aggregator has told no time")]
    if state.state == "offline":
        gone = Finding(
            check="aggregator",
            level=Level.WARN,
            found="offline",
            remedy="nothing to do here: the agent waits for it; on the server, start `aggregator serve`",
        )
        return [gone, *skipped(["clock"], "the aggregator is offline")]
    online = Finding(check="aggregator", level=Level.OK, found=f"online, run {state.run}")
    return [online, check_clock(state.time, now)]


def check_clock(told: float, now: float) -> Finding:
    """Compare clocks; ``told`` was true at most ``STATE_INTERVAL_S`` ago, so the difference is known to that only.

    Args:
        told: Unix seconds in the aggregator's state.
        now: Unix seconds by this device's clock.
    """
    behind_s, ahead_s = told - now, now - told - STATE_INTERVAL_S
    if max(behind_s, ahead_s) <= ALLOWED_SKEW_S:
        return Finding(
            check="clock",
            level=Level.OK,
            found=f"agrees with the aggregator's within {STATE_INTERVAL_S + ALLOWED_SKEW_S:.0f} s",
        )
    off = f"{_duration(behind_s)} behind" if behind_s > 0 else f"{_duration(ahead_s)} or more ahead of"
    other = "" if behind_s > 0 else ", or the aggregator died without the broker noticing"
    return Finding(
        check="clock",
        level=Level.WARN,
        found=f"this device is {off} the aggregator{other}; {ALLOWED_SKEW_S:.0f} s are allowed",
        remedy="set the clock, e.g. `timedatectl set-ntp true`; a device without a battery clock needs NTP at boot",
    )


def check_plan(payload: bytes, bundle: Bundle) -> tuple[Finding, Plan | None]:
    """Whether the plan is signed by the pinned aggregator, and what it says for this agent."""
    if not payload:
        none = Finding(
            check="plan",
            level=Level.WARN,
            found="there is none yet",
            remedy="the aggregator publishes one when it serves; if it does, check this account's rights to read",
        )
        return none, None
    try:
        plan: Plan = unseal(
            payload,
            RoundPlan | IdlePlan,  # type: ignore[arg-type]  # msgspec takes a union of tagged structs
            purpose=Purpose.PLAN,
            federation=bundle.federation,
            sender=AGGREGATOR,
            key=public_key(bundle.aggregator_key),
        )
    except (PeerError, ConfigError) as error:
        refused = Finding(
            check="plan",
            level=Level.FAIL,
            found=f"it cannot be trusted: {error}",
            remedy="if the aggregator was set up anew, enrol this device again; else somebody else writes that topic",
        )
        return refused, None
    return _judge(plan, bundle.agent), plan


def _judge(plan: Plan, agent: str) -> Finding:
    if isinstance(plan, IdlePlan):
        what = "the run is finished" if plan.finished else "no round is open"
        return Finding(
            check="plan",
            level=Level.OK,
            found=f"signature verified; {what} after round {plan.round}: {plan.reason}",
        )
    mine = "is in its cohort" if agent in plan.cohort else f"is not among its cohort of {len(plan.cohort)}"
    found = f"signature verified; round {plan.round} is open, {agent!r} {mine}"
    for encoding in (plan.up_encoding, *(delta.encoding for delta in plan.deltas)):
        if not _is_known(encoding):
            return Finding(
                check="plan",
                level=Level.FAIL,
                found=f"{found}; it wants the encoding {encoding!r}, which this version does not know",
                remedy=_SAME_VERSION,
            )
    if is_plugin(plan.task.model):
        return Finding(
            check="plan",
            level=Level.WARN,
            found=f"{found}; it wants the plug-in model {plan.task.model!r}",
            remedy=f"install it here and start the agent with --allow-model {plan.task.model}",
        )
    return Finding(check="plan", level=Level.OK, found=found)


def _is_known(encoding: str) -> bool:
    try:
        encoding_named(encoding)
    except ConfigError:
        return False
    return True


_SAME_VERSION = "install the same version of fedge here and on the server"


def _broker_failure(check: str, found: str, remedy: str = "") -> Finding:
    what, separator, advice = found.rpartition("; ")
    if not remedy and separator:  # the reasons of federation.wire.reasons end with what to do
        found, remedy = what, advice
    return Finding(check=check, level=Level.FAIL, found=found, remedy=remedy, exit_code=ExitCode.BROKER)


def _duration(seconds: float) -> str:
    if seconds > _TEN_YEARS_S:
        return "more than ten years"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
