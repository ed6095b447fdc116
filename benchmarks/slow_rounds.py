"""Rounds of real processes over a bad link: what they take beyond training, against what the link itself needs."""

from collections.abc import Sequence

from aggregator.store import Store
from aggregator.traffic import TrafficLog
from benchmarks.bad_link import SERVER_ADDRESS, BadLink, Quality, missing
from benchmarks.fleets import Fleet, Round, Run
from benchmarks.processes import Children
from benchmarks.runner import BenchmarkError, Options, Results, middle, say
from federation.wire.signing import AGGREGATOR

ROUND_TRIPS = 3.5
"""Of a round that loses nothing: half a one for the plan, then subscribe and chunks, offer and credit, chunks and receipt."""

TELEMETRY_S = 3600.0
"""Only what each round has moved is to be told."""

RUN_S = 900.0


def bad_link(children: Children, options: Options, results: Results, data: str, suffix: str) -> None:
    """One device behind 1 Mbit/s, 50 ms and 1 % loss, with the default encodings and with float32."""
    reason = missing()
    if reason:
        say(f"badlink: left out, {reason}")
        return
    quality = Quality()
    line = f"{quality.bits_s / 1e6:g} Mbit/s, {1000 * quality.round_trip_s:g} ms there and back, {quality.loss:.0%} loss each way"
    rounds = 3 if options.quick else 6
    full = {"up_encoding": "float32", "down_encoding": "full"}
    for key, settings in (("badlink", {}), ("badlink_float32", full)):
        say(f"{key}: cnn, one agent behind {line}, {rounds} rounds")
        run = Run("cnn", data, rounds, 1, train={"max_steps": 1, "batch_size": 2}, settings=settings)
        with BadLink(quality) as link:
            fleet = Fleet(
                children,
                options.folder / key,
                run,
                host=SERVER_ADDRESS,
                server_prefix=link.server,
                agent_prefix=link.device,
                telemetry_s=TELEMETRY_S,
            )
            agents = fleet.join([f"{data}@iid,agent=1/5"])
            server = fleet.serve()
            done = fleet.finish(server, RUN_S)
            children.stop(server, *agents)
            counts = link.counts()
        least = least_seconds(fleet, done, quality)
        beyond = [each.seconds - each.longest_training_s for each in done]
        for number, (took, bound) in enumerate(zip(beyond, least, strict=True), 1):
            say(f"    round {number}: {took:.2f} s beyond training, {bound:.2f} s at least")
        how = f"{line}; opening to closing less training; {'default encodings' if not settings else 'float32, whole models'}"
        results.add(f"{key}_first_s{suffix}", beyond[0], "s", f"first round: the whole model down; {how}")
        results.add(
            f"{key}_first_least_s{suffix}", least[0], "s", f"payload bytes / rate + {ROUND_TRIPS} round trips"
        )
        results.add(
            f"{key}_s{suffix}", middle(beyond[1:]), "s", f"later rounds, median of {rounds - 1}; {how}"
        )
        results.add(
            f"{key}_least_s{suffix}",
            middle(least[1:]),
            "s",
            f"payload bytes / rate + {ROUND_TRIPS} round trips",
        )
        results.add(
            f"{key}_lost_packets{suffix}",
            counts["down_lost_packets"] + counts["up_lost_packets"],
            "packets",
            "that the link dropped and TCP sent again",
        )


def least_seconds(fleet: Fleet, rounds: Sequence[Round], quality: Quality) -> list[float]:
    """What an ideal transfer of each round's payloads would take over the link, seconds.

    ::

        t = 8 (bytes up + bytes down) / rate + round trips * round-trip time

    The bytes are the payloads of all messages that the agent has sent and received for the round, as it has counted
    them: model or delta, update, plan, offer, credits and receipt.
    """
    with Store(fleet.state) as store:
        moved = {
            entry.round: entry.moved.sent_payload_bytes + entry.moved.received_payload_bytes
            for entry in TrafficLog(store).read()
            if entry.agent != AGGREGATOR
        }
    if any(each.row.round not in moved for each in rounds):
        raise BenchmarkError(f"the agent has not told what every round has moved: {sorted(moved)}")
    return [
        8 * moved[each.row.round] / quality.bits_s + ROUND_TRIPS * quality.round_trip_s for each in rounds
    ]
