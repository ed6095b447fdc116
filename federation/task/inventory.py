"""Take stock of a data set without training on it: images per class, and every image that cannot be read."""

from dataclasses import dataclass

import numpy as np

from federation.errors import ConfigError
from federation.task.data import labels_by_name, open_source
from federation.task.partition import share, split_spec
from federation.wire.messages import TaskSpec


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a data set holds.

    Attributes:
        where: The folder or the name.
        counts: Images by class name; classes without an image are left out.
        unreadable: What is wrong with each image that cannot be read.
    """

    where: str
    counts: dict[str, int]
    unreadable: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Images in all, the unreadable ones included."""
        return sum(self.counts.values())


def take_stock(spec: str, task: TaskSpec | None = None) -> Inventory:
    """Look at every image of the training split, or of a trial's share of it.

    Unlike :func:`federation.task.data.open_data` it goes on after an image that cannot be read, so that one look
    finds them all, and it decodes no more of an image than it must.

    Args:
        spec: A data spec (:mod:`federation.task.data`).
        task: Whose labels the classes must be among; None takes the classes as they are.

    Raises:
        ConfigError: If the data cannot be opened at all, or a class is not in the task.
    """
    name, partition = split_spec(spec)
    source = open_source(name, train=True, task=task)
    labels = source.labels if task is None else labels_by_name(source, task)
    rows = np.arange(len(labels)) if partition is None else share(labels, partition)
    unreadable = []
    for row in rows:
        try:
            source.check(int(row))
        except ConfigError as error:
            unreadable.append(str(error))
    found, counts = np.unique(source.labels[rows], return_counts=True)
    by_class = {
        source.classes[label]: int(count)
        for label, count in zip(found.tolist(), counts.tolist(), strict=True)
    }
    return Inventory(source.where, by_class, tuple(unreadable))
