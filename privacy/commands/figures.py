"""The drawings of the report, as SVG and PNG inside the page: nothing is loaded from elsewhere."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

_ROC_SIDE, _ROC_EDGE = 220, 30
_BAR_WIDTH, _BAR_ROW, _BAR_LEFT, _BAR_RIGHT = 720, 34, 250, 70
_MOST_POINTS = 200
"""Of a curve: more cannot be told apart, and make the page heavy."""


def roc(curve: np.ndarray, title: str) -> str:
    """The ROC curve, with the diagonal of guessing.

    Args:
        curve: float ``[points, 2]``: false and true positive rate.
        title: Read by screen readers.
    """
    if len(curve) > _MOST_POINTS:
        curve = curve[np.linspace(0, len(curve) - 1, _MOST_POINTS).astype(int)]
    side, edge = _ROC_SIDE, _ROC_EDGE

    def place(false: float, true: float) -> str:
        return f"{edge + false * (side - edge):.1f},{(1 - true) * (side - edge):.1f}"

    points = " ".join(place(false, true) for false, true in curve)
    low, high = place(0, 0), place(1, 1)
    return (
        f'<svg viewBox="0 0 {side + 4} {side + 4}" role="img" aria-label="{escape(title)}">'
        f'<rect class="axis" x="{edge}" y="0" width="{side - edge}" height="{side - edge}"/>'
        f'<polyline class="chance" points="{low} {high}"/><polyline class="curve" points="{points}"/>'
        f'<text x="{(side + edge) / 2}" y="{side - 8}" text-anchor="middle">strangers taken for members</text>'
        f'<text transform="translate(12 {(side - edge) / 2}) rotate(-90)" text-anchor="middle">members found</text>'
        "</svg>"
    )


def epsilon_bars(bounds: Sequence[tuple[str, float]], claimed: float | None) -> str:
    """The lower bounds as bars, and the claimed epsilon as a line.

    Args:
        bounds: Name and epsilon.
        claimed: None draws no line.
    """
    largest = max([1.0, claimed or 0.0, *(value for _, value in bounds)])
    room = _BAR_WIDTH - _BAR_LEFT - _BAR_RIGHT
    # Below the bars: the name of the claim.
    height = _BAR_ROW * len(bounds) + (40 if claimed is not None else 12)

    def x(value: float) -> float:
        return _BAR_LEFT + room * value / largest

    parts = [
        f'<svg viewBox="0 0 {_BAR_WIDTH} {height}" role="img" aria-label="lower bounds on epsilon and the claim">',
        f'<line class="axis" x1="{_BAR_LEFT}" y1="4" x2="{_BAR_LEFT}" y2="{_BAR_ROW * len(bounds) + 8}"/>',
    ]
    for row, (name, value) in enumerate(bounds):
        top = 10 + row * _BAR_ROW
        kind = "over" if claimed is not None and value > claimed else "bar"
        parts.append(
            f'<text x="{_BAR_LEFT - 10}" y="{top + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="{kind}" x="{_BAR_LEFT}" y="{top}" width="{max(2.0, x(value) - _BAR_LEFT):.1f}" height="18" rx="3"/>'
            f'<text class="strong" x="{x(value) + 8:.1f}" y="{top + 13}">{value:.2f}</text>'
        )
    if claimed is not None:
        parts.append(
            f'<line class="claim" x1="{x(claimed):.1f}" y1="2" x2="{x(claimed):.1f}" y2="{height - 24}"/>'
            f'<text class="strong" x="{x(claimed):.1f}" y="{height - 8}" text-anchor="middle">claimed: {claimed:.2f}</text>'
        )
    return "".join((*parts, "</svg>"))


def histogram(scores: np.ndarray, member: np.ndarray, title: str) -> str:
    """How the scores of members (filled) and strangers (line) lie.

    Args:
        scores: float ``[n]``.
        member: bool ``[n]``.
        title: Read by screen readers.
    """
    # The outermost scores would squeeze the rest into a few bars.
    low, high = np.quantile(scores, [0.01, 0.99])
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 31)
    counts = [
        np.histogram(np.clip(scores[rows], low, high), edges)[0] / max(1, rows.sum())
        for rows in (member, ~member)
    ]
    width, height = _ROC_SIDE, 90
    scale = (height - 20) / max(float(max(count.max() for count in counts)), 1e-9)
    step = width / len(counts[0])
    bars = "".join(
        f'<rect class="bar" opacity=".55" x="{place * step:.1f}" y="{height - 16 - value * scale:.1f}" '
        f'width="{step - 0.6:.1f}" height="{value * scale:.1f}"/>'
        for place, value in enumerate(counts[0])
        if not math.isclose(value, 0)
    )
    outline = " ".join(
        f"{(place + end) * step:.1f},{height - 16 - value * scale:.1f}"
        for place, value in enumerate(counts[1])
        for end in (0, 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{bars}'
        f'<polyline class="claim" fill="none" points="{outline}"/>'
        f'<text x="0" y="{height - 2}">members filled, strangers outlined</text></svg>'
    )


def png(image: np.ndarray) -> str:
    """A picture as a data URL.

    Args:
        image: uint8 ``[H, W, C]`` with 1 or 3 channels.
    """
    flat = image[..., 0] if image.shape[-1] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(flat).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
