"""A model update as integers on a scale that all devices of a round share, so that their sum mod R can be decoded.

All tensors become one vector x of d values, clipped to the norm C, and rotated twice::

    x <- x min(1, C / norm(x))                              padded with zeros to D = length * blocks
    z = H D1 x / sqrt(length)     of each column of the matrix of ``length`` rows and ``blocks`` columns
    y = H D2 z / sqrt(length)     of each run of ``length`` consecutive coordinates

with H, the columns and the signs of :mod:`federation.wire.encodings.rotation`. Every run holds its share of every column,
so whatever x was, its energy lies evenly on all coordinates: each looks Gaussian with the deviation ``C / sqrt(D)`` or
less. That makes one step good for all of them. Each is then rounded stochastically to a neighbouring multiple of the
step g: by magnitude, with the fraction as the probability to round up, so its expectation is y.

**Without noise** a coordinate goes up to ``T`` deviations, in ``h`` steps each way, and n sums cannot leave the modulus::

    h = floor((R - 1) / 2 / n)      g = T C / (h sqrt(D))          n h <= (R - 1) / 2

**With noise**, of which n' devices together add the promised deviation z' C, and so all of them ``z C = z' C sqrt(n / n')``, the
noise takes most of the room: sums are mod R, read as centred, and leave it with the probability of a Gaussian variable
beyond E deviations. The deviation of a coordinate of the sum is at most, in units of C, with b = 1 / sqrt(D), and as
stochastic rounding has a variance of at most min(g^2 / 4, g abs(y)) ::

    S^2 = n^2 b^2 + z^2 + n min(g^2 / 4, g b)               (R - 1) g / 2 = E S

No finer than pays: T deviations of a coordinate have 32 steps at most, and the noise has a deviation of ``16 sqrt(n)`` steps at
most, to whose variance n roundings add a thousandth.

Agarwal, Kairouz and Liu 2021 (The Skellam Mechanism, algorithm 1) and Kairouz, Liu and Steinke 2021 (The Distributed
Discrete Gaussian Mechanism, section 4) do the same with one rotation of the whole vector padded to a power of two, which
may double what is sent.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cosh, exp, expm1, floor, inf, prod, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federation.errors import ConfigError
from federation.wire.codec import Schema
from federation.wire.encodings.rotation import Layout, hadamard, layout_of, signs_of

Entropy = Callable[[int], bytes]
"""So many random bytes, from a source that nobody can predict."""

TAIL: Final = 6.0
"""Deviations of a coordinate that have room: a Gaussian variable is beyond them twice in 10^9."""

_EDGE: Final = 5.0
"""E: a coordinate of the sum leaves the modulus once in 1.7 million, when all updates are equal and as long as they may be.
The error, 2 E deviations, is spread over all values when the vector is rotated back: it adds 0.003 % to that of the noise."""

_STEPS_OF_A_COORDINATE: Final = 32.0
"""In ``TAIL`` deviations, beyond which a finer grid gains nothing under noise."""

_STEPS_OF_A_SHARE: Final = 16.0
"""In the deviation of the noise of one of n devices, beyond which a finer grid gains nothing."""

_ROUNDING: Final = 2.0**-16
"""More than by which float32 arithmetic may lengthen a vector in the 26 additions of each value."""

_GROUP: Final = 32
"""Vectors that are rotated at a time: see the rotation."""

_COLUMNS: Final = b"\x00columns"
_RUNS: Final = b"\x01runs"
"""What tells the seeds of the two rotations apart."""


@dataclass(frozen=True, slots=True)
class SharedScale:
    """How the updates of a round become integers, equal on all devices and on the aggregator.

    Attributes:
        schema: Of the tensors.
        clip_norm: C: L2 norm to which an update is clipped, over all tensors together.
        modulus_bits: Sums are taken mod R = 2^modulus_bits: 8, 16 or 32.
        agents: n: most devices in a sum.
        noise_multiplier: z: standard deviation of the noise in the sum when all devices add theirs, in units of C; 0 for none.
        layout: Of the padded vector.
        step: g: what an integer counts, in the units of the update.
        largest: Magnitude at which a coordinate is cut off before it is rounded, in steps.
    """

    schema: Schema
    clip_norm: float
    modulus_bits: int
    agents: int
    noise_multiplier: float
    layout: Layout
    step: float
    largest: float

    @classmethod
    def of(
        cls,
        schema: Schema,
        *,
        clip_norm: float,
        modulus_bits: int,
        agents: int,
        noise_multiplier: float = 0.0,
        dropouts: float = 0.0,
    ) -> "SharedScale":
        """The scale that follows from what a plan says.

        Args:
            schema: Names and shapes of the tensors, in any order.
            clip_norm: Above 0.
            modulus_bits: 8, 16 or 32.
            agents: At least 1.
            noise_multiplier: z': promised deviation of the noise in the sum, in units of C; 0 for none.
            dropouts: Share of the devices, 0 to 1, excluded, without which the noise is what was promised.

        Raises:
            ConfigError: If the modulus leaves less than one step each way.
        """
        count = sum(prod(shape) for shape in schema.values())
        layout = layout_of(max(count, 1))
        room = (1 << modulus_bits) - 1
        deviation = 1 / sqrt(layout.size)
        noise = noise_multiplier * sqrt(agents / max(1, agents - floor(agents * dropouts)))
        if noise:
            step = _noisy_step(room, agents, deviation, noise)
            largest = TAIL * deviation / step
        else:
            half = room // 2 // agents
            step, largest = TAIL * deviation / max(half, 1), float(half)
        if not (largest and step < inf):
            raise ConfigError(
                f"privacy.secagg.modulus_bits = {modulus_bits} is too few for a sum of {agents} updates: "
                f"set {16 if modulus_bits == 8 else 32}"  # noqa: PLR2004 - the next larger one
            )
        ordered = {name: tuple(schema[name]) for name in sorted(schema)}
        return cls(ordered, clip_norm, modulus_bits, agents, noise, layout, step * clip_norm, largest)

    @property
    def size(self) -> int:
        """D: integers in a vector."""
        return self.layout.size

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of a vector mod R, little-endian."""
        return np.dtype(f"<u{self.modulus_bits // 8}")

    @property
    def wrap_probability(self) -> float:
        """Bound of the probability with which a coordinate of the sum leaves the modulus, over noise, rounding and rotation.

        Chernoff's: ``2 exp(-h R / 2) E exp(h sum)`` for any h > 0; here the one that is best for a Gaussian sum, 1 at most.
        The noise is taken as Skellam, whose logarithm of the moment generating function is ``v (cosh h - 1)``; rounding has
        a variance w and errors below a step: ``w (e^h - 1 - h)`` (Bennett).
        """
        if not self.noise_multiplier:
            return 0.0
        edge = 2.0 ** (self.modulus_bits - 1)
        deviation = self.largest / TAIL
        signal = (self.agents * deviation) ** 2
        noise = (self.noise_multiplier * self.clip_norm / self.step) ** 2
        rounding = self.agents * min(0.25, deviation)
        h = min(edge / (signal + noise + rounding), 1.0)
        return 2 * exp(-h * edge + signal * h**2 / 2 + noise * (cosh(h) - 1) + rounding * (expm1(h) - h))

    def integers(
        self, update: Mapping[str, NDArray[np.float32]], seed: bytes, entropy: Entropy = os.urandom
    ) -> NDArray[np.int32]:
        """Clip, rotate, round: the update in steps, not yet mod R, so that noise can be added.

        Args:
            update: float32, of the names and shapes of the schema.
            seed: Of the round's rotations, any bytes that all its devices share.
            entropy: For stochastic rounding, 4 bytes for each value; the operating system is slow at it on some machines.
                Privacy under noise depends on it.

        Returns:
            Shape ``(D,)``, of magnitude at most ``ceil(largest)``.

        Raises:
            ConfigError: If a value is NaN or infinite: training has diverged.
        """
        flat = np.zeros(self.size, dtype=np.float32)
        at = 0
        for name, shape in self.schema.items():
            flat[at : at + prod(shape)] = update[name].reshape(-1)
            at += prod(shape)
        norm = _norm(flat)
        if not norm < inf:
            raise ConfigError(
                "the update has values that are NaN or infinite: training diverged; lower the learning rate"
            )
        # y / g = H D2 H D1 x / (length g): both factors 1 / sqrt(length) at once.
        share = min(1.0, (1 - _ROUNDING) * self.clip_norm / norm) if norm else 1.0
        flat *= np.float32(share / (self.step * self.layout.length))
        columns = flat.reshape(self.layout)
        signs = self._signs(seed + _COLUMNS).astype(np.float32)
        for group in _groups(self.layout.blocks):
            columns[:, group] = hadamard(columns[:, group] * signs)
        codes = np.empty(self.size, dtype=np.int32)
        runs, coded = (array.reshape(self.layout.blocks, self.layout.length) for array in (flat, codes))
        signs = self._signs(seed + _RUNS).astype(np.float32)
        for group in _groups(self.layout.blocks):
            rotated = hadamard(np.multiply(runs[group].T, signs, order="C"))
            coded[group] = _rounded(rotated, self.largest, entropy).T
        return codes

    def reduced(self, integers: NDArray[np.int32]) -> NDArray[np.unsignedinteger]:
        """Mod R: what is masked and sent.

        Args:
            integers: Of any magnitude, noise included; shape ``(D,)``.

        Returns:
            Of :attr:`dtype`.
        """
        # Two's complement: dropping the upper bits is the remainder, of negative numbers too.
        return integers.astype(self.dtype)

    def mean(
        self, total: NDArray[np.unsignedinteger], seed: bytes, agents: int
    ) -> dict[str, NDArray[np.float32]]:
        """Back from a sum mod R to the mean update.

        In integers up to one multiplication, so all machines get the same bits, in whatever order the sum was taken.

        Args:
            total: Sum of the reduced integers mod R, of :attr:`dtype`, shape ``(D,)``.
            seed: As on the devices.
            agents: m: whose updates are in the sum; 1 to n.

        Returns:
            By name, float32, of the shapes of the schema.
        """
        whole = total.astype(self.dtype, copy=False).view(f"<i{self.modulus_bits // 8}").astype(np.int64)
        # R / 2 * 8192^2 <= 2^57 < 2^63: nothing overflows.
        runs, columns = whole.reshape(self.layout.blocks, self.layout.length), whole.reshape(self.layout)
        signs = self._signs(seed + _RUNS)
        for group in _groups(self.layout.blocks):
            runs[group] = (hadamard(np.ascontiguousarray(runs[group].T)) * signs).T
        signs = self._signs(seed + _COLUMNS)
        for group in _groups(self.layout.blocks):
            columns[:, group] = hadamard(np.ascontiguousarray(columns[:, group])) * signs
        # x = D1 H D2 H y / length, and y = g / m of the sum
        factor = self.step / (self.layout.length * agents)
        tensors, at = {}, 0
        for name, shape in self.schema.items():
            part = whole[at : at + prod(shape)]
            tensors[name] = np.multiply(part, factor, dtype=np.float64).astype(np.float32).reshape(shape)
            at += prod(shape)
        return tensors

    def _signs(self, seed: bytes) -> NDArray[np.int8]:
        return signs_of(seed, self.layout.length)[:, np.newaxis]


