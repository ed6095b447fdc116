"""Where predictions go: what is news, what is printed, what is saved and what a full disk does."""

import io
from pathlib import Path

import msgspec
import pytest
import structlog

from edge_agent.inference import saving
from edge_agent.inference.feed import Problem
from edge_agent.inference.saving import SAVE_EVERY_S, SaveSink
from edge_agent.inference.sinks import Changes, JsonSink, LogSink, MqttSink, TextSink
from federation.errors import ConfigError
from federation.wire.messages import decode_json
from federation.wire.predictions import PredictionMessage


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def message(label: str = "cat", number: int = 1) -> PredictionMessage:
    return PredictionMessage(
        label=label,
        confidence=0.9,
        top=((label, 0.9), ("dog", 0.1)),
        source=f"camera 0 #{number}",
        latency_ms=1.234,
        time=1.5,
        frames=number,
    )


def saved(path: Path) -> list[PredictionMessage]:
    return [decode_json(line, PredictionMessage) for line in path.read_bytes().splitlines()]


def test_a_new_label_is_news_at_once_and_the_same_one_after_a_while() -> None:
    clock, sent = Clock(), list[PredictionMessage]()
    sink = MqttSink(sent.append, Changes(10, clock))
    for label in ("cat", "cat", "dog", "dog", "cat"):
        clock.now += 1
        sink.prediction(message(label))
    assert [one.label for one in sent] == ["cat", "dog", "cat"]
    clock.now += 9.9
    sink.prediction(message("cat"))
    assert len(sent) == 3
    clock.now += 0.1
    sink.prediction(message("cat"))
    assert len(sent) == 4


def test_all_is_news_without_an_interval() -> None:
    clock = Clock()
    changes = Changes(0, clock)
    assert [changes.is_news("cat") for _ in range(3)] == [True, True, True]


def test_text_of_a_live_source_is_flushed_line_by_line_and_keeps_to_the_news() -> None:
    file = io.BytesIO()
    out = io.TextIOWrapper(file, write_through=False)
    sink = TextSink(out, None, Changes(1e9))
    for number in range(3):
        sink.prediction(message(number=number))
    sink.problem(Problem(name="camera 0 #4", reason="damaged"))
    assert file.getvalue().decode() == "camera 0 #0  cat  90.0%  1.23 ms  (dog 10.0%)\n"


def test_json_has_the_fields_of_the_message_on_the_wire() -> None:
    out, err = io.StringIO(), io.StringIO()
    sink = JsonSink(out, err)
    sink.prediction(message())
    sink.problem(Problem(name="a.png", reason="the model failed", read=True))
    first, second = out.getvalue().splitlines()
    assert decode_json(first.encode(), PredictionMessage) == message()
    assert msgspec.json.decode(second) == {"source": "a.png", "error": "the model failed"}
    assert err.getvalue() == "failed a.png: the model failed\n"


def test_the_log_has_each_new_reason_and_the_same_one_every_minute() -> None:
    clock = Clock()
    with structlog.testing.capture_logs() as logs:
        sink = LogSink(clock)
        for number in range(100):
            clock.now += 1
            sink.problem(Problem(name=f"camera 0 #{number}", reason="NaN", read=True))
        sink.problem(Problem(name="camera 0 #100", reason="damaged"))
    assert [(line["event"], line["so_far"]) for line in logs] == [
        ("frame_failed", 1),
        ("frame_failed", 61),
        ("frame_unreadable", 101),
    ]


def test_predictions_are_saved_every_few_seconds_and_at_the_end(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "seen.jsonl"
    sink = SaveSink(path, forgiving=False, clock=clock)
    sink.prediction(message(number=1))
    sink.turn()
    assert saved(path) == []
    clock.now += SAVE_EVERY_S
    sink.turn()
    assert saved(path) == [message(number=1)]
    sink.prediction(message(number=2))
    sink.close()
    sink.close()
    assert saved(path) == [message(number=1), message(number=2)]


def test_what_is_there_already_stays_and_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "seen.jsonl"
    path.write_bytes(msgspec.json.encode(message(number=1)) + b'\n{"label": "do')
    sink = SaveSink(path, forgiving=False)
    sink.prediction(message(number=2))
    sink.close()
    first, torn, last = path.read_bytes().splitlines()
    assert decode_json(first, PredictionMessage).frames == 1
    assert torn == b'{"label": "do'
    assert decode_json(last, PredictionMessage).frames == 2


def test_the_file_is_bounded_and_the_one_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "MAX_FILE_BYTES", 2000)
    clock, path = Clock(), tmp_path / "seen.jsonl"
    sink = SaveSink(path, forgiving=False, clock=clock)
    for number in range(1, 101):
        sink.prediction(message(number=number))
        clock.now += SAVE_EVERY_S
        sink.turn()
    older = tmp_path / "seen.jsonl.1"
    assert path.stat().st_size <= 2000
    assert older.stat().st_size <= 2000
    numbers = [one.frames for one in saved(older) + saved(path)]
    assert numbers == list(range(101 - len(numbers), 101))
    assert len(numbers) > 10
    assert sorted(tmp_path.iterdir()) == [path, older]


def test_a_file_that_was_moved_away_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "seen.jsonl"
    sink = SaveSink(path, forgiving=False)
    sink.prediction(message(number=1))
    path.rename(tmp_path / "archive")
    sink.close()
    assert saved(path) == [message(number=1)]


def test_a_full_disk_ends_a_run_over_files_but_not_a_camera() -> None:
    full = Path("/dev/full")
    strict = SaveSink(full, forgiving=False)
    strict.prediction(message())
    with pytest.raises(ConfigError, match="no space left on the disk that holds /dev/full"):
        strict.close()
    clock = Clock()
    forgiving = SaveSink(full, forgiving=True, clock=clock)
    with structlog.testing.capture_logs() as logs:
        for number in range(10):
            forgiving.prediction(message(number=number))
            clock.now += SAVE_EVERY_S
            forgiving.turn()
    assert [(line["event"], line["lost"]) for line in logs] == [("predictions_not_saved", 1)]


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        SaveSink(tmp_path / "missing" / "seen.jsonl", forgiving=True)
