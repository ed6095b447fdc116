"""What plain paho clients reach: no hashes, no disk, no protocol, nothing but 96 KiB messages pushed as they go.

The yardstick of ``benchmarks.transfer``, in as many processes and with as many clients as the product's side uses, with
``TCP_NODELAY`` at both ends and paho's own network threads.

- ``raw-publish``: each client publishes its messages, at QoS 0 or 1, as fast as paho takes them.
- ``raw-subscribe``: each client counts what it gets, until all is there or nothing has come for a while.
"""

import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from benchmarks.carriers import CONNECT_S, tell, wait_for_go

QUIET_S = 3.0
"""Nothing for so long, and what is missing is lost."""

IN_PAHO = 64
"""Messages that a publisher leaves in paho's queue: more costs memory and brings nothing."""


class Task(msgspec.Struct, frozen=True):
    """What a process is to do.

    Attributes:
        role: ``raw-publish`` or ``raw-subscribe``.
        host: Of the broker.
        port: Of the broker.
        folder: Holds ``go`` when the work is to begin.
        topics: One client for each; a subscriber may have a wildcard.
        clients: Names of the clients, one for each topic.
        qos: 0 or 1.
        messages: To publish or to await, for each client.
        message_bytes: Of one.
    """

    role: str
    host: str
    port: int
    folder: str
    topics: tuple[str, ...]
    clients: tuple[str, ...]
    qos: int
    messages: int
    message_bytes: int


def connect(task: Task, name: str) -> Client:
    """A connected client with a network thread."""
    client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
    client.max_inflight_messages_set(IN_PAHO)
    up = threading.Event()
    client.on_connect = lambda *_: up.set()

    def open_socket(_client: Client, _userdata: object, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    client.on_socket_open = open_socket
    client.connect(task.host, task.port)
    client.loop_start()
    if not up.wait(CONNECT_S):
        sys.exit("no connection")
    return client


def publish(task: Task) -> None:
    """Push."""
    payload = bytes(task.message_bytes)
    clients = [connect(task, name) for name in task.clients]
    wait_for_go(Path(task.folder))
    began = time.monotonic()

    def push(client: Client, topic: str) -> None:
        room = threading.Semaphore(IN_PAHO)
        client.on_publish = lambda *_: room.release()
        for _ in range(task.messages):
            room.acquire()
            client.publish(topic, payload, task.qos)
        for _ in range(IN_PAHO):
            room.acquire()

    threads = [threading.Thread(target=push, args=pair) for pair in zip(clients, task.topics, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell("done", began=began)
    threading.Event().wait()


class _Listener:
    def __init__(self, task: Task, name: str, topic: str) -> None:
        self.received, self.last_at, self.started_at = 0, 0.0, 0.0
        self._wanted, self._size = task.messages, task.message_bytes
        self.over = threading.Event()
        client = connect(task, name)
        client.on_message = self._on_message
        there = threading.Event()
        client.on_subscribe = lambda *_: there.set()
        client.subscribe(topic, task.qos)
        there.wait(CONNECT_S)

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        self.last_at = time.monotonic()
        if len(message.payload) == self._size:
            self.received += 1
        if self.received == self._wanted:
            self.over.set()

    def wait(self) -> None:
        """Until all is there, or nothing has come for a while."""
        while not self.over.wait(0.05):
            if self.last_at and time.monotonic() - self.last_at > QUIET_S:
                return


def subscribe(task: Task) -> None:
    """Count."""
    listeners = [_Listener(task, name, topic) for name, topic in zip(task.clients, task.topics, strict=True)]
    wait_for_go(Path(task.folder))
    for listener in listeners:
        listener.wait()
    received = sum(listener.received for listener in listeners)
    tell(
        "done",
        finished=max(listener.last_at for listener in listeners),
        bytes=received * task.message_bytes,
        lost=len(listeners) * task.messages - received,
    )
    threading.Event().wait()


ROLES = {"raw-publish": publish, "raw-subscribe": subscribe}


def main(arguments: list[str]) -> None:
    """Play a role until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    task = msgspec.json.decode(arguments[0], type=Task)
    ROLES[task.role](task)


if __name__ == "__main__":
    main(sys.argv[1:])
