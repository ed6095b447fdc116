"""``topk``: the few largest values. Biased, so the rest must be kept and added to the next update: error feedback."""

import struct
from math import inf
from typing import Final

import numpy as np

from federation.errors import PeerError, Rejection
from federation.wire.encodings.gaps import GapReader, write_gaps
from federation.wire.encodings.grid import INT8
from federation.wire.encodings.protocol import (
    SMALLEST_NORMAL,
    Array,
    Coded,
    Parameters,
    Scheme,
    Values,
    check_length,
    check_scale,
)

_LEVELS: Final = 127
_STEP: Final = struct.Struct("<f")


class TopKScheme:
    """Integers from -127 to 127 at some positions, times a step; zero elsewhere.

    The blob: the step (float32), the gaps between the positions (:mod:`federation.wire.encodings.gaps`), a byte for
    each integer.
    """

    name = "topk"
    parameters = 0

    def max_bytes(self, count: int) -> int:
        """One byte a value, or else it would be sent as ``int8``."""
        return count

    def decode_into(self, blob: memoryview, parameters: Parameters, out: Values) -> None:  # noqa: ARG002
        """Multiply the integers by the step, and put them where they belong."""
        if len(blob) < _STEP.size:
            raise PeerError(Rejection.WRONG_LENGTH, f"a blob of {len(blob)} bytes has no step")
        step = check_scale(_STEP.unpack_from(blob)[0], times=_LEVELS)
        gaps = GapReader(blob[_STEP.size :], out.size)
        check_length(gaps.tail, gaps.low_bytes + gaps.size)
        codes = np.frombuffer(gaps.tail[gaps.low_bytes :], dtype=np.int8)
        if codes.size and int(codes.min()) < -_LEVELS:
            raise PeerError(Rejection.MALFORMED, "the code -128 is not on the grid")
        values = codes * step
        out.fill(0)
        for first, positions, larger in gaps.values():
            if larger.size:
                raise PeerError(Rejection.MALFORMED, "a magnitude above one, which these gaps do not have")
            out[positions] = values[first : first + positions.size]


class TopK:
    """The values of largest magnitude, to the nearest of 255 levels.

    Biased: all others are left out, so it needs error feedback (Stich et al. 2018, Sparsified SGD with memory,
    algorithm 1), for which the device keeps state. Error: that of a value which is sent is at most half a step, the
    largest magnitude over 254; of one that is not, the value, so the squared error is at most ``1 - share`` times
    the squared norm. Bits for each value: about ``share * (8 + log2(1 / share) + 1.5)``, 0.16 at 1 %. Vectors (fewer than 2
    dimensions) go as ``int8``.

    Args:
        share: Of a tensor's values, that are sent.
    """

    name = "topk"
    stateful = True

    def __init__(self, share: float) -> None:
        self.spec = f"{self.name}:{share:g}"
        self._share = share

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Itself, and ``int8``."""
        return (TOPK, INT8)

    def encode(
        self,
        array: Array,
        peak: float,
        rng: np.random.Generator,
        noise: float = inf,  # noqa: ARG002 - see the protocol
    ) -> Coded:
        """Choose, round, code the gaps, unless ``int8`` is not longer."""
        if not INT8.suits(array):
            blob = self._encode(array.reshape(-1), peak)
            if len(blob) <= TOPK.max_bytes(array.size):
                return Coded(TOPK.name, (), blob)
        return INT8.encode(array, peak, rng)

    def _encode(self, values: Values, peak: float) -> bytes:
        kept = max(round(self._share * values.size), 1)
        positions = np.sort(np.argpartition(np.abs(values), values.size - kept)[values.size - kept :])
        step = np.float32(max(peak / _LEVELS, SMALLEST_NORMAL))
        codes = np.rint(values[positions] / step).clip(-_LEVELS, _LEVELS).astype(np.int8)
        gaps, low = write_gaps(positions, None, values.size)
        return b"".join((_STEP.pack(step), gaps, low, codes.tobytes()))


TOPK: Final = TopKScheme()
