"""What deploy/ holds is what the programs make, and works: a real mosquitto starts with its file and lets the right ones in."""

import getpass
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from brokers import Certificates, find_program, free_port, make_certificates, until
from fleets import listens

from aggregator.enrolment import MOSQUITTO_FOLDER, Enrolment
from aggregator.mosquitto import mosquitto_conf
from federation.bundle import Bundle, address
from federation.errors import BrokerRefusedError, TransportError
from federation.wire.link import Inbox, Link, Message
from federation.wire.topics import Topics

DEPLOY = Path(__file__).parents[2] / "deploy"
STATE, STORE, CERTS = Path("/var/lib/fedge"), Path("/var/lib/mosquitto"), Path("/etc/mosquitto/certs")
PORT = 8883
PATIENCE_S = 60.0


def test_the_brokers_file_is_what_the_enrolment_would_write() -> None:
    assert (DEPLOY / "mosquitto.conf").read_text() == mosquitto_conf(
        STATE / MOSQUITTO_FOLDER,
        data=STORE,
        port=PORT,
        certificate=CERTS / "server.pem",
        key=CERTS / "server-key.pem",
    )


class Deployed:
    """A mosquitto with that file, its paths and its port moved into the test's folder."""

    def __init__(self, folder: Path) -> None:
        self.certificates: Certificates = make_certificates(folder / "certs")
        self.port = free_port()
        self.enrolment = Enrolment(folder / "state", "garden")
        self.url = f"mqtts://127.0.0.1:{self.port}"
        self.pi1 = self._enroll("pi1")
        (folder / "store").mkdir()
        config = folder / "mosquitto.conf"
        config.write_text(
            (DEPLOY / "mosquitto.conf")
            .read_text()
            .replace(str(STATE), str(folder / "state"))
            .replace(str(STORE), str(folder / "store"))
            .replace(str(CERTS), str(folder / "certs"))
            .replace(f"listener {PORT} 0.0.0.0", f"listener {self.port} 127.0.0.1")
            # Started as root it would become a user who may not enter the test's folder.
            + f"user {getpass.getuser()}\n"
        )
        self.log = folder / "mosquitto.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [find_program("mosquitto"), "-c", str(config)], stdout=log, stderr=log
            )
        until(
            lambda: listens(self.port) or self.process.poll() is not None,
            timeout_s=PATIENCE_S,
            what="mosquitto listens",
        )
        assert self.process.poll() is None, self.log.read_text()

    def _enroll(self, name: str) -> Bundle:
        return self.enrolment.enroll(name, broker_url=self.url, ca_pem=self.certificates.ca_pem)


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployed]:
    broker = Deployed(tmp_path)
    yield broker
    broker.process.kill()
    broker.process.wait(PATIENCE_S)


@pytest.fixture
def connect() -> Iterator[Callable[[Bundle], tuple[Link, Inbox]]]:
    links: list[Link] = []

    def connected(bundle: Bundle) -> tuple[Link, Inbox]:
        inbox = Inbox()
        link = Link(address(bundle), f"garden-{bundle.agent}-test", on_event=inbox.put)
        links.append(link)
        link.start()
        link.wait_connected(PATIENCE_S)
        return link, inbox

    yield connected
    for link in links:
        link.stop()


def change(bundle: Bundle, **changes: str) -> Bundle:
    return msgspec.structs.replace(bundle, **changes)


@pytest.mark.network
def test_an_enrolled_device_comes_in_over_tls_and_reaches_its_own_branch(
    deployed: Deployed, connect: Callable[[Bundle], tuple[Link, Inbox]]
) -> None:
    link, inbox = connect(deployed.pi1)
    state, foreign = Topics("garden").state("pi1"), Topics("garden").state("pi2")
    link.subscribe([(state, 1), (foreign, 1)])
    link.publish(foreign, b"not its own", qos=1, retain=True)
    link.publish(state, b"its own", qos=1, retain=True)
    heard: list[Message] = []

    def came() -> bool:
        item = inbox.get(0)
        if isinstance(item, Message):
            heard.append(item)
        return bool(heard)

    until(came, timeout_s=PATIENCE_S, what="its own message")
    assert [(message.topic, message.payload) for message in heard] == [(state, b"its own")]


@pytest.mark.network
def test_nobody_comes_in_without_the_password_or_with_a_certificate_of_others(
    deployed: Deployed, connect: Callable[[Bundle], tuple[Link, Inbox]], tmp_path: Path
) -> None:
    with pytest.raises(BrokerRefusedError):
        connect(change(deployed.pi1, password="guessed"))
    with pytest.raises(TransportError):
        connect(change(deployed.pi1, ca_pem=make_certificates(tmp_path / "other").ca_pem))
