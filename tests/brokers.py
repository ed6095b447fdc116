"""Real brokers for tests: mosquitto and nats-server as child processes on free loopback ports."""

import datetime as dt
import getpass
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from federation.wire.link import BrokerAddress

Kind = Literal["mosquitto", "nats"]

READY_S = 20.0
"""Generous: a loaded machine may need seconds to start a process."""


def until(ready: Callable[[], bool], *, timeout_s: float = 20.0, what: str = "condition") -> None:
    """Poll until ``ready`` says so; fail the test at the deadline."""
    deadline = monotonic() + timeout_s
    while not ready():
        if monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout_s} s")
        sleep(0.005)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_program(name: str) -> str:
    """Full path of a broker; its absence is a failure, not a skip."""
    places = os.pathsep.join(
        (
            str(Path(sys.executable).parent),
            sysconfig.get_path("scripts"),
            os.environ.get("PATH", ""),
            "/usr/sbin",
        )
    )
    found = shutil.which(name, path=places)
    if found is None:
        raise AssertionError(f"{name} is not installed: run `make test`, which installs what the tests need")
    return found


@dataclass(frozen=True)
class Certificates:
    """A certificate authority with a server and a client certificate, as files in one folder."""

    folder: Path

    @property
    def ca_pem(self) -> str:
        return (self.folder / "ca.pem").read_text()

    def file(self, name: str) -> str:
        """``ca``, ``server``, ``server-key``, ``client`` or ``client-key``."""
        return str(self.folder / f"{name}.pem")


def make_certificates(folder: Path) -> Certificates:
    """A fresh authority; its server certificate is valid for localhost and 127.0.0.1."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Test CA {folder.name}")])
    now = dt.datetime.now(dt.UTC)

    def issue(name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    def write(name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}-key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    write("ca", issue(ca_name, ca_key, authority=True), ca_key)
    for who in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        write(
            who, issue(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]), key, authority=False), key
        )
    return Certificates(folder)


@dataclass
class Broker:
    """A broker process that can be killed and started again on its port.

    Attributes:
        kind: Which program.
        folder: For its configuration, store and log; must be this test's own.
        version: Goes into :attr:`address`; 0 lets the link find out.
        accounts: User names and passwords; empty lets everybody in.
        acl: mosquitto: lines of its ACL file.
        permissions: nats: what follows a user's password, by name: ``, permissions: {…}``.
        certificates: Speak TLS with these.
        client_certificate: Demand one.
        max_packet_bytes: mosquitto's ``max_packet_size``; nats' ``max_payload``.
    """

    kind: Kind
    folder: Path
    version: Literal[0, 3, 5] = 0
    accounts: Mapping[str, str] = field(default_factory=dict)
    acl: str = ""
    permissions: Mapping[str, str] = field(default_factory=dict)
    certificates: Certificates | None = None
    client_certificate: bool = False
    max_packet_bytes: int | None = None
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def address(self, **arguments: str) -> BrokerAddress:
        """Where it listens; arguments are those of :meth:`BrokerAddress.parse`."""
        return BrokerAddress.parse(self.url, **arguments)

    @property
    def url(self) -> str:
        scheme = "mqtts" if self.certificates else "mqtt"
        return f"{scheme}://127.0.0.1:{self.port}" + (f"?version={self.version}" if self.version else "")

    def start(self) -> None:
        """Start, or start again on the same port, and wait until it listens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        log = self.folder / "broker.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(self._command(), stdout=output, stderr=output, cwd=self.folder)
        deadline = monotonic() + READY_S
        while not self._listens():
            if self.process.poll() is not None or monotonic() > deadline:
                state = f"exited with {self.process.poll()}"
                self.stop()
                raise AssertionError(f"{self.kind} {state} or does not listen:\n{log.read_text()[-3000:]}")
            sleep(0.005)

    def kill(self) -> None:
        """As power loss would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(READY_S)

    def restart(self) -> None:
        """Kill -9 and start again on the same port."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def set_accounts(self, accounts: Mapping[str, str]) -> None:
        """Other passwords, from the next start on."""
        self.accounts = accounts

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def _command(self) -> list[str]:
        config = self.folder / "broker.conf"
        config.write_text(self._mosquitto() if self.kind == "mosquitto" else self._nats())
        if self.kind == "mosquitto":
            return [find_program("mosquitto"), "-c", str(config)]
        return [find_program("nats-server"), "-c", str(config)]

    def _mosquitto(self) -> str:
        # Started as root it would become a user who cannot read the test's folder.
        lines = [f"listener {self.port} 127.0.0.1", f"user {getpass.getuser()}", "set_tcp_nodelay true"]
        lines.append(f"allow_anonymous {'false' if self.accounts else 'true'}")
        if self.accounts:
            passwords = self.folder / "passwords"
            passwords.write_text("".join(f"{user}:{password}\n" for user, password in self.accounts.items()))
            passwords.chmod(0o600)
            subprocess.run(
                [find_program("mosquitto_passwd"), "-U", str(passwords)], check=True, timeout=READY_S
            )
            lines.append(f"password_file {passwords}")
        if self.acl:
            rules = self.folder / "acl"
            rules.write_text(self.acl)
            rules.chmod(0o600)
            lines.append(f"acl_file {rules}")
        if self.certificates:
            lines += [
                f"certfile {self.certificates.file('server')}",
                f"keyfile {self.certificates.file('server-key')}",
                f"cafile {self.certificates.file('ca')}",
                f"require_certificate {'true' if self.client_certificate else 'false'}",
            ]
        if self.max_packet_bytes:
            lines.append(f"max_packet_size {self.max_packet_bytes}")
        return "\n".join(lines) + "\n"

    def _nats(self) -> str:
        tls = ""
        if self.certificates:
            verify = ", verify: true" if self.client_certificate else ""
            tls = (
                f', tls {{ cert_file: "{self.certificates.file("server")}", '
                f'key_file: "{self.certificates.file("server-key")}", '
                f'ca_file: "{self.certificates.file("ca")}"{verify} }}'
            )
        lines = [
            f'server_name: "test-{self.port}"',
            'listen: "127.0.0.1:-1"',
            f'jetstream {{ store_dir: "{self.folder / "store"}" }}',
            f'mqtt {{ listen: "127.0.0.1:{self.port}"{tls} }}',
        ]
        if self.accounts:
            users = ", ".join(
                f'{{ user: "{user}", password: "{password}"{self.permissions.get(user, "")} }}'
                for user, password in self.accounts.items()
            )
            lines.append(f"authorization {{ users: [ {users} ] }}")
        if self.max_packet_bytes:
            lines.append(f"max_payload: {self.max_packet_bytes}")
        return "\n".join(lines) + "\n"


class Relay:
    """A TCP relay on loopback in front of a broker: a network that can be cut and mended, and that counts.

    Args:
        port: Where the broker listens.

    Attributes:
        up: Bytes that came from clients, over all connections.
        down: Bytes that came from the broker.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.up = self.down = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection at once, without a word to either side's protocol. New ones are let through."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its peer was faster

    def close(self) -> None:
        """End for good."""
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(), which close() does not
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, source is near), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        try:
            while data := source.recv(65536):
                with self._lock:
                    if upwards:
                        self.up += len(data)
                    else:
                        self.down += len(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for sock in (source, sink):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
            with self._lock:
                self._sockets.discard(source)
            source.close()
