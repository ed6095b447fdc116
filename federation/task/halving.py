"""Large frames made smaller before anything else looks at them. numpy only."""

import numpy as np


def halve(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink a large frame cheaply before it is resized: means of 2 x 2 pixels, as long as none falls short of the target.

    A camera's frame is a multiple of what a model takes. The triangle filter of the resize then looks at many pixels for
    each of its own; a box of two by two before it hardly changes what comes out (Pillow's ``reducing_gap``), and costs a
    third. Whole numbers, rounded as ``Image.reduce(2)`` does, so that every processor has the same.

    Args:
        frame: uint8 ``[H, W, channels]``.
        height: Of the target.
        width: Of the target.

    Returns:
        uint8 ``[H / 2^n, W / 2^n, channels]``, an odd row or column less; ``frame`` itself where it is less than twice the
        target.
    """
    while frame.shape[0] >= 2 * height and frame.shape[1] >= 2 * width:
        rows, columns, channels = frame.shape[0] // 2, frame.shape[1] // 2, frame.shape[2]
        lines = frame[: 2 * rows, : 2 * columns].reshape(rows, 2, 2 * columns * channels)
        sums = np.add(lines[:, 0], lines[:, 1], dtype=np.uint16)
        pairs = sums.reshape(rows, columns, 2 * channels)
        fours = np.empty((rows, columns, channels), np.uint16)
        # One channel after the other: numpy is six times as fast along a strided row as over runs of three.
        for channel in range(channels):
            np.add(pairs[..., channel], pairs[..., channels + channel], out=fours[..., channel])
        fours += 2
        fours >>= 2
        frame = fours.astype(np.uint8)
    return frame
