"""federation.task.golden: what was written is read, anything else is malformed, and wrong answers are seen."""

import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from federation.errors import ConfigError, ReleaseError, ReleaseFault
from federation.task.engine import Prediction
from federation.task.golden import MAX_FRAMES, Golden, check_answers, read_golden, write_golden

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
RGB = np.arange(30, dtype=np.uint8).reshape(5, 2, 3)
ANSWERS = '{"labels": ["ant"], "probabilities": [0.5], "tolerance": 0.01}'


def _golden() -> Golden:
    return Golden(
        frames=(GREY, RGB[:, ::-1]), labels=("ant", "bee"), probabilities=(0.75, 0.5), tolerance=0.01
    )


def _said(*top: tuple[str, float]) -> Prediction:
    return Prediction(label=top[0][0], index=0, confidence=top[0][1], top=top, latency_ms=1.0)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    write_golden(path, _golden())
    golden = read_golden(path)
    assert [frame.tolist() for frame in golden.frames] == [GREY.tolist(), RGB[:, ::-1].tolist()]
    assert (golden.labels, golden.probabilities, golden.tolerance) == (("ant", "bee"), (0.75, 0.5), 0.01)


def test_more_frames_than_ten_keep_their_order(tmp_path: Path) -> None:
    frames = tuple(np.full((2, 2), number, np.uint8) for number in range(MAX_FRAMES))
    path = tmp_path / "golden.safetensors"
    write_golden(
        path,
        Golden(frames=frames, labels=("ant",) * MAX_FRAMES, probabilities=(1.0,) * MAX_FRAMES, tolerance=0.1),
    )
    assert [int(frame[0, 0]) for frame in read_golden(path).frames] == list(range(MAX_FRAMES))


@pytest.mark.parametrize(
    "frames",
    [
        (),
        (GREY,) * (MAX_FRAMES + 1),
        (GREY.astype(np.float32),),
        (np.zeros((0, 4), np.uint8),),
        (RGB[0, 0],),
    ],
)
def test_no_golden_set_is_made_of_something_else(frames: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(ValueError, match="frame"):
        Golden(
            frames=frames, labels=("ant",) * len(frames), probabilities=(0.5,) * len(frames), tolerance=0.1
        )


def test_too_large_a_set_is_refused_by_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    huge = np.zeros((4096, 4097), np.uint8)
    with pytest.raises(ConfigError, match="at most 16 MiB"):
        write_golden(path, Golden(frames=(huge,), labels=("ant",), probabilities=(0.5,), tolerance=0.1))
    assert not path.exists()
    save_file({"frame-00": huge}, path, metadata={"fedge": ANSWERS})
    with pytest.raises(ReleaseError, match="at most 16777216") as caught:
        read_golden(path)
    assert caught.value.fault is ReleaseFault.MALFORMED


@pytest.mark.parametrize(
    ("tensors", "answers"),
    [
        ({"frame-00": GREY}, None),
        ({"frame-00": GREY}, "{}"),
        ({"frame-00": GREY}, ANSWERS.replace("0.5", "1.5")),
        ({"frame-00": GREY}, ANSWERS.replace("0.5", "NaN")),
        ({"frame-00": GREY}, ANSWERS.replace("0.01", "-1")),
        ({"frame-00": GREY}, ANSWERS.replace("[0.5]", "[0.5, 0.5]")),
        ({"frame-01": GREY}, ANSWERS),
        ({"frame-00": GREY, "frame-01": GREY}, ANSWERS),
        ({"frame-00": GREY.astype(np.float32)}, ANSWERS),
        ({"frame-00": GREY[None]}, ANSWERS),
        ({"frame-00": GREY[:0]}, ANSWERS),
    ],
)
def test_another_safetensors_file_is_malformed(
    tmp_path: Path, tensors: dict[str, np.ndarray], answers: str | None
) -> None:
    path = tmp_path / "golden.safetensors"
    save_file(tensors, path, metadata=None if answers is None else {"fedge": answers})
    with pytest.raises(ReleaseError) as caught:
        read_golden(path)
    assert caught.value.fault is ReleaseFault.MALFORMED


@pytest.mark.parametrize(
    "content", [b"", b"short", bytes(100), struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}"]
)
def test_damaged_bytes_are_malformed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(content)
    with pytest.raises(ReleaseError) as caught:
        read_golden(path)
    assert caught.value.fault is ReleaseFault.MALFORMED


def test_every_cut_of_a_file_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    write_golden(path, _golden())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ReleaseError):
            read_golden(path)


def test_a_missing_file_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="No such file"):
        read_golden(tmp_path / "golden.safetensors")


def test_right_answers_pass() -> None:
    check_answers(_golden(), [_said(("ant", 0.755), ("bee", 0.2)), _said(("bee", 0.495), ("ant", 0.4))])


def test_a_tie_is_one_answer() -> None:
    check_answers(_golden(), [_said(("ant", 0.75)), _said(("ant", 0.5), ("bee", 0.499))])


@pytest.mark.parametrize(
    "second",
    [
        _said(("bee", 0.6)),
        _said(("ant", 0.5)),
        _said(("ant", 0.6), ("bee", 0.4)),
        _said(("ant", 0.52), ("bee", 0.5)),
        _said(("bee", float("nan"))),
    ],
)
def test_wrong_answers_are_seen(second: Prediction) -> None:
    with pytest.raises(ReleaseError, match="golden frame 1") as caught:
        check_answers(_golden(), [_said(("ant", 0.75)), second])
    assert caught.value.fault is ReleaseFault.WRONG_ANSWER


def test_a_missing_answer_is_seen() -> None:
    with pytest.raises(ReleaseError, match="1 answers to 2"):
        check_answers(_golden(), [_said(("ant", 0.75))])
