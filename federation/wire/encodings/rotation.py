"""Randomized Hadamard rotation: any tensor comes to look like independent Gaussian values.

The values, padded with zeros to ``blocks * length``, are laid out row by row as a matrix of ``length`` rows and ``blocks``
columns, and each **column** is one vector x. So neighbours are spread over all columns, which hence have much the same
norm, and a row of the matrix is contiguous in memory, which makes the butterflies fast. Rotated::

    y = H D x        H: Hadamard matrix of ±1 in its natural (Sylvester) order, D: diagonal of random ±1

without the factor 1 / sqrt(length), so that each coordinate of y has the standard deviation ``norm(x)``, and integers stay
integers: decoding is exact arithmetic, equal on all machines, up to one multiplication.

Ailon and Chazelle 2009 (fast Johnson-Lindenstrauss transform); Suresh et al. 2017 (Distributed mean estimation with
limited communication, section 3) for its use here.
"""

from collections.abc import Iterator
from hashlib import shake_128
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from federation.wire.encodings.protocol import Values

SEED_BYTES: Final = 4

_LONGEST: Final = 8192
_SHORTEST: Final = 128
_MAX_PADDING: Final = 16
"""Padding may add a sixteenth."""

_GROUP: Final = 32
"""Columns at a time: with their copy 2 MiB of float32: fewer make the butterflies' inner loops too short."""

_Number = TypeVar("_Number", bound=np.generic)


class Layout(NamedTuple):
    """How the values of a tensor become the columns that are rotated.

    Attributes:
        length: Of a column, a power of two.
        blocks: Columns.
    """

    length: int
    blocks: int

    @property
    def size(self) -> int:
        """Coordinates, padding included."""
        return self.length * self.blocks


class Rotated(NamedTuple):
    """Some columns, rotated.

    Attributes:
        columns: Which.
        coordinates: y, shape ``(length, columns)``.
        energies: Squared norms of the columns x, float64, shape ``(columns,)``.
    """

    columns: slice
    coordinates: NDArray[np.float32]
    energies: NDArray[np.float64]


def layout_of(count: int) -> Layout:
    """The longest power of two from 128 to 8,192 that needs no more padding than ``count / 16``; else 128."""
    length = _LONGEST
    while length > _SHORTEST and _MAX_PADDING * (-count % length) > count:
        length //= 2
    return Layout(length, -(-count // length))


def signs_of(seed: bytes, length: int) -> NDArray[np.int8]:
    """The diagonal of D: bits of SHAKE-128 over the seed, most significant first; a set bit is -1.

    Args:
        seed: ``SEED_BYTES`` bytes.
        length: A multiple of 8.
    """
    bits = np.unpackbits(np.frombuffer(shake_128(seed).digest(length // 8), dtype=np.uint8))
    return np.array([1, -1], dtype=np.int8)[bits]


def rotate(values: Values, factor: float, seed: bytes) -> Iterator[Rotated]:
    """Rotate ``factor * values``, some columns at a time.

    Args:
        values: Of magnitude at most 1 when multiplied by ``factor``.
        factor: See there.
        seed: Of the rotation.
    """
    layout = layout_of(values.size)
    signs = signs_of(seed, layout.length).astype(np.float32)[:, np.newaxis]
    matrix = _padded(values, layout).reshape(layout.length, layout.blocks)
    for columns in _groups(layout):
        x = matrix[:, columns] * np.float32(factor)
        energies = np.einsum("ij,ij->j", x, x, dtype=np.float64)
        x *= signs
        yield Rotated(columns, hadamard(x), energies)


def rotate_back(codes: NDArray[Any], scales: Values, seed: bytes, out: Values) -> None:
    """Compute ``scale * D H q`` of each column q: the rotation's inverse, up to the scale.

    Args:
        codes: Integers of shape ``(length, blocks)``, of a type that holds ``length`` times the largest of them.
        scales: Shape ``(blocks,)``.
        seed: Of the rotation.
        out: Where the values go.
    """
    layout = Layout(*codes.shape)
    signs = signs_of(seed, layout.length)[:, np.newaxis]
    whole = out if out.size == layout.size else np.empty(layout.size, dtype=np.float32)
    matrix = whole.reshape(layout.length, layout.blocks)
    for columns in _groups(layout):
        integers = hadamard(np.ascontiguousarray(codes[:, columns]))
        integers *= signs
        np.multiply(integers.astype(np.float32), scales[columns], out=matrix[:, columns])
    if whole is not out:
        out[:] = whole[: out.size]


def hadamard(columns: NDArray[_Number]) -> NDArray[_Number]:
    """Multiply by H: butterflies of sums and differences (Yates 1937), log2(length) additions for each value.

    Args:
        columns: Shape ``(length, columns)``, contiguous; overwritten.
    """
    done, spare = columns, np.empty_like(columns)
    length, width = columns.shape
    half = 1
    while half < length:
        pairs = done.reshape(length // (2 * half), 2, half * width)
        results = spare.reshape(pairs.shape)
        np.add(pairs[:, 0], pairs[:, 1], out=results[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=results[:, 1])
        done, spare = spare, done
        half *= 2
    return done


def _padded(values: Values, layout: Layout) -> Values:
    if values.size == layout.size:
        return values
    padded = np.zeros(layout.size, dtype=np.float32)
    padded[: values.size] = values
    return padded


def _groups(layout: Layout) -> Iterator[slice]:
    for at in range(0, layout.blocks, _GROUP):
        yield slice(at, min(at + _GROUP, layout.blocks))
