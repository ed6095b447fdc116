"""federation.task.engine: a picture becomes a label, and a foreign model a clear refusal."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from linear_model import card, make_model
from PIL import Image

from federation.errors import ConfigError, VerificationError
from federation.task.engine import Engine, softmax
from federation.task.preprocessing import Preprocessing

BRIGHT = np.full((6, 9), 255, np.uint8)
DARK = np.zeros((4, 4, 3), np.uint8)


def test_a_picture_gets_its_label(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path, scale=0.05))
    prediction = engine.predict(Image.fromarray(BRIGHT))
    # Sixteen pixels of 1 after normalisation, times 0.05: logits -0.8, 0.8 and 0.
    expected = math.exp(0.8) / (math.exp(0.8) + math.exp(-0.8) + 1)
    assert (prediction.label, prediction.index) == ("bright", 1)
    assert prediction.confidence == pytest.approx(expected, rel=1e-5)
    assert [label for label, _ in prediction.top] == ["bright", "other", "dark"]
    assert sum(share for _, share in prediction.top) == pytest.approx(1, rel=1e-5)
    assert prediction.latency_ms > 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F"])
def test_every_kind_of_picture_is_taken(tmp_path: Path, mode: str) -> None:
    assert Engine(make_model(tmp_path)).predict(Image.new(mode, (30, 7))).label == "dark"


def test_arrays_and_pictures_are_the_same(tmp_path: Path) -> None:
    engine = Engine(make_model(tmp_path, scale=0.05), top=1)
    gradient = np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3)
    first, second, third = engine.predict_batch([gradient, Image.fromarray(gradient), DARK])
    assert first.top == second.top
    assert len(first.top) == 1
    assert third.label == "dark"
    assert engine.predict(gradient).confidence == pytest.approx(first.confidence, rel=1e-6)
    assert engine.predict_batch([]) == []


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_picture_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="is no picture"):
        Engine(make_model(tmp_path)).predict(array)


def test_a_model_that_answers_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="NaN"):
        Engine(make_model(tmp_path, scale=math.nan)).predict(BRIGHT)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        Engine(tmp_path / "missing.onnx")
    with pytest.raises(ConfigError, match="is not a file"):
        Engine(tmp_path)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not an ONNX model"):
        Engine(garbage)
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(make_model(tmp_path).read_bytes()[:200])
    with pytest.raises(ConfigError, match="not an ONNX model"):
        Engine(truncated)


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({}, "no fedge metadata"),
        ({"author": "somebody else"}, "no fedge metadata"),
        (card().properties() | {"fedge.format": "3"}, "format '3', this fedge reads '1' and '2'"),
        (card().properties() | {"labels": "[1, 2]"}, "'labels' is damaged"),
        (card().properties() | {"preprocessing": "{}"}, "'preprocessing' is damaged"),
        ({"fedge.format": "1"}, "'labels' is damaged"),
    ],
)
def test_foreign_metadata_is_refused(tmp_path: Path, properties: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(make_model(tmp_path, properties))


@pytest.mark.parametrize(
    "wrong",
    [
        card(labels=("dark", "bright")),
        card(preprocessing=Preprocessing(channels=1, height=5, width=4, mean=(0.0,), std=(1.0,))),
        card(preprocessing=Preprocessing(channels=3, height=4, width=4, mean=(0.0,) * 3, std=(1.0,) * 3)),
    ],
)
def test_metadata_that_does_not_fit_the_graph_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(VerificationError, match="export it again"):
        Engine(make_model(tmp_path, wrong.properties()))  # type: ignore[attr-defined]


def test_softmax_survives_large_logits() -> None:
    probabilities = softmax(np.array([[1e4, 1e4, -1e4]], np.float32))
    np.testing.assert_allclose(probabilities, [[0.5, 0.5, 0]])


SILENT = """
import os, sys
from pathlib import Path
import numpy as np
from federation.task.engine import Engine

Engine(Path(sys.argv[1])).predict(np.zeros((6, 5), np.uint8))
print(sum(len(files) for _, _, files in os.walk(sys.argv[2])))
"""


def test_onnxruntime_reports_to_nobody_and_marks_no_device(tmp_path: Path) -> None:
    model, home = make_model(tmp_path), tmp_path / "home"
    home.mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(model), str(home)],
        env=plain | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "0\n", "it has left an identifier, or events to send, below the home"
