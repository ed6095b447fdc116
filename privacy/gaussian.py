"""Gaussian noise from the operating system's entropy: nobody can compute it again, and its low bits tell nothing.

**Source.** Each call draws a fresh 256-bit key from ``os.urandom`` and expands it with ChaCha20; no seed enters. Box and Muller
turn two uniform numbers of 53 bits into two normal ones (Box and Muller 1958)::

    u = (k + 1) / 2^53      v = l / 2^53      k, l uniform in 0 … 2^53 - 1
    x = sqrt(-2 ln u) cos(2 pi v)      y = sqrt(-2 ln u) sin(2 pi v)

``u`` is never 0. The largest value is ``sqrt(106 ln 2) = 8.57`` standard deviations: beyond it lies a share of 2^-53 of all
pairs, which adds about that to delta per pair. Nothing is rejected, so the time that it takes does not depend on the
values (Jin, McMurtry, Rubinstein and Ohrimenko, "Are We There Yet? Timing and Floating-Point Attacks on Differential
Privacy Systems", IEEE S&P 2022).

**Floating point.** The proof of the Gaussian mechanism is about real numbers. In floating point the numbers near 0 are closer
together than those near 1, so the last bits of ``value + noise`` tell whether ``value`` was 0 (Mironov, "On Significance of the
Least Significant Bits for Differential Privacy", CCS 2012). The remedy here is a grid, coarse against the spacing of
float64 and fine against the noise: :func:`add` adds in float64 and keeps only multiples of :func:`grid_step`; with values on
the grid beforehand (:func:`truncate`) and :func:`draw_on_grid`, sums are exact and rounding is post-processing:
``round(value + noise) = value + round(noise)``. The sum of several draws (Holohan and Braghin, "Secure Random Sampling in
Differential Privacy", ESORICS 2021) hides which float64 a draw was, but not the rounding of the addition; on the grid it would add
nothing. :func:`fill` alone has no such protection: what it is added to must be rounded by the caller.
"""

import math
import os
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]

_KEY_BYTES = 32
_NONCE = bytes(16)
"""Zero: a key is used for one stream."""

_WORD_BYTES = 8
_MANTISSA_BITS = 53

_PAIRS = 1 << 13
"""Drawn at a time: the temporaries of a block stay in a small processor's second-level cache."""

_GRID_BITS = 20
"""Grid steps in a standard deviation: 2^20. Rounding adds 2^-43 to the variance; float64 has 33 bits left below a step, so that
the addition's own rounding moves a value to another step with a chance of about 2^-32."""


def fill(out: Floats, std: float) -> None:
    """Overwrite ``out`` with independent normal numbers of mean 0. About 20 ns a value on one core.

    Args:
        out: float32 or float64, C-contiguous, any shape. float32 holds the float64 draw rounded to the nearest.
        std: Standard deviation, finite, at least 0.

    Raises:
        ValueError: If ``out`` is of another type or layout, or ``std`` is negative or not finite.
    """
    if out.dtype not in (np.float32, np.float64) or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype}, contiguous: {out.flags.c_contiguous}; pass C-contiguous float32 or float64"
        )
    _check_std(std)
    flat: NDArray[Any] = out.reshape(-1)
    stream = Cipher(ChaCha20(os.urandom(_KEY_BYTES), _NONCE), mode=None).encryptor()
    for at in range(0, flat.size, 2 * _PAIRS):
        part = flat[at : at + 2 * _PAIRS]
        pairs = (part.size + 1) // 2
        words = np.frombuffer(stream.update(bytes(2 * pairs * _WORD_BYTES)), dtype="<u8")
        uniform = (words >> np.uint64(64 - _MANTISSA_BITS)).astype(np.float64)
        radius, angle = uniform[:pairs], uniform[pairs:]
        radius += 1.0
        radius *= 2.0**-_MANTISSA_BITS
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        radius *= std
        angle *= 2.0 * math.pi * 2.0**-_MANTISSA_BITS
        part[:pairs] = radius * np.cos(angle)
        part[pairs:] = (radius * np.sin(angle))[: part.size - pairs]


def draw(shape: tuple[int, ...], std: float) -> NDArray[np.float64]:
    """New normal numbers, float64; see :func:`fill`."""
    out = np.empty(shape)
    fill(out, std)
    return out


def grid_step(scale: float, bits: int = _GRID_BITS) -> float:
    """The power of two to whose multiples noisy values are rounded: ``2^(floor(log2 scale) - bits)``.

    Args:
        scale: The noise's standard deviation, or another measure of what is rounded; greater than 0.
        bits: Steps in the scale, as a power of two.
    """
    _, exponent = math.frexp(scale)
    return math.ldexp(1.0, exponent - 1 - bits)


def add(values: Floats, std: float) -> None:
    """Add noise in place: ``values <- step * round((values + noise) / step)`` in float64, with ``step = grid_step(std)``.

    Args:
        values: float32 or float64, C-contiguous, any shape; below ``2^32`` standard deviations.
        std: Standard deviation of the noise, finite; at 0 nothing is changed.

    Raises:
        ValueError: As for :func:`fill`.
    """
    _check_std(std)
    if not std:
        return
    if values.dtype not in (np.float32, np.float64) or not values.flags.c_contiguous:
        raise ValueError(f"values are {values.dtype}: pass C-contiguous float32 or float64")
    flat: NDArray[Any] = values.reshape(-1)
    step = grid_step(std)
    for at in range(0, flat.size, 2 * _PAIRS):
        part = flat[at : at + 2 * _PAIRS]
        noisy = draw(part.shape, std)
        noisy += part
        noisy /= step
        np.rint(noisy, out=noisy)
        part[:] = noisy * step


def truncate(values: NDArray[np.float64], step: float) -> None:
    """Round each value towards 0 to a multiple of ``step``, in place: no norm grows by it.

    Args:
        values: float64, any shape.
        step: A power of two, so that the division is exact.
    """
    values /= step
    np.trunc(values, out=values)
    values *= step


def draw_on_grid(shape: tuple[int, ...], std: float, step: float) -> NDArray[np.float64]:
    """Normal numbers, each rounded to the nearest multiple of ``step``, float64.

    Added to values that are multiples of ``step``, with a sum below ``2^53`` steps, they make exactly the rounded outcome of the
    Gaussian mechanism.

    Args:
        shape: Of the result.
        std: Before rounding, finite, at least 0.
        step: A power of two.
    """
    noise = draw(shape, std)
    noise /= step
    np.rint(noise, out=noise)
    noise *= step
    return noise


def _check_std(std: float) -> None:
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"the standard deviation is {std}: it must be finite and at least 0")
