"""federation.task.engine with a fused graph: the same answers as a plain one, from frames as they come."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from linear_model import SIDE, card, linear_core, make_model, save
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.fused import fuse
from federation.errors import ConfigError, VerificationError
from federation.task.engine import Engine
from federation.task.model_card import ModelCard
from federation.task.preprocessing import Preprocessing

RGB = Preprocessing(channels=3, height=SIDE, width=SIDE, mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))
FUSED = card(preprocess="fused", topk=2)
FUSED_RGB = card(preprocess="fused", topk=3, preprocessing=RGB)


def _engine(folder: Path, told: ModelCard = FUSED, *, scale: float = 0.05) -> Engine:
    recipe = told.preprocessing
    assert told.topk is not None
    model = fuse(linear_core(scale=scale, channels=recipe.channels), recipe, topk=told.topk)
    return Engine(save(model, told.properties(), folder))


def _gradient(height: int, width: int) -> np.ndarray:
    across = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.7, 0.3])
    return np.broadcast_to(across, (height, width, 3)).astype(np.uint8).copy()


def test_a_fused_model_says_what_a_plain_one_says(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    fused = _engine(tmp_path)
    plain = Engine(make_model(tmp_path / "plain", scale=0.05))
    for picture in (np.full((6, 9), 200, np.uint8), _gradient(30, 20), np.zeros((SIDE, SIDE), np.uint8)):
        ours, theirs = fused.predict(picture), plain.predict(picture)
        assert (ours.label, ours.index) == (theirs.label, theirs.index)
        assert ours.confidence == pytest.approx(theirs.confidence, abs=5e-3)
        assert [label for label, _ in ours.top] == [label for label, _ in theirs.top[:2]]
        assert ours.latency_ms > 0


def test_pictures_of_all_kinds_and_sizes_go_in_one_batch(tmp_path: Path) -> None:
    engine = _engine(tmp_path, FUSED_RGB)
    gradient = _gradient(12, 16)
    pictures: list[Image.Image | np.ndarray] = [gradient, Image.fromarray(gradient)]
    pictures += [np.full((3, 50), 255, np.uint8), Image.new("P", (7, 7))]
    alone = [engine.predict(picture) for picture in pictures]
    together = engine.predict_batch(pictures)
    assert [prediction.label for prediction in together] == [prediction.label for prediction in alone]
    assert together[0].top == together[1].top
    same_size = engine.predict_batch([gradient, gradient[::-1], gradient])
    assert [prediction.label for prediction in same_size] == [alone[0].label] * 3
    assert engine.predict_batch([]) == []


def test_a_colour_frame_becomes_grey_as_in_training(tmp_path: Path) -> None:
    engine = _engine(tmp_path)
    frame = _gradient(SIDE, SIDE)
    grey = np.asarray(Image.fromarray(frame).convert("L"))
    assert engine.predict(frame).top == engine.predict(grey).top


def test_a_grey_frame_is_taken_for_three_equal_colours(tmp_path: Path) -> None:
    engine = _engine(tmp_path, FUSED_RGB)
    grey = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
    assert engine.predict(grey).top == engine.predict(np.stack([grey] * 3, axis=2)).top


def test_pillow_resizes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(tmp_path, FUSED_RGB)

    def resize(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert engine.predict(_gradient(37, 23)).label


def test_a_mirrored_view_of_a_frame_is_read_as_it_looks(tmp_path: Path) -> None:
    recipe = Preprocessing(channels=1, height=SIDE, width=SIDE, mean=(0.5,), std=(0.5,))
    weight = np.zeros((SIDE * SIDE, 3), np.float32)
    weight[0, 0], weight[SIDE - 1, 1] = 1, 1  # the upper left corner, the upper right one
    core = linear_core()
    core.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    engine = Engine(save(fuse(core, recipe, topk=2), FUSED.properties(), tmp_path))
    frame = np.zeros((SIDE, SIDE), np.uint8)
    frame[0, 0] = 255
    assert (engine.predict(frame).index, engine.predict(frame[:, ::-1]).index) == (0, 1)


def test_no_more_classes_than_the_graph_gives(tmp_path: Path) -> None:
    engine = _engine(tmp_path)
    assert len(engine.predict(_gradient(5, 5)).top) == 2
    assert len(Engine(tmp_path / "model.onnx", top=1).predict(_gradient(5, 5)).top) == 1


def test_warming_up_needs_no_picture(tmp_path: Path) -> None:
    _engine(tmp_path).warm_up()
    Engine(make_model(tmp_path)).warm_up()
    with pytest.raises(VerificationError, match="NaN"):
        _engine(tmp_path, scale=float("nan")).predict(_gradient(4, 4))


@pytest.mark.parametrize(
    "told",
    [
        card(),
        card(preprocess="fused", topk=1),
        FUSED_RGB,
        card(preprocess="fused", topk=2, labels=("only", "two"), preprocessing=RGB),
    ],
)
def test_a_card_that_does_not_fit_the_graph_is_refused(tmp_path: Path, told: ModelCard) -> None:
    model = fuse(linear_core(), FUSED.preprocessing, topk=2)
    with pytest.raises(VerificationError, match="export it again"):
        Engine(save(model, told.properties(), tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocess": '"partly"'}, "'preprocess' is damaged"),
        ({"preprocess": '"none"'}, "contradicts itself"),
        ({"topk": "0"}, "'topk' is damaged"),
        ({"topk": "4"}, "contradicts itself"),
        ({"labels": '["one"]'}, "'labels' is damaged"),
        ({"labels": '["dark", "dark", "other"]'}, "contradicts itself"),
        ({"requirements": "{}"}, "'requirements' is damaged"),
    ],
)
def test_a_contradictory_card_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    model = fuse(linear_core(), FUSED.preprocessing, topk=2)
    with pytest.raises(ConfigError, match=message):
        Engine(save(model, FUSED.properties() | changes, tmp_path))


def test_a_reader_of_format_1_is_told_that_it_is_too_old() -> None:
    assert FUSED.properties()["fedge.format"] == "2"
    assert card().properties()["fedge.format"] == "1"
    assert ModelCard.parse(FUSED.properties()) == FUSED


def _one_answer(probabilities: list[float], indices: list[int]) -> onnx.ModelProto:
    """A graph that looks like a fused one, and always says the same, once however many frames there are."""
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["frame"], ["n"], start=0, end=1),
            helper.make_node("Min", ["n", "one"], ["rows"]),
            helper.make_node("Concat", ["rows", "one"], ["times"], axis=0),
            helper.make_node("Tile", ["p", "times"], ["probabilities"]),
            helper.make_node("Tile", ["i", "times"], ["indices"]),
        ],
        "constant",
        [helper.make_tensor_value_info("frame", TensorProto.UINT8, ["N", "H", "W", 1])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 2]),
            helper.make_tensor_value_info("indices", TensorProto.INT64, ["N", 2]),
        ],
        [
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(np.array([probabilities], np.float32), "p"),
            numpy_helper.from_array(np.array([indices], np.int64), "i"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("probabilities", "indices", "message"),
    [
        ([float("nan"), 0.1], [0, 1], "NaN"),
        ([float("inf"), 0.1], [0, 1], "infinity"),
        ([0.9, 0.1], [3, 1], "class 3 of 3"),
        ([0.9, 0.1], [-1, 1], "class -1 of 3"),
    ],
)
def test_answers_that_cannot_be_are_refused(
    tmp_path: Path, probabilities: list[float], indices: list[int], message: str
) -> None:
    engine = Engine(save(_one_answer(probabilities, indices), FUSED.properties(), tmp_path))
    with pytest.raises(VerificationError, match=message):
        engine.predict(np.zeros((4, 4), np.uint8))


def test_fewer_answers_than_frames_are_refused(tmp_path: Path) -> None:
    engine = Engine(save(_one_answer([0.9, 0.1], [0, 1]), FUSED.properties(), tmp_path))
    assert engine.predict(np.zeros((4, 4), np.uint8)).label == "dark"
    with pytest.raises(VerificationError, match="answered in shapes"):
        engine.predict_batch([np.zeros((4, 4), np.uint8)] * 2)


def test_a_graph_that_fails_while_it_runs_is_refused(tmp_path: Path) -> None:
    core = linear_core()
    core.graph.node[1].output[0] = "product"
    core.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["flat"], ["brightest"], keepdims=0),
            helper.make_node("Cast", ["brightest"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "place"], ["factor"]),  # of one entry: 0 and -1 are in it
            helper.make_node("Mul", ["product", "factor"], ["logits"]),
        ]
    )
    core.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "table"))
    engine = Engine(save(core, card().properties(), tmp_path))
    assert engine.predict(np.zeros((4, 4), np.uint8)).label == "dark"
    with pytest.raises(VerificationError, match="failed to run the model"):
        engine.predict(np.full((4, 4), 255, np.uint8))
