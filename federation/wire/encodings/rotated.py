"""EDEN: a random rotation, then few-bit codes of what is nearly Gaussian; a scale for each column makes it unbiased.

For a column x, rotated to y (:mod:`federation.wire.encodings.rotation`), quantized coordinate by coordinate to q, the
estimate is::

    S D H q      with      S = <x, x> / <y, q>

so that <x, estimate> = <x, x> always. By symmetry the rest of the estimate has mean zero if the rotation is uniformly
random: the estimate is unbiased (Vargaftik et al. 2022, EDEN, theorem 2.1). A randomized Hadamard rotation comes near to
that as columns grow; the tests bound the difference. The scale with the least squared error would be smaller, by the factor
that the squared error falls, but biased, and the bias would not average out over agents: hence the unbiased one.

Expected squared error in units of <x, x>, for Gaussian coordinates: ``1 / rho^2 - 1`` with rho the correlation of y and q.
"""

import struct
from abc import ABC, abstractmethod
from math import inf
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from federation.errors import PeerError, Rejection
from federation.wire.encodings.grid import INT8, round_stochastically
from federation.wire.encodings.protocol import (
    SMALLEST_NORMAL,
    SMALLEST_PEAK,
    Array,
    Coded,
    Parameters,
    Scheme,
    Values,
    check_length,
    check_scale,
)
from federation.wire.encodings.rotation import (
    SEED_BYTES,
    Layout,
    Rotated,
    layout_of,
    rotate,
    rotate_back,
)

_UNIT: Final = struct.Struct("<f")
_SCALE_LEVELS: Final = 255


class RotatedScheme(ABC):
    """What the rotated schemes share: the head of the blob.

    ::

        4 bytes   seed of the rotation
        float32   unit of the scales
        u8        for each column its scale, in units; rounded stochastically, which keeps it unbiased
    """

    name: str
    parameters = 0
    largest_code: int

    @abstractmethod
    def max_bytes(self, count: int) -> int:
        """The longest blob that ``count`` values can give."""

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:  # noqa: ARG002
        """Rotate the codes back and scale them."""
        layout = layout_of(out.size)
        if len(blob) < head_bytes(layout):
            raise PeerError(Rejection.WRONG_LENGTH, f"a blob of {len(blob)} bytes has not all scales")
        unit = check_scale(
            _UNIT.unpack_from(blob, SEED_BYTES)[0], times=_SCALE_LEVELS * self.largest_code * layout.length
        )
        scales = (
            np.frombuffer(blob, dtype=np.uint8, count=layout.blocks, offset=SEED_BYTES + _UNIT.size) * unit
        )
        codes = self._read_codes(blob[head_bytes(layout) :], layout)
        rotate_back(codes, scales, bytes(blob[:SEED_BYTES]), out)

    def encode(self, array: Array, peak: float, rng: np.random.Generator) -> bytes:
        """Rotate, quantize, scale."""
        values = array.reshape(-1)
        layout = layout_of(values.size)
        seed = rng.bytes(SEED_BYTES)
        whole = max(peak, SMALLEST_PEAK)
        codes = np.empty((layout.length, layout.blocks), dtype=np.int8)
        scales = np.zeros(layout.blocks)
        for rotated in rotate(values, 1 / whole, seed):
            q = self._quantize(rotated)
            products = np.einsum("ij,ij->j", rotated.coordinates, q, dtype=np.float64)
            np.divide(rotated.energies, products, out=scales[rotated.columns], where=products > 0)
            codes[:, rotated.columns] = q
        unit = np.float32(max(whole * float(scales.max()) / _SCALE_LEVELS, SMALLEST_NORMAL))
        in_units = (scales * (whole / float(unit))).astype(np.float32)
        rounded = round_stochastically(in_units, rng).clip(0, _SCALE_LEVELS).astype(np.uint8)
        return b"".join((seed, _UNIT.pack(unit), rounded.tobytes(), self._write_codes(codes)))

    @abstractmethod
    def _quantize(self, rotated: Rotated) -> NDArray[np.int8]:
        """Codes of the coordinates, odd in each of them."""

    @abstractmethod
    def _write_codes(self, codes: NDArray[np.int8]) -> bytes: ...

    @abstractmethod
    def _read_codes(self, blob: memoryview, layout: Layout) -> NDArray[Any]:
        """Codes of shape ``(length, blocks)``, of a type that holds their transform."""


