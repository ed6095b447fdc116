"""The embedded broker: the real nats-server, run as a child that neither outlives us nor stays dead while we live."""

import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from aggregator import nats
from aggregator.broker_process import (
    BrokerFiles,
    end,
    find_executable,
    lock,
    reload,
    running,
    spawn,
    stop_orphan,
    tail,
)
from aggregator.enrolment import NATS_ACCOUNTS, Enrolment
from federation.errors import ConfigError, TransportError
from federation.files import write_whole
from federation.wire.address import BrokerAddress

_START_S = 30.0
"""It is up in a tenth of a second; recovering a store of some GB from an SD card takes longer."""

_POLL_S = 0.02
_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 30.0
_STABLE_S = 60.0
"""A broker that lived this long starts the back-off anew."""

_PRIVATE = 0o600

_log = structlog.get_logger()


class EmbeddedBroker:
    """nats-server as a supervised child process. MQTT 3.1.1, QoS 0 and 1, retained messages on disk.

    The broker dies with this process, even at ``kill -9`` (Linux); one left over from an earlier process is stopped
    first. When it dies by itself it is started again, with a growing delay.

    Args:
        enrolment: Whose accounts may log in, and in whose state folder the broker keeps its files.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        certificate: PEM chain of the server; with ``key``, serves TLS.
        key: PEM private key of the server.
        max_packet_bytes: Largest MQTT packet that it takes.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        *,
        host: str = "127.0.0.1",
        port: int = 1883,
        certificate: Path | None = None,
        key: Path | None = None,
        max_packet_bytes: int = nats.MAX_PACKET_BYTES,
    ) -> None:
        if (certificate is None) != (key is None):
            raise ConfigError("TLS needs both a certificate and its key: only one of the two is set")
        self.host = host
        self.port = port
        self._certificate = certificate
        self._key = key
        self._max_packet_bytes = max_packet_bytes
        self._files = BrokerFiles(enrolment.state_dir)
        self._lock_handle: int | None = None
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._failure: OSError | ConfigError | None = None
        self._supervisor: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id of nats-server; None while it is down."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    @property
    def url(self) -> str:
        """Address for clients on this machine, with what an MQTT 3.1.1 broker cannot say by itself."""
        return self.url_at(_connectable(self.host))

    def url_at(self, host: str) -> str:
        """The same for clients that know this machine as ``host``: what belongs into a bundle."""
        scheme = "mqtts" if self._certificate else "mqtt"
        name = f"[{host}]" if ":" in host else host
        return f"{scheme}://{name}:{self.port}?version=3&max_packet={self._max_packet_bytes}"

    def address(self, account: tuple[str, str], *, ca_file: Path | None = None) -> BrokerAddress:
        """Where and as whom to connect from this machine.

        Args:
            account: User name and password, e.g. from :meth:`Enrolment.aggregator_account`.
            ca_file: PEM certificates to trust, when TLS is served.

        Returns:
            The address, with the protocol version and the packet limit filled in.
        """
        username, password = account
        return BrokerAddress.parse(self.url, username=username, password=password, ca_file=ca_file)

    def start(self) -> None:
        """Start nats-server and wait until it takes MQTT connections.

        Raises:
            ConfigError: If the executable is missing, the port is taken, another process runs this state folder's
                broker, or nats-server refuses its configuration.
            TransportError: If it does not answer in time.
        """
        executable = find_executable()
        self._lock_handle = lock(self._files.lock)
        try:
            stop_orphan(self._files)
            self.port = _free_port(self.host, self.port)
            self._write_configuration()
            self._stopping.clear()
            self._ready.clear()
            self._failure = None
            # One thread starts every child and lives as long as they may: Linux sends the parent-death signal when
            # the *thread* that forked ends, not the process.
            self._supervisor = threading.Thread(
                target=self._supervise, args=(executable,), name="broker", daemon=True
            )
            self._supervisor.start()
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        _log.info("broker_started", url=self.url, pid=self.pid, log=str(self._files.log))

    def stop(self) -> None:
        """Stop nats-server and wait until it is gone. Does nothing when it is not running."""
        with self._guard:
            self._stopping.set()
            child = self._child
        if child is not None:
            end(child)
        if self._supervisor is not None:
            self._supervisor.join()
            self._supervisor = None
        self._child = None
        if self._lock_handle is not None:
            self._files.pid.unlink(missing_ok=True)
            os.close(self._lock_handle)
            self._lock_handle = None
            _log.info("broker_stopped", port=self.port)

    def reload(self) -> None:
        """Make the running broker read the accounts again; connected agents stay connected.

        Raises:
            TransportError: If the broker is down (it reads them when it starts) or does not confirm.
        """
        pid = self.pid
        if pid is None:
            raise TransportError(
                "the embedded broker is down at the moment; it reads the accounts when it starts"
            )
        reload(self._files, pid)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _write_configuration(self) -> None:
        conf = nats.server_conf(
            self._files.folder,
            accounts=NATS_ACCOUNTS,
            log=self._files.log,
            host=self.host,
            port=self.port,
            certificate=self._certificate,
            key=self._key,
            max_packet_bytes=self._max_packet_bytes,
        )
        write_whole(self._files.conf, conf, mode=_PRIVATE)

    def _supervise(self, executable: Path) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            try:
                with self._guard:
                    if self._stopping.is_set():
                        return
                    child = self._child = spawn(executable, self._files)
            except (OSError, ConfigError) as error:
                self._failure = error
                _log.exception("broker_spawn_failed", executable=str(executable))
            else:
                code = child.wait()
                if self._stopping.is_set() or not self._ready.is_set():
                    return
                _log.error("broker_died", code=code, restart_in_s=backoff_s, tail=tail(self._files))
            if not self._ready.is_set():
                return
            if time.monotonic() - started > _STABLE_S:
                backoff_s = _FIRST_BACKOFF_S
            if self._stopping.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    def _await_ready(self) -> None:
        supervisor = self._supervisor
        assert supervisor is not None
        deadline = time.monotonic() + _START_S
        while not _accepts(self.host, self.port):
            if not supervisor.is_alive():
                reason = str(self._failure) if self._failure else tail(self._files)
                raise ConfigError(f"nats-server did not start on {self.host}:{self.port}: {reason}")
            if time.monotonic() > deadline:
                raise TransportError(
                    f"nats-server takes no connections on {self.host}:{self.port} after {_START_S:.0f} s: "
                    f"{tail(self._files)}"
                )
            time.sleep(_POLL_S)
        self._ready.set()
        if not supervisor.is_alive():
            raise ConfigError(f"nats-server died as soon as it was up: {tail(self._files)}")


def reload_running(state_dir: Path) -> bool:
    """Make the embedded broker of ``state_dir``, run by another process, read the accounts again.

    Returns:
        False when none is running: the accounts are read when it starts.

    Raises:
        TransportError: If it does not confirm.
    """
    files = BrokerFiles(state_dir.resolve())
    process = running(files)
    if process is None:
        return False
    reload(files, process.pid)
    return True


def _free_port(host: str, port: int) -> int:
    """Check that we may listen there, and resolve port 0."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            taken: int = probe.getsockname()[1]
            return taken
    except OSError as error:
        raise ConfigError(
            f"the embedded broker cannot listen on {host}:{port} ({error.strerror}): stop what uses the port, "
            "or choose another with --listen HOST:PORT"
        ) from error


def _connectable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # compared, not bound


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((_connectable(host), port), timeout=1).close()
    except OSError:
        return False
    return True