def _noisy_step(room: int, agents: int, deviation: float, noise: float) -> float:
    """The g of the module's formula, in units of C: the smaller of its two solutions, but no finer than pays."""
    steps = (room / 2 / _EDGE) ** 2
    fixed = (agents * deviation) ** 2 + noise**2
    # steps g^2 = fixed + n g^2 / 4, and steps g^2 = fixed + n g b
    quarter = sqrt(fixed / (steps - agents / 4)) if steps > agents / 4 else inf
    sparse = agents * deviation
    linear = (sparse + sqrt(sparse**2 + 4 * steps * fixed)) / (2 * steps)
    finest = max(TAIL * deviation / _STEPS_OF_A_COORDINATE, noise / (_STEPS_OF_A_SHARE * sqrt(agents)))
    return max(min(quarter, linear), finest)


def _norm(flat: NDArray[np.float32]) -> float:
    """L2, summed in float64; infinite or NaN if a value is."""
    return float(np.sqrt(np.einsum("i,i->", flat, flat, dtype=np.float64)))


def _rounded(values: NDArray[np.float32], largest: float, entropy: Entropy) -> NDArray[np.int32]:
    """Cut off, then round stochastically to one of the two neighbouring integers, of the same sign.

    The probability to round up is the fraction of the magnitude, rounded down to 2^-32: so the expectation is never longer
    than the values, which privacy relies on.
    """
    limit = np.float32(largest)
    if (
        float(limit) > largest
    ):  # float32 has no integers that large: the sum of all devices would leave the modulus
        limit = np.nextafter(limit, np.float32(0))
    magnitudes = np.minimum(np.abs(values), limit)
    whole = np.floor(magnitudes)
    fractions = ((magnitudes - whole).astype(np.float64) * 2.0**32).astype(np.uint32)
    dice = np.frombuffer(entropy(4 * values.size), dtype="<u4").reshape(values.shape)
    codes = whole.astype(np.int32)
    codes += dice < fractions
    return np.where(values < 0, -codes, codes)


def _groups(count: int) -> list[slice]:
    return [slice(at, min(at + _GROUP, count)) for at in range(0, count, _GROUP)]
