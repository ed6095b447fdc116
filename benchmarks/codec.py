"""How fast encodings are, how small and how exact: one tensor of 4 million values, one thread.

Beside them, in the same call: a plain copy, and zstandard at level 3 on the float32 bytes. Rates are by CPU time of the
process, so a library that used a second thread would gain nothing by it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from aggregator.config import AggregatorConfig
from benchmarks.runner import Options, Results, main, middle, say
from federation.wire.codec import decode_into, encode

QUESTION = "how fast, how small and how exact are the encodings?"
PARTS = ("default", "table")

TABLE: Final = (
    "float32",
    "float16",
    "int8",
    "int4",
    "rotated2",
    "rotated1",
    "sq:2",
    "sq:4",
    "sq:8",
    "sq:16",
    "sq:32",
    "ternary:0.04",
    "ternary:0.01",
    "ternary:0.005",
    "topk:0.01",
)

SHAPE: Final = (2000, 2000)
ZSTD_LEVEL: Final = 3
REPEATS: Final = 9
QUICK_REPEATS: Final = 5
MB: Final = 1e6


def update() -> NDArray[np.float32]:
    """What a layer's update looks like: heavy tails (Student's t, 5 degrees of freedom), rows of different size."""
    rng = np.random.default_rng(0)
    rows = rng.lognormal(0, 0.5, (SHAPE[0], 1))
    return (rng.standard_t(5, SHAPE) * rows * 1e-3).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one encoding; MB of float32 a second."""

    encode: float
    decode: float
    frame: bytes


class Bench:
    """The update, a buffer for what is decoded, and how often to repeat."""

    def __init__(self, repeats: int) -> None:
        self._repeats, self._rng = repeats, np.random.default_rng(1)
        self.values = update()
        self.out = np.empty_like(self.values)

    def rate(self, action: Callable[[], object]) -> float:
        """MB (10^6 bytes) of float32 a second of this process's CPU time, the median of the repeats."""
        seconds = []
        for _ in range(self._repeats):
            start = time.process_time()
            action()
            seconds.append(time.process_time() - start)
        return self.values.nbytes / MB / middle(seconds)

    def speed(self, spec: str) -> Speed:
        """Encode and decode; the result stays in ``out``."""
        named = {"weight": self.values}
        frame = encode(named, spec, self._rng)
        return Speed(
            self.rate(lambda: encode(named, spec, self._rng)),
            self.rate(lambda: decode_into(frame, {"weight": self.out}, spec)),
            frame,
        )

    def error(self) -> float:
        """Squared error of what was decoded last, in units of the squared norm."""
        wide = self.values.astype(np.float64)
        return float(((self.out - wide) ** 2).sum() / (wide**2).sum())


def measure(options: Options, results: Results) -> None:
    """Run the parts."""
    bench = Bench(QUICK_REPEATS if options.quick else REPEATS)
    if "default" in options.parts:
        defaults(bench, results)
    if "table" in options.parts:
        table(bench)


def defaults(bench: Bench, results: Results) -> None:
    """The default encodings, a plain copy, zstandard."""
    config = AggregatorConfig()
    for suffix, spec in (("", config.up_encoding), ("_down", config.down_encoding)):
        speed = bench.speed(spec)
        results.add(
            f"encode{suffix}_mb_s", speed.encode, "MB/s", f"float32 of 4 M values, one thread, {spec}"
        )
        results.add(f"decode{suffix}_mb_s", speed.decode, "MB/s", "and back, into a buffer")
    results.add(
        "copy_mb_s", bench.rate(lambda: np.copyto(bench.out, bench.values)), "MB/s", "numpy copies the same"
    )
    raw = bench.values.tobytes()
    compressor, decompressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL), zstandard.ZstdDecompressor()
    packed = compressor.compress(raw)
    smaller = f"zstandard -{ZSTD_LEVEL} of the same bytes, {len(raw) / len(packed):.2f} times smaller"
    results.add("zstd_encode_mb_s", bench.rate(lambda: compressor.compress(raw)), "MB/s", smaller)
    results.add("zstd_decode_mb_s", bench.rate(lambda: decompressor.decompress(packed)), "MB/s", "and back")


def table(bench: Bench) -> None:
    """Every encoding: size, error, speed."""
    say(
        f"{'encoding':<14} {'bits/value':>10} {'smaller':>8} {'error':>8} {'encode MB/s':>12} {'decode MB/s':>12}"
    )
    for spec in TABLE:
        speed = bench.speed(spec)
        bits = 8 * len(speed.frame) / bench.values.size
        say(
            f"{spec:<14} {bits:>10.3f} {32 / bits:>7.1f}x {bench.error():>8.3g} "
            f"{speed.encode:>12,.0f} {speed.decode:>12,.0f}"
        )


if __name__ == "__main__":
    main("codec", QUESTION, measure, PARTS)
