"""What a device sees is what training saw: the same picture, the same numbers, the same class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.convert import export_model
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.data import open_data
from federation.task.engine import Engine
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec


def _pictures(folder: Path) -> Path:
    generator = np.random.default_rng(4)
    for label, mode in (("cat", "RGB"), ("dog", "L"), ("eel", "RGBA")):
        (folder / label).mkdir(parents=True)
        for number, size in enumerate([(9, 7), (40, 31), (16, 16)]):
            shape = (*size, len(mode)) if mode != "L" else size
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels, mode=mode).save(folder / label / f"{number}.png")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_the_device_prepares_pictures_as_training_does(tmp_path: Path, channels: int) -> None:
    folder = _pictures(tmp_path / "pictures")
    task = TaskSpec(
        model="cnn",
        labels=("cat", "dog", "eel"),
        channels=channels,
        height=16,
        width=18,
        mean=(0.485, 0.456, 0.406)[:channels],
        std=(0.229, 0.224, 0.225)[:channels],
    )
    data = open_data(f"imagefolder:{folder}", task, train=True)
    trained_on, _ = data.batch(np.arange(len(data)))

    model = build(task, seed=2)
    checkpoint = tmp_path / "model.safetensors"
    info = CheckpointInfo(federation="garden", round=1, task=task)
    checkpoint.write_bytes(checkpoint_bytes(info, state_arrays(model)))
    engine = Engine(export_model(checkpoint, tmp_path / "release", preprocess="none").model)

    with torch.inference_mode():
        expected = torch.softmax(model.eval()(trained_on), dim=1).numpy()
    files = sorted(folder.rglob("*.png"))
    assert len(files) == len(data)
    for file, row, probabilities in zip(files, trained_on.numpy(), expected, strict=True):
        with Image.open(file) as image:
            np.testing.assert_allclose(engine.card.preprocessing.apply(image), row, atol=1e-6)
            prediction = engine.predict(image)
        assert prediction.index == probabilities.argmax()
        assert prediction.confidence == pytest.approx(probabilities.max(), rel=1e-4)
