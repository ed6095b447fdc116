"""edge_agent.feedback: what was left out comes once, to the right place, or not at all."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.feedback import Arrays, Feedback, FeedbackKey

KEY = FeedbackKey(run="0" * 16, model="cnn", encoding="topk:0.01", private=False)
UPDATE: Arrays = {"w": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float32)}
LEFT: Arrays = {"w": np.full((3, 4), 0.25, np.float32), "b": np.arange(5, dtype=np.float32)}
FIRST, SECOND = "a" * 64, "b" * 64


def left(folder: Path, key: FeedbackKey = KEY) -> float:
    """How much of LEFT is added to an update: 1 when it is in effect."""
    corrected = Feedback(folder).corrected(UPDATE, key)
    return float((corrected["w"] - UPDATE["w"])[0, 0] / LEFT["w"][0, 0])


def accepted(folder: Path) -> Feedback:
    feedback = Feedback(folder)
    feedback.stage(FIRST, KEY, LEFT)
    feedback.settle(FIRST, accepted=True)
    return feedback


def test_nothing_is_added_before_a_receipt_accepts(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback")
    assert left(tmp_path / "feedback") == 0
    feedback.stage(FIRST, KEY, LEFT)
    assert left(tmp_path / "feedback") == 0
    feedback.settle(SECOND, accepted=True)
    assert left(tmp_path / "feedback") == 0
    feedback.settle(FIRST, accepted=True)
    assert left(tmp_path / "feedback") == 1, "also for the next process"
    feedback.settle(FIRST, accepted=True)
    assert left(tmp_path / "feedback") == 1, "a repeated receipt"


def test_all_tensors_come_back_exactly(tmp_path: Path) -> None:
    corrected = accepted(tmp_path).corrected(UPDATE, KEY)
    for name, array in UPDATE.items():
        np.testing.assert_array_equal(corrected[name], array + LEFT[name])
        assert not np.shares_memory(corrected[name], array)


def test_a_refused_update_leaves_the_former_residual(tmp_path: Path) -> None:
    feedback = accepted(tmp_path)
    feedback.stage(SECOND, KEY, {name: 4 * array for name, array in LEFT.items()})
    feedback.settle(SECOND, accepted=False)
    feedback.abandon()
    assert left(tmp_path) == 1


def test_an_accepted_update_replaces_it(tmp_path: Path) -> None:
    feedback = accepted(tmp_path)
    feedback.stage(SECOND, KEY, {name: 4 * array for name, array in LEFT.items()})
    feedback.settle(SECOND, accepted=True)
    feedback.abandon()
    assert left(tmp_path) == 4


def test_without_a_receipt_nothing_is_sent_twice(tmp_path: Path) -> None:
    accepted(tmp_path).stage(SECOND, KEY, LEFT)
    Feedback(tmp_path).abandon()
    assert left(tmp_path) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", [{"run": "1" * 16}, {"model": "resnet18"}, {"encoding": "topk:0.1"}, {"private": True}]
)
def test_it_goes_to_its_own_kind_only(tmp_path: Path, other: dict[str, object]) -> None:
    accepted(tmp_path)
    assert left(tmp_path, msgspec.structs.replace(KEY, **other)) == 0
    assert left(tmp_path) == 0, "it is dropped for good"


def test_a_private_residual_never_reaches_a_public_update(tmp_path: Path) -> None:
    private = msgspec.structs.replace(KEY, private=True)
    feedback = Feedback(tmp_path)
    feedback.stage(FIRST, private, LEFT)
    feedback.settle(FIRST, accepted=True)
    assert left(tmp_path) == 0


@pytest.mark.parametrize(
    "update", [{"w": np.ones((4, 3), np.float32)}, {**UPDATE, "more": np.ones(1, np.float32)}]
)
def test_it_is_dropped_when_the_model_changes(tmp_path: Path, update: Arrays) -> None:
    corrected = accepted(tmp_path).corrected(update, KEY)
    for name, array in update.items():
        np.testing.assert_array_equal(corrected[name], array)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", [0, 60, 120])
def test_a_damaged_file_is_dropped(tmp_path: Path, position: int) -> None:
    accepted(tmp_path)
    path = tmp_path / "residual"
    path.write_bytes(path.read_bytes()[:position])
    assert left(tmp_path) == 0
    assert not path.exists()


def test_what_a_power_loss_left_half_written_is_removed(tmp_path: Path) -> None:
    accepted(tmp_path)
    (tmp_path / ".next-abc.123").write_bytes(b"half")
    assert left(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["residual"]
