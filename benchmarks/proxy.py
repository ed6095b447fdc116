"""A loopback proxy that counts what goes through a TCP connection, exactly and in both directions.

What is counted is the TCP payload, as any of the two ends sees it: all that TLS, HTTP/2 or MQTT add is in it, TCP's
and IP's own headers (52 bytes a segment) are not. One proxy for each client tells one client's bytes from another's.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

LOOPBACK = "127.0.0.1"

_BUFFER_BYTES = 1 << 18
"""One copy in and one out for each; larger ones gained nothing on loopback."""

_CONNECT_S = 10.0
_JOIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of TCP payload.

    Attributes:
        up: From the client to the server.
        down: From the server to the client.
    """

    up: int = 0
    down: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.up + other.up, self.down + other.down)

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.up - earlier.up, self.down - earlier.down)


class CountingProxy:
    """Passes every connection on to one server and counts; a context manager.

    It listens at once. While the server is not there, a client's connection is closed as soon as it was accepted.

    Args:
        server_port: Of the server, on loopback.
    """

    def __init__(self, server_port: int) -> None:
        self._server = (LOOPBACK, server_port)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        """Where clients connect to."""
        self._guard = threading.Lock()
        self._connections: list[_Connection] = []
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def traffic(self) -> Traffic:
        """What has gone through so far, over all connections, also those that are over."""
        with self._guard:
            return sum((each.traffic() for each in self._connections), Traffic())

    @property
    def connections(self) -> int:
        """How many clients' connections were passed on so far."""
        with self._guard:
            return len(self._connections)

    def close(self) -> None:
        """End all connections and stop listening; the counts stay."""
        with self._guard:
            self._closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone does not
        self._listener.close()
        self._thread.join(_JOIN_S)
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(self._server, _CONNECT_S)
            except OSError:  # not up, or no longer: the client sees it and comes back
                client.close()
                continue
            server.settimeout(None)
            with self._guard:
                if self._closed:
                    client.close()
                    server.close()
                    return
                connection = _Connection(client, server)
                self._connections.append(connection)
            connection.start()  # known before its first byte passes: whoever receives one finds it counted


class _Connection:
    """Two sockets, and a thread for each direction."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        self._up = self._down = 0  # each is written by one thread only
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._upward = threading.Thread(target=self._pump_up, daemon=True)
        self._downward = threading.Thread(target=self._pump_down, daemon=True)

    def start(self) -> None:
        self._upward.start()
        self._downward.start()

    def traffic(self) -> Traffic:
        return Traffic(self._up, self._down)

    def close(self) -> None:
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):  # it has ended by itself
                end.shutdown(socket.SHUT_RDWR)
        self._downward.join(_JOIN_S)

    def _pump_up(self) -> None:
        for count in _pump(self._client, self._server):
            self._up += count

    def _pump_down(self) -> None:
        for count in _pump(self._server, self._client):
            self._down += count
        self._upward.join()
        self._client.close()
        self._server.close()


def _pump(source: socket.socket, target: socket.socket) -> Iterator[int]:
    """Pass on all that comes; each piece's length is given out before the piece is, so no receiver is ahead of it."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with contextlib.suppress(
        OSError
    ):  # either end may reset the connection: then it is over in both directions
        while count := source.recv_into(buffer):
            yield count
            target.sendall(buffer[:count])
        target.shutdown(socket.SHUT_WR)  # the other direction may still have something to say
        return
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
