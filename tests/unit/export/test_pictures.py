"""export.pictures: labelled and unlabelled pictures are read, noise and blank ones are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.pictures import neighbour_correlation, read_pictures, refuse_unreal
from federation.errors import ConfigError
from federation.task.data import task_from_data
from federation.wire.messages import TaskSpec

TASK = TaskSpec(
    model="cnn", labels=("ant", "bee"), channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3
)


def _write(folder: Path, count: int, *, kind: str = "photograph", side: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(folder)))
    for number in range(count):
        if kind == "photograph":
            coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            image = coarse.resize((side, side), Image.Resampling.BICUBIC)
        elif kind == "noise":
            image = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        elif kind == "gaussian":
            pixels = np.clip(generator.normal(128, 40, (side, side, 3)), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels)
        else:
            image = Image.new("RGB", (side, side), (number, number, number))
        image.save(folder / f"{number:03d}.png")
    return folder


def test_a_folder_for_each_class_is_labelled(tmp_path: Path) -> None:
    _write(tmp_path / "ant", 3)
    _write(tmp_path / "bee", 5)
    pictures = read_pictures(str(tmp_path), TASK, train=False, limit=100)
    assert pictures.labels is not None
    assert np.bincount(pictures.labels).tolist() == [3, 5]
    assert pictures.pixels.shape == (8, 3, 16, 16)
    assert pictures.frames[0].shape == (40, 40, 3)
    by_spec = read_pictures(f"imagefolder:{tmp_path}", TASK, train=False, limit=100)
    assert (by_spec.pixels == pictures.pixels).all()


def test_splits_are_told_apart(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for label in TASK.labels:
            _write(tmp_path / split / label, count)
    assert len(read_pictures(str(tmp_path), TASK, train=True, limit=100)) == 8
    assert len(read_pictures(str(tmp_path), TASK, train=False, limit=100)) == 4


def test_pictures_without_labels_are_taken_too(tmp_path: Path) -> None:
    _write(tmp_path / "camera" / "monday", 4)
    (tmp_path / "camera" / "broken.jpg").write_bytes(b"no picture")
    pictures = read_pictures(str(tmp_path / "camera"), TASK, train=False, limit=100)
    assert (len(pictures), pictures.labels) == (4, None)
    assert len(read_pictures(str(tmp_path / "camera"), TASK, train=False, limit=3)) == 3
    assert len(read_pictures(str(tmp_path / "camera" / "monday" / "000.png"), TASK, train=True, limit=9)) == 1


def test_the_choice_is_always_the_same_and_from_all_classes() -> None:
    task = task_from_data("digits", "cnn")
    first, second = (read_pictures("digits", task, train=True, limit=60) for _ in range(2))
    assert first.labels is not None
    assert (first.pixels == second.pixels).all()
    assert len(np.unique(first.labels)) == 10
    agent = read_pictures("digits@iid,agent=1/2", task, train=True, limit=10_000)
    assert 700 < len(agent) < 740


def test_large_pictures_are_kept_small_for_the_golden_set(tmp_path: Path) -> None:
    _write(tmp_path / "camera", 1, side=500)
    pictures = read_pictures(str(tmp_path / "camera"), TASK, train=False, limit=1)
    assert pictures.frames[0].shape == (160, 160, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "unknown data"),
        ("imagefolder:nowhere", "does not exist"),
        ("empty", "no readable picture"),
        ("classes", "class 'cow' is not in"),
    ],
)
def test_data_that_cannot_be_used_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "classes" / "cow", 1)
    _write(tmp_path / "classes" / "ant", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_pictures(data, TASK, train=False, limit=10)


@pytest.mark.parametrize("side", [16, 40, 200])
@pytest.mark.parametrize("kind", ["noise", "gaussian"])
def test_noise_is_refused(tmp_path: Path, kind: str, side: int) -> None:
    pictures = read_pictures(
        str(_write(tmp_path / "camera", 30, kind=kind, side=side)), TASK, train=True, limit=30
    )
    with pytest.raises(ConfigError, match="looks like noise"):
        refuse_unreal(pictures)


def test_blank_pictures_are_refused(tmp_path: Path) -> None:
    pictures = read_pictures(str(_write(tmp_path / "camera", 30, kind="blank")), TASK, train=True, limit=30)
    with pytest.raises(ConfigError, match="30 of 30 pictures"):
        refuse_unreal(pictures)


def test_too_few_pictures_and_copies_of_one_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "camera", 15)
    for number in range(20):
        shutil.copy(folder / "000.png", folder / f"copy-{number}.png")
    pictures = read_pictures(str(folder), TASK, train=True, limit=100)
    with pytest.raises(ConfigError, match="15 different pictures"):
        refuse_unreal(pictures)


def test_photographs_and_even_the_smallest_digits_are_real(tmp_path: Path) -> None:
    refuse_unreal(read_pictures(str(_write(tmp_path / "camera", 20)), TASK, train=True, limit=30))
    refuse_unreal(read_pictures("digits", task_from_data("digits", "cnn"), train=True, limit=256))


def test_correlation_of_neighbours() -> None:
    ramp = np.tile(np.arange(64), (64, 1))
    chessboard = np.indices((64, 64)).sum(axis=0) % 2 * 255
    assert neighbour_correlation(ramp) == pytest.approx(1, abs=0.06)
    assert neighbour_correlation(chessboard) == pytest.approx(-1)
    assert np.isnan(neighbour_correlation(np.full((8, 8), 3)))
    assert np.isnan(neighbour_correlation(np.zeros((1, 1))))
