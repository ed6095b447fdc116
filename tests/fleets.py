"""Enrolled fleets on real brokers, and the processes around them."""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import psutil
from brokers import find_program, free_port, until

from aggregator.broker import EmbeddedBroker
from aggregator.enrolment import MOSQUITTO_FOLDER, Enrolment
from aggregator.mosquitto import mosquitto_conf
from federation.bundle import Bundle, address
from federation.wire.link import BrokerAddress, Inbox, Link, Message, Will
from federation.wire.topics import Topics

DEADLINE_S = 30.0
TOPICS = Topics("fleet")


def listens(port: int) -> bool:
    """Whether something accepts connections on that loopback port."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def gone(pid: int | None) -> bool:
    if pid is None or not psutil.pid_exists(pid):
        return True
    # Where nobody reaps orphans, as in a container without an init, the dead stay as zombies.
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Child:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self._process = process
        self.first_line = process.stdout.readline()
        assert self.first_line, "the child died before it was up"
        self.pid = process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)


@contextlib.contextmanager
def child(code: str, *arguments: object) -> Iterator[Child]:
    """A Python process that prints one line when it is up, and ends when its standard input does."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


class Client:
    """A link and all that it has heard."""

    def __init__(self, where: BrokerAddress, name: str, will: Will | None = None) -> None:
        self._inbox = Inbox()
        self.heard: list[object] = []
        self.link = Link(where, name, on_event=self._inbox.put, will=will, retry_max_s=0.5)
        self.link.start()

    def connected(self) -> "Client":
        self.link.wait_connected(DEADLINE_S)
        return self

    def wait(self, condition: Callable[[object], bool], what: str) -> object:
        """The first event past or to come that fulfils the condition."""
        for event in self.heard:
            if condition(event):
                return event
        deadline = monotonic() + DEADLINE_S
        while monotonic() < deadline:
            item = self._inbox.get(deadline - monotonic())
            self.heard.append(item)
            if condition(item):
                return item
        raise AssertionError(f"never: {what}; heard {self.heard}")

    def drain(self) -> None:
        """Take all that has come, without waiting."""
        while (item := self._inbox.get(0)) is not None:
            self.heard.append(item)

    def hears(self, topic: str, payload: bytes) -> Message:
        event = self.wait(
            lambda item: isinstance(item, Message) and (item.topic, item.payload) == (topic, payload), topic
        )
        assert isinstance(event, Message)
        return event

    def topics(self) -> set[str]:
        return {event.topic for event in self.heard if isinstance(event, Message)}


class Served:
    """A broker of either kind with its enrolment; ``restart`` kills it with -9 and waits until it is back."""

    def __init__(
        self,
        enrolment: Enrolment,
        url: str,
        reload: Callable[[], None],
        restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.enrolment = enrolment
        self.url = url
        self.reload = reload
        self.restart = restart
        self._clients: list[Client] = []

    def enroll(self, name: str, *, again: bool = False) -> Bundle:
        bundle = self.enrolment.enroll(name, broker_url=self.url, replace=again)
        self.reload()
        return bundle

    def client(self, where: BrokerAddress | Bundle, name: str, will: Will | None = None) -> Client:
        client = Client(address(where) if isinstance(where, Bundle) else where, name, will)
        self._clients.append(client)
        return client

    def aggregator_address(self) -> BrokerAddress:
        username, password = self.enrolment.aggregator_account()
        return BrokerAddress.parse(self.url, username=username, password=password)

    def aggregator(self) -> Client:
        """Connected and subscribed to everything: proven by hearing its own retained state."""
        client = self.client(self.aggregator_address(), "aggregator").connected()
        client.link.subscribe([(TOPICS.everything, 1)])
        client.link.publish(TOPICS.aggregator, b"online", retain=True)
        client.hears(TOPICS.aggregator, b"online")
        return client

    def close(self) -> None:
        for client in self._clients:
            client.link.stop()


def nats_served(state: Path) -> Iterator[Served]:
    enrolment = Enrolment(state, "fleet")
    with EmbeddedBroker(enrolment, port=0) as broker:
        served = Served(enrolment, broker.url, broker.reload, lambda: restart_embedded(broker))
        yield served
        served.close()


def restart_embedded(broker: EmbeddedBroker) -> None:
    """Kill -9; it comes back by itself."""
    before = broker.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until(lambda: broker.pid not in (None, before), timeout_s=DEADLINE_S, what="started again")


class Mosquitto:
    """A mosquitto with the accounts and rights that an enrolment writes; can be killed and started again.

    Args:
        accounts: ``STATE/broker/mosquitto``.
        folder: For its configuration, retained messages and log.
    """

    def __init__(self, accounts: Path, folder: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._log = folder / "mosquitto.log"
        self._conf = folder / "mosquitto.conf"
        # A mosquitto that is started as root changes to its own user, which may not enter the test's folders.
        me = f"user {getpass.getuser()}\n"
        self._conf.write_text(mosquitto_conf(accounts, data=folder, host="127.0.0.1", port=self.port) + me)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, or start again, and wait until it listens."""
        with self._log.open("ab") as output:
            process = self._process = subprocess.Popen(
                [find_program("mosquitto"), "-v", "-c", str(self._conf)], stdout=output, stderr=output
            )
        until(lambda: listens(self.port) or process.poll() is not None, what="mosquitto listens")
        assert process.poll() is None, self._log.read_text()

    def reload(self) -> None:
        """Make it read the accounts again."""
        assert self._process is not None
        before = self._log.read_text().count("Reloading config")
        self._process.send_signal(signal.SIGHUP)
        until(lambda: self._log.read_text().count("Reloading config") > before, what="reload")

    def kill(self) -> None:
        """Kill -9: what it held in memory is gone, retained messages too."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(DEADLINE_S)

    def restart(self) -> None:
        """Kill -9 and start again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(DEADLINE_S)


def mosquitto_served(state: Path) -> Iterator[Served]:
    enrolment = Enrolment(state, "fleet")
    broker = Mosquitto(state / MOSQUITTO_FOLDER, state)
    try:
        broker.start()
        served = Served(enrolment, broker.url, broker.reload, broker.restart)
        yield served
        served.close()
    finally:
        broker.stop()
