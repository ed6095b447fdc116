from collections.abc import Callable

import pytest

from federation.wire.messages import TaskSpec

DIGITS = tuple("0123456789")


def make_task(
    model: str = "cnn",
    *,
    channels: int = 1,
    size: tuple[int, int] = (28, 28),
    labels: tuple[str, ...] = DIGITS,
) -> TaskSpec:
    height, width = size
    return TaskSpec(
        model=model,
        labels=labels,
        channels=channels,
        height=height,
        width=width,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )


@pytest.fixture
def new_task() -> Callable[..., TaskSpec]:
    return make_task
