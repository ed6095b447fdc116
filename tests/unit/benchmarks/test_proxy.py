import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from benchmarks.proxy import LOOPBACK, CountingProxy, Traffic

DEADLINE_S = 20.0


class Server:
    """Reads a connection to its end, answers with ``factor`` times what it read, and closes it."""

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self.received: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            self.received.append(data)
            connection.sendall(data * self._factor)


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server(factor=3)) as running:
        yield running


def exchange(port: int, data: bytes) -> bytes:
    with socket.create_connection((LOOPBACK, port), DEADLINE_S) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.mark.parametrize("length", [0, 1, (1 << 18) - 1, 1 << 18, 5_000_001])
def test_bytes_are_counted_exactly_and_passed_on_unchanged(server: Server, length: int) -> None:
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    with CountingProxy(server.port) as proxy:
        assert exchange(proxy.port, data) == data * 3
        assert proxy.traffic() == Traffic(up=length, down=3 * length)
        assert server.received == [data]


def test_connections_are_added_up_also_after_they_are_over(server: Server) -> None:
    with CountingProxy(server.port) as proxy:
        clients = [threading.Thread(target=exchange, args=(proxy.port, bytes(10_000 + i))) for i in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(DEADLINE_S)
        total = sum(10_000 + i for i in range(8))
        assert proxy.connections == 8
        assert proxy.traffic() == Traffic(total, 3 * total)
    assert proxy.traffic() == Traffic(total, 3 * total)


def test_a_piece_is_counted_before_it_arrives() -> None:
    with (
        closing(socket.create_server((LOOPBACK, 0))) as listener,
        CountingProxy(listener.getsockname()[1]) as proxy,
        socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S) as client,
    ):
        client.sendall(b"x" * 1000)
        connection, _ = listener.accept()
        with connection:
            got = b""
            while len(got) < 1000:
                got += connection.recv(1000)
            assert proxy.traffic() == Traffic(1000, 0)


def test_each_proxy_counts_its_own_client(server: Server) -> None:
    with CountingProxy(server.port) as one, CountingProxy(server.port) as other:
        exchange(one.port, bytes(100))
        exchange(other.port, bytes(7))
        assert (one.traffic(), other.traffic()) == (Traffic(100, 300), Traffic(7, 21))


def test_a_client_is_turned_away_while_the_server_is_away_and_served_when_it_is_there() -> None:
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    with CountingProxy(port) as proxy:
        with socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S) as client:
            assert client.recv(1) == b""
        with (
            socket.create_server((LOOPBACK, port)) as listener,
            socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S) as client,
        ):
            listener.accept()[0].close()
            assert client.recv(1) == b""
        assert proxy.connections == 1


def test_a_reset_ends_the_connection_on_the_other_side_too() -> None:
    with (
        closing(socket.create_server((LOOPBACK, 0))) as listener,
        CountingProxy(listener.getsockname()[1]) as proxy,
        socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S) as client,
    ):
        connection, _ = listener.accept()
        with connection:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()  # with a reset, not a goodbye
            connection.settimeout(DEADLINE_S)
            assert connection.recv(1) == b""


def test_closing_ends_clients_that_wait() -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as listener:
        proxy = CountingProxy(listener.getsockname()[1])
        with socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S) as client:
            connection, _ = listener.accept()
            proxy.close()
            assert client.recv(1) == b""
            connection.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S)


def test_traffic_is_added_and_subtracted() -> None:
    assert Traffic(5, 7) + Traffic(1, 2) - Traffic(3, 3) == Traffic(3, 6)
