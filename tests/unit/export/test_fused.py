"""export.fused: the graph prepares a frame as Pillow does for training."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from linear_model import linear_core
from PIL import Image

from export.fused import fuse
from export.tracing import INPUT_NAME
from federation.errors import ConfigError
from federation.task.preprocessing import Preprocessing

SIDE = 32


def _recipe(channels: int) -> Preprocessing:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Preprocessing(channels=channels, height=SIDE, width=SIDE, mean=mean[:channels], std=std[:channels])


def _prepared(frame: np.ndarray, recipe: Preprocessing) -> np.ndarray:
    """What the fused graph hands to the model inside it."""
    model = fuse(linear_core(channels=recipe.channels, side=SIDE), recipe, topk=1)
    model.graph.output.append(onnx.helper.make_tensor_value_info(INPUT_NAME, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString())
    (image,) = session.run([INPUT_NAME], {"frame": frame[None]})
    return np.asarray(image[0])


def _photograph(height: int, width: int, channels: int) -> np.ndarray:
    """Soft blobs with some grain."""
    generator = np.random.default_rng(4)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = generator.integers(-12, 13, smooth.shape)
    frame: np.ndarray = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(frame[:, :, :channels])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(120, 160), (97, 33), (64, 64), (20, 11), (480, 31)])
def test_resizing_is_pillows_within_a_fraction_of_a_grey_level(size: tuple[int, int], channels: int) -> None:
    recipe = _recipe(channels)
    frame = _photograph(*size, channels)
    expected = recipe.apply(Image.fromarray(frame[:, :, 0] if channels == 1 else frame))
    levels = np.abs(_prepared(frame, recipe) - expected) / recipe.affine()[0]
    # Pillow rounds to whole levels twice, a quarter of a level each on average; without antialiasing the mean is 4.
    assert levels.mean() < 0.5
    assert levels.max() < 2.5


def test_a_frame_of_the_models_size_passes_unchanged() -> None:
    recipe = _recipe(3)
    frame = _photograph(SIDE, SIDE, 3)
    expected = recipe.apply(Image.fromarray(frame))
    np.testing.assert_allclose(_prepared(frame, recipe), expected, atol=1e-6)


def test_a_batch_is_its_frames_one_after_the_other() -> None:
    recipe = _recipe(1)
    content = fuse(linear_core(side=SIDE, scale=1e-3), recipe, topk=3).SerializeToString()
    session = ort.InferenceSession(content)
    frames = np.stack([_photograph(40, 50, 1), _photograph(40, 50, 3)[:, :, 2:]])
    together, _ = session.run(None, {"frame": frames})
    alone = np.concatenate([session.run(None, {"frame": frame[None]})[0] for frame in frames])
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert together.shape == (2, 3)
    assert (np.diff(together, axis=1) <= 0).all()


def test_the_model_inside_is_left_alone() -> None:
    core = linear_core(side=SIDE)
    before = core.SerializeToString()
    fuse(core, _recipe(1), topk=2)
    assert core.SerializeToString() == before


def test_no_camera_has_four_channels() -> None:
    recipe = Preprocessing(channels=4, height=SIDE, width=SIDE, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ConfigError, match="4 channels"):
        fuse(linear_core(side=SIDE, channels=4), recipe, topk=1)
