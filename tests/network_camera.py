"""A network camera for tests: motion JPEG over HTTP, as cheap cameras give it, that can vanish and come back."""

import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

FPS = 20


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


class NetworkCamera:
    """Streams frames of one brightness to whoever asks.

    Attributes:
        brightness: Of the frames from now on, 0 to 255; -1 sends bytes that are no JPEG.
        url: Where it is, password and all.
    """

    def __init__(self) -> None:
        self.brightness = 255
        self._vanished = threading.Event()
        self._server: _Server | None = None
        self._port = 0
        self.come_back()

    @property
    def url(self) -> str:
        return f"http://viewer:geheim@127.0.0.1:{self._port}/stream?token=geheim"

    def come_back(self) -> None:
        """Serve, on the same port as before."""
        self._vanished.clear()
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera._stream(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def vanish(self) -> None:
        """End all streams, and let nobody in any more."""
        self._vanished.set()
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def _stream(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        request.end_headers()
        try:
            while not self._vanished.wait(1 / FPS):
                jpeg = _jpeg(self.brightness)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                request.wfile.write(head.encode() + jpeg + b"\r\n")
            request.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the viewer went away


def _jpeg(brightness: int) -> bytes:
    if brightness < 0:
        return b"\xff\xd8 no picture \xff\xd9"
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), brightness, np.uint8)).save(file, "jpeg")
    return file.getvalue()
