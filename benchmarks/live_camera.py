"""A network camera without a camera: motion JPEG over HTTP, the same picture again and again, as often as a real one."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

SIZE = (640, 480)


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class LiveCamera:
    """Streams white frames to whoever asks; a context manager.

    Args:
        fps: Frames a second.

    Attributes:
        url: Where it is.
    """

    def __init__(self, fps: float) -> None:
        file = io.BytesIO()
        Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 255, np.uint8)).save(file, "jpeg")
        jpeg = file.getvalue()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
        self._part = head.encode() + jpeg + b"\r\n"
        self._period_s = 1 / fps
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera._stream(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/stream"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _stream(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        request.end_headers()
        due = time.monotonic()
        try:
            while True:
                request.wfile.write(self._part)
                due += self._period_s
                time.sleep(max(0.0, due - time.monotonic()))
        except OSError:
            return  # the viewer went away
