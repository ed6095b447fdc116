"""The table of encodings: bytes against accuracy, over several seeds, on even and on uneven shares."""

import json
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from statistics import mean

from aggregator.config import AggregatorConfig
from aggregator.versions import WHOLE
from benchmarks.runner import REPOSITORY, Options, Results, say
from benchmarks.simulation import LAST_ROUNDS, Outcome, Setting, simulate

IID, UNEVEN = "iid", "shards(2)"

Pair = tuple[str, str]
"""Up and down."""

BASELINE: Pair = ("float32", WHOLE)

UPS = (
    "float16",
    "int8",
    "int4",
    "rotated2",
    "rotated1",
    "topk:0.1",
    "topk:0.01",
    "sq:4",
    "sq:8",
    "sq:16",
    "sq:32",
    "ternary:0.02",
)
"""Each with whole models down."""

DOWNS = ("int8", "rotated2", "sq:2")
"""Each with the default encoding up."""

ALTERNATIVE: Pair = ("ternary:0.02", "ternary:0.05")
"""The shortest that we know: a third less than the default, and five times slower to encode."""

UNEVEN_UPS = ("int8", "rotated1", "topk:0.1", "topk:0.01", "sq:4", "sq:8", "sq:16", "sq:32")
"""On uneven shares: differences of less than a point cannot be told apart there, so the fine ones are left out."""

QUICK_UPS = ("int8", "rotated1", "topk:0.01")

_CODE = (
    "aggregator/strategies.py",
    "aggregator/summation.py",
    "benchmarks/simulation.py",
    "edge_agent/training.py",
    "federation/wire/codec.py",
    "federation/wire/encodings/*.py",
    "federation/wire/noise.py",
)
"""What a run's outcome rests on."""


class Kept:
    """Outcomes by their setting, in a file beside the result: an interrupted table goes on where it was.

    Those of other code are left alone.

    Args:
        path: The file; None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        files = sorted(file for pattern in _CODE for file in REPOSITORY.glob(pattern))
        self._code = sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        self.outcomes: dict[Setting, Outcome] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                if row["code"] == self._code:
                    self.outcomes[Setting(**row["setting"])] = Outcome(**row["outcome"])

    def add(self, setting: Setting, outcome: Outcome) -> None:
        """Keep one."""
        self.outcomes[setting] = outcome
        if self._path is not None:
            row = {"code": self._code, "setting": asdict(setting), "outcome": asdict(outcome)}
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def table(options: Options, data: str, suffix: str, results: Results) -> None:
    """Train with every pair of encodings, tell how far each falls behind float32."""
    config = AggregatorConfig()
    default = config.up_encoding, config.down_encoding
    pairs = {
        partition: list(dict.fromkeys((BASELINE, default, ALTERNATIVE, *compared)))
        for partition, compared in _compared(default, quick=options.quick).items()
    }
    seeds = range(1 if options.quick else 3)
    rounds = 4 if options.quick else 10
    settings = [
        Setting(up, down, partition, seed, rounds, config.max_noise, data)
        for some in (slice(3), slice(3, None))  # what matters most comes first
        for partition in pairs
        for seed in seeds
        for up, down in pairs[partition][some]
    ]
    kept = Kept(options.json.with_suffix(".runs.jsonl") if options.json else None)
    for setting, outcome in _simulate([setting for setting in settings if setting not in kept.outcomes]):
        kept.add(setting, outcome)
        say(
            f"    {setting.partition}, seed {setting.seed}, {setting.up} up, {setting.down} down: {outcome.top1:.2f} %, "
            f"{outcome.up_bytes / 1000:.1f} KB up, {outcome.down_bytes / 1000:.1f} KB down"
        )
    scope = f"{len(seeds)} seeds, {rounds} rounds, mean of the last {LAST_ROUNDS}"
    for partition, compared in pairs.items():
        say(f"\n{partition}: {scope}")
        say(
            "| up | down | KB up | KB down | float32 / it, up | down | top-1 | points against float32 | early |"
        )
        say("|---|---|---|---|---|---|---|---|---|")
        for pair in compared:
            row = Row(pair, [s for s in settings if s.partition == partition], kept.outcomes)
            say(row.markdown())
            key = ("" if partition == IID else "_uneven") + suffix
            how = f"{pair[0]} up, {pair[1]} down, {partition}; {scope}"
            if pair == default:
                results.add(f"gap_points{key}", row.gap, "points", f"{how}; seeds {row.spread}")
            name = "_".join(pair)
            results.add(f"{name}_gap_points{key}", row.gap, "points", f"{how}; seeds {row.spread}")
            results.add(f"{name}_up_kb{key}", row.up_kb, "KB", f"frame of an update: {how}")
            results.add(f"{name}_down_kb{key}", row.down_kb, "KB", f"frame of the way down: {how}")


class Row:
    """One pair of encodings on one kind of shares, over all seeds.

    Args:
        pair: It.
        settings: Of one kind of shares.
        outcomes: At least this pair's and the baseline's.
    """

    def __init__(self, pair: Pair, settings: Sequence[Setting], outcomes: Mapping[Setting, Outcome]) -> None:
        self._pair = pair
        self._runs = [outcomes[setting] for setting in settings if (setting.up, setting.down) == pair]
        plain = [outcomes[setting] for setting in settings if (setting.up, setting.down) == BASELINE]
        self._gaps = [run.top1 - other.top1 for run, other in zip(self._runs, plain, strict=True)]
        self._plain = plain
        self.gap = mean(self._gaps)
        self.up_kb = mean(run.up_bytes for run in self._runs) / 1000
        self.down_kb = mean(run.down_bytes for run in self._runs) / 1000

    @property
    def spread(self) -> str:
        """The seeds' extremes."""
        return f"{min(self._gaps):+.2f} to {max(self._gaps):+.2f}"

    def markdown(self) -> str:
        """One line of the table."""
        plain_up, plain_down = (mean(values) / 1000 for values in zip(*map(_bytes, self._plain), strict=True))
        cells = (
            *self._pair,
            f"{self.up_kb:.1f}",
            f"{self.down_kb:.1f}",
            f"{plain_up / self.up_kb:.1f}x",
            f"{plain_down / self.down_kb:.1f}x",
            f"{mean(run.top1 for run in self._runs):.2f}",
            f"{self.gap:+.2f} ({self.spread})",
            f"{mean(run.early_top1 for run in self._runs):.1f}",
        )
        return f"| {' | '.join(cells)} |"


def _bytes(outcome: Outcome) -> tuple[float, float]:
    return outcome.up_bytes, outcome.down_bytes


def _compared(default: Pair, *, quick: bool) -> dict[str, list[Pair]]:
    """By kind of shares, what is compared besides what always is."""
    if quick:
        ups = [(up, WHOLE) for up in QUICK_UPS]
        return {IID: ups, UNEVEN: ups}
    return {
        IID: [*((up, WHOLE) for up in UPS), *((default[0], down) for down in DOWNS)],
        UNEVEN: [(up, WHOLE) for up in UNEVEN_UPS],
    }


def _simulate(settings: Sequence[Setting]) -> Iterable[tuple[Setting, Outcome]]:
    """One process for each core; the order of what comes is left open."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        waiting = {pool.submit(simulate, setting): setting for setting in settings}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
