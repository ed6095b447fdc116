"""Images of a data set as PNG files in one folder for each class, a share for each device.

``python -m benchmarks.pictures SPEC FOLDER DEVICES COUNT`` writes ``FOLDER/I/CLASS/ROW.png``, I from 1.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from federation.task.data import open_source


def main(spec: str, folder: Path, devices: int, count: int) -> None:
    """Write ``count`` training images for each device, all classes alike, no image twice."""
    source = open_source(spec, train=True, task=None)
    # The n-th image of every class before the (n+1)-th of any.
    rank = np.empty(len(source.labels), np.int64)
    for label in np.unique(source.labels):
        rows = np.flatnonzero(source.labels == label)
        rank[rows] = np.arange(len(rows))
    order = np.lexsort((source.labels, rank))
    for device in range(devices):
        for row in order[device * count : (device + 1) * count]:
            image = source.image(int(row))
            assert isinstance(image, Image.Image)
            place = folder / str(device + 1) / source.classes[source.labels[row]]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{row}.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *(int(argument) for argument in sys.argv[3:5]))
