"""Large frames lose half their size, exactly as Pillow halves them, and no more than the model can spare."""

import numpy as np
import pytest
from PIL import Image

from federation.task.halving import halve


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(48, 64, 3), (49, 65, 3), (48, 64, 1)])
def test_a_frame_of_twice_the_size_is_halved_as_pillow_does_it(shape: tuple[int, int, int]) -> None:
    frame = _noise(*shape)
    even = Image.fromarray(frame[:48, :64].squeeze())
    expected = np.asarray(even.reduce(2)).reshape(24, 32, shape[2])
    assert np.array_equal(halve(frame, 22, 22), expected)


def test_it_goes_on_while_the_target_allows() -> None:
    assert halve(_noise(1080, 1920, 3), 224, 224).shape == (270, 480, 3)


@pytest.mark.parametrize("target", [(25, 10), (10, 33), (48, 64)])
def test_a_frame_that_would_fall_short_stays_as_it_is(target: tuple[int, int]) -> None:
    frame = _noise(48, 64, 3)
    assert halve(frame, *target) is frame


def test_white_stays_white() -> None:
    assert (halve(np.full((64, 64, 3), 255, np.uint8), 16, 16) == 255).all()


def test_a_frame_that_is_no_contiguous_block_is_halved_too() -> None:
    frame = _noise(64, 48, 3)
    turned = frame.transpose(1, 0, 2)
    assert np.array_equal(halve(turned, 24, 24), halve(np.ascontiguousarray(turned), 24, 24))
