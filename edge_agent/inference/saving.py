"""Predictions in a file, as JSON lines: few writes, for SD cards wear; bounded, for disks fill up."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_agent.inference.sinks import Changes, Sink
from federation.files import disk_error
from federation.wire.predictions import PredictionMessage

SAVE_EVERY_S = 5.0
SAVE_BYTES = 1 << 16
"""What a power cut may take: the predictions of so many seconds, or so many bytes, whichever are fewer."""

MAX_FILE_BYTES = 16 * 2**20
"""Then FILE becomes FILE.1, which replaces the one before: twice this is the most that is ever on the disk. About two
hours of a camera at ten frames a second."""

STILL_FULL_S = 600.0
"""Between two log lines about a disk that takes nothing."""


class SaveSink(Sink):
    """Appends predictions to a file.

    Args:
        path: The file. Its folder must exist.
        forgiving: Whether a disk that takes nothing is logged and gone on without, as suits a camera, instead of
            ending the run.
        clock: Monotonic seconds.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, *, forgiving: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._forgiving = forgiving
        self._clock = clock
        self._news = Changes(STILL_FULL_S, clock)
        self._lines: list[bytes] = []
        self._bytes = 0
        self._lost = 0
        self._saved_at = clock()
        try:
            path.open("ab").close()
        except OSError as error:
            raise disk_error(error, path) from error

    def prediction(self, message: PredictionMessage) -> None:
        """Keep it for the next write."""
        line = msgspec.json.encode(message) + b"\n"
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= SAVE_BYTES:
            self._save()

    def turn(self) -> None:
        """Write what has waited long enough."""
        if self._lines and self._clock() >= self._saved_at + SAVE_EVERY_S:
            self._save()

    def close(self) -> None:
        """Write the rest."""
        if self._lines:
            self._save()

    def _save(self) -> None:
        lines, count = b"".join(self._lines), len(self._lines)
        self._lines.clear()
        self._bytes = 0
        self._saved_at = self._clock()
        try:
            # Opened anew each time: a file that somebody has moved away or cleaned up is made again.
            with self._path.open("ab+") as file:
                _end_line(file.fileno())
                if 0 < file.tell() > MAX_FILE_BYTES - len(lines):
                    self._path.replace(self._path.with_name(self._path.name + ".1"))
                    with self._path.open("ab") as fresh:
                        fresh.write(lines)
                else:
                    file.write(lines)
        except OSError as error:
            if not self._forgiving:
                raise disk_error(error, self._path) from error
            self._lost += count
            self._tell(str(disk_error(error, self._path)))

    def _tell(self, reason: str) -> None:
        if self._news.is_news(reason):
            import structlog  # paid for only where it is needed

            structlog.get_logger().warning("predictions_not_saved", reason=reason, lost=self._lost)


def _end_line(descriptor: int) -> None:
    """End the line that a power cut or a full disk has left unfinished, so that the next one is not lost with it."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
