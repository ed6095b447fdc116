"""Bytes against accuracy: what each encoding saves and costs, and what a real federation saves at its connections.

The table trains in simulation, in which updates and models pass through the product's codec. The ratios are of real
processes: an aggregator with its broker, and five devices behind counting proxies.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from aggregator.config import AggregatorConfig
from benchmarks import subset
from benchmarks.fleets import Fleet, Run
from benchmarks.observer import Observer
from benchmarks.processes import Children
from benchmarks.proxy import CountingProxy, Traffic
from benchmarks.rounds import AGENTS
from benchmarks.runner import Options, Results, main, say
from benchmarks.wire_table import ALTERNATIVE, BASELINE, Pair, table

QUESTION = "what do encodings save on the wire, and what do they cost in accuracy?"
PARTS = ("table", "broker")

BROKER_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of one device, TCP payload, mean over the devices.

    Attributes:
        round: In one round, mean over all but the first.
        whole: From the first connection to the end of the last round.
    """

    round: Traffic
    whole: Traffic


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for."""
    data, suffix = (subset.SPEC, "") if subset.folder() else ("digits", "_digits")
    if suffix:
        say(
            "no MNIST: the built-in digits are used, and all keys end in _digits. Set FEDGE_DATA to have MNIST"
        )
    if "table" in options.parts:
        table(options, data, suffix, results)
    if "broker" in options.parts:
        with Children(options.folder / "logs") as children:
            broker(children, options, data, suffix, results)


def broker(children: Children, options: Options, data: str, suffix: str, results: Results) -> None:
    """Real federations: one in float32 with whole models, one in the default encodings, one in the shortest."""
    rounds = 5 if options.quick else 10
    config = AggregatorConfig()
    default = config.up_encoding, config.down_encoding
    plain = moved(children, options.folder / "float32", data, rounds, BASELINE)
    report(results, "_float32" + suffix, plain, rounds, BASELINE)
    ours = moved(children, options.folder / "default", data, rounds, default)
    report(results, "_default" + suffix, ours, rounds, default)
    compare(results, suffix, plain, ours, rounds, default)
    if not options.quick and default != ALTERNATIVE:
        shortest = moved(children, options.folder / "shortest", data, rounds, ALTERNATIVE)
        report(results, "_shortest" + suffix, shortest, rounds, ALTERNATIVE)
        compare(results, "_shortest" + suffix, plain, shortest, rounds, ALTERNATIVE)


def report(results: Results, suffix: str, side: Moved, rounds: int, pair: Pair) -> None:
    """Add the bytes of one federation."""
    how = f"{_named(pair)}: {_steady(rounds)}"
    results.add(f"up_kb{suffix}", side.round.up / 1000, "KB", f"{how}, up")
    results.add(f"down_kb{suffix}", side.round.down / 1000, "KB", f"{how}, down")
    how = (
        f"{_named(pair)}: both directions, {rounds} rounds from the first connection on, with the first model"
    )
    results.add(f"run_kb{suffix}", _both(side.whole) / 1000, "KB", how)


def compare(results: Results, suffix: str, plain: Moved, ours: Moved, rounds: int, pair: Pair) -> None:
    """Add the ratios of float32 to ``pair``."""
    how = f"float32 / it ({_named(pair)}): {_steady(rounds)}"
    results.add(f"up_ratio{suffix}", plain.round.up / ours.round.up, "x", f"{how}, up")
    results.add(f"down_ratio{suffix}", plain.round.down / ours.round.down, "x", f"{how}, down")
    results.add(f"total_ratio{suffix}", _both(plain.round) / _both(ours.round), "x", f"{how}, both")
    how = f"float32 / it ({_named(pair)}): the whole run of {rounds} rounds, with the first model"
    results.add(f"run_ratio{suffix}", _both(plain.whole) / _both(ours.whole), "x", how)


def moved(children: Children, folder: Path, data: str, rounds: int, pair: Pair) -> Moved:
    """Run a federation of real processes and count at the devices' connections."""
    say(f"{AGENTS} agents as processes, cnn, {rounds} rounds: {_named(pair)}")
    up, down = pair
    run = Run("cnn", data, rounds, AGENTS, settings={"up_encoding": up, "down_encoding": down})
    fleet = Fleet(children, folder, run)
    with Observer() as observer, ExitStack() as proxies:
        ways = {f"agent-{n}": proxies.enter_context(CountingProxy(fleet.port)) for n in range(1, AGENTS + 1)}
        agents = []
        for number, (name, way) in enumerate(ways.items(), 1):
            observer.count(name, way)
            share = f"{data}@iid,agent={number}/{AGENTS}"
            agents.append(fleet.start(fleet.enroll(name, port=way.port), share))
        server = fleet.serve()
        first = fleet.finish(server, BROKER_TIMEOUT_S)[0].row.closed_at
        assert first is not None
        # The end is read from the proxies: on a busy machine the observer's last reading may be a second old.
        whole = sum((way.traffic() for way in ways.values()), Traffic())
        begun = sum((observer.bytes_between(name, 0, first) for name in ways), Traffic())
        children.stop(server, *agents)
    return Moved(_share(whole - begun, AGENTS * (rounds - 1)), _share(whole, AGENTS))


def _named(pair: Pair) -> str:
    return f"{pair[0]} up, {pair[1]} down"


def _steady(rounds: int) -> str:
    return f"TCP payload of a device in a round, mean over {AGENTS} devices and rounds 2 to {rounds}"


def _share(traffic: Traffic, of: int) -> Traffic:
    return Traffic(round(traffic.up / of), round(traffic.down / of))


def _both(traffic: Traffic) -> int:
    return traffic.up + traffic.down


if __name__ == "__main__":
    main("wire", QUESTION, measure, PARTS)