class Rotated1Scheme(RotatedScheme):
    """One bit for each coordinate: its sign. A plane of bits, row by row; a set bit is -1."""

    name = "rotated1"
    largest_code = 1

    def max_bytes(self, count: int) -> int:
        """The head and a bit for each coordinate."""
        layout = layout_of(count)
        return head_bytes(layout) + layout.size // 8

    def _quantize(self, rotated: Rotated) -> NDArray[np.int8]:
        return np.where(rotated.coordinates < 0, np.int8(-1), np.int8(1))

    def _write_codes(self, codes: NDArray[np.int8]) -> bytes:
        return np.packbits(codes < 0).tobytes()

    def _read_codes(self, blob: memoryview, layout: Layout) -> NDArray[np.int16]:
        check_length(blob, layout.size // 8)
        signs = np.unpackbits(np.frombuffer(blob, dtype=np.uint8))
        return np.array([1, -1], dtype=np.int16)[signs].reshape(layout)


class Rotated2Scheme(RotatedScheme):
    """Two bits for each coordinate: its sign, then whether it is far from zero, as two planes of bits.

    The codes 3 and 10 stand in the ratio of the levels of the Lloyd-Max quantizer, 0.4528 and 1.5104 standard deviations
    (Max 1960, table I), to 0.1 %; its threshold is 0.9816.
    """

    name = "rotated2"
    largest_code = 10

    _NEAR: Final = 3
    _THRESHOLD: Final = 0.9816

    def max_bytes(self, count: int) -> int:
        """The head and two bits for each coordinate."""
        layout = layout_of(count)
        return head_bytes(layout) + layout.size // 4

    def _quantize(self, rotated: Rotated) -> NDArray[np.int8]:
        limits = (self._THRESHOLD * np.sqrt(rotated.energies)).astype(np.float32)
        far = np.abs(rotated.coordinates) > limits
        magnitudes = np.where(far, np.int8(self.largest_code), np.int8(self._NEAR))
        return np.where(rotated.coordinates < 0, -magnitudes, magnitudes)

    def _write_codes(self, codes: NDArray[np.int8]) -> bytes:
        return np.packbits(codes < 0).tobytes() + np.packbits(np.abs(codes) > self._NEAR).tobytes()

    def _read_codes(self, blob: memoryview, layout: Layout) -> NDArray[np.int32]:
        check_length(blob, layout.size // 4)
        planes = np.frombuffer(blob, dtype=np.uint8).reshape(2, -1)
        negative, far = np.unpackbits(planes[0]), np.unpackbits(planes[1])
        levels = np.array([self._NEAR, self.largest_code, -self._NEAR, -self.largest_code], dtype=np.int32)
        codes: NDArray[np.int32] = levels[2 * negative + far].reshape(layout)
        return codes


def head_bytes(layout: Layout) -> int:
    """The length of what stands before the codes."""
    return SEED_BYTES + _UNIT.size + layout.blocks


class RotatedEncoding:
    """What the rotated encodings share.

    Args:
        scheme: In which matrices go.
        spec: The canonical name.
    """

    stateful = False

    def __init__(self, scheme: RotatedScheme, spec: str) -> None:
        self.name, self.spec, self._scheme = scheme.name, spec, scheme

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself, and ``int8``."""
        return (self._scheme, INT8)

    def encode(
        self,
        array: Array,
        peak: float,
        rng: np.random.Generator,
        noise: float = inf,  # noqa: ARG002 - see the protocol
    ) -> Coded:
        """Rotate and quantize; vectors, and tensors that gain nothing, go as ``int8``."""
        if not INT8.suits(array):
            blob = self._scheme.encode(array, peak, rng)
            if len(blob) <= min(INT8.cost(array), self._scheme.max_bytes(array.size)):
                return Coded(self._scheme.name, (), blob)
        return INT8.encode(array, peak, rng)


class Rotated1(RotatedEncoding):
    """EDEN with one bit for each value, and the padding of a sixteenth at most.

    Unbiased up to what a Hadamard rotation lacks of a uniform one. Expected squared error pi / 2 - 1 = 0.571 times the
    squared norm, spread evenly over all values. For updates that are dense noise, as under differential privacy, where
    entropy coding gains nothing. Vectors (fewer than 2 dimensions) go as ``int8``.
    """

    def __init__(self) -> None:
        super().__init__(Rotated1Scheme(), "rotated1")


class Rotated2(RotatedEncoding):
    """EDEN with two bits for each value, and the padding of a sixteenth at most.

    Unbiased up to what a Hadamard rotation lacks of a uniform one. Expected squared error 0.133 times the squared norm,
    spread evenly over all values. Vectors (fewer than 2 dimensions) go as ``int8``.
    """

    def __init__(self) -> None:
        super().__init__(Rotated2Scheme(), "rotated2")
