"""The ends of a transfer as processes of their own, made of the product's parts: what ``benchmarks.transfer`` measures.

``python -m benchmarks.carriers ROLE JSON`` plays one role. Each prints a JSON line ``ready``, waits for the file
``go``, works, prints ``done`` with the monotonic time at which it was, and stays until SIGTERM, so that its memory can
be read.

- ``seed``: the aggregator's side of a download: a :class:`Seeder` puts the object on the broker, then tells its ref.
- ``pull``: devices that fetch it with a :class:`ModelCache`, each with a link and a thread of its own.
- ``collect``: the aggregator's side of uploads: a :class:`Reception`, in one loop as in the service.
- ``offer``: devices that deliver an update from an :class:`Outbox`.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.admission import Limits, OpenRound
from aggregator.reception import Checked, Reception
from aggregator.seeding import Seeder
from aggregator.store import Store
from edge_agent.fetching import ModelCache
from edge_agent.outbox import Outbox
from federation.logs import configure
from federation.wire.codec import encode
from federation.wire.inbox import Connected, Inbox, Message
from federation.wire.link import BrokerAddress, Link
from federation.wire.messages import (
    Credit,
    FullModel,
    ObjectRef,
    RoundPlan,
    TaskSpec,
    TrainMetrics,
    TrainSpec,
    UpdateOffer,
    decode_msgpack,
    encode_msgpack,
)
from federation.wire.objects import ref_of_file
from federation.wire.signing import Purpose, seal
from federation.wire.topics import Topics
from federation.wire.transfer import Upload, make_ref

CONNECT_S = 60.0
POLL_S = 0.002
RUN = "0" * 16
BASE = "0" * 64
WORKERS = 2
"""As the service has."""


class Task(msgspec.Struct, frozen=True):
    """What a process is to do.

    Attributes:
        role: ``seed``, ``pull``, ``collect`` or ``offer``.
        url: Of the broker.
        folder: For state; holds ``go`` when the work is to begin.
        agents: Names, of this process or (``collect``) of all.
        chunk_bytes: Of a chunk.
        object_bytes: Of the object, or of each update.
    """

    role: str
    url: str
    folder: str
    agents: tuple[str, ...]
    chunk_bytes: int
    object_bytes: int


def tell(event: str, **fields: object) -> None:
    """Print one line for the benchmark."""
    print(msgspec.json.encode({"event": event, "at": time.monotonic(), **fields}).decode(), flush=True)


def wait_for_go(folder: Path) -> None:
    """Say that all is prepared, and wait for the file."""
    tell("ready")
    while not (folder / "go").exists():
        time.sleep(POLL_S)


def stay() -> None:
    """Wait to be ended."""
    threading.Event().wait()


def schema_for(length: int) -> dict[str, tuple[int, ...]]:
    """A model whose float32 update has about ``length`` bytes: square layers of a mebibyte."""
    return {f"layer{index:03d}.weight": (512, 512) for index in range(max(1, length >> 20))}


def key_for(agent: str) -> Ed25519PrivateKey:
    """A key that both ends can derive: nobody is being kept out here."""
    return Ed25519PrivateKey.from_private_bytes(agent.encode().ljust(32, b"\0"))


class Peer:
    """A link with its inbox and a loop."""

    def __init__(self, task: Task, name: str) -> None:
        self.inbox, self.topics = Inbox(), Topics("bench")
        self.link = Link(BrokerAddress.parse(task.url), name, on_event=self.inbox.put)
        self.link.start()
        self.link.wait_connected(CONNECT_S)
        while not isinstance(self.inbox.get(CONNECT_S), Connected):
            pass

    def turn(
        self, wakeup: float | None, take: Callable[[object, float], None], tick: Callable[[float], None]
    ) -> None:
        """Wait for one event or the wake-up, as the daemons' loops do."""
        now = time.monotonic()
        item = self.inbox.get(CONNECT_S if wakeup is None else max(0.0, wakeup - now))
        now = time.monotonic()
        if item is not None:
            take(item, now)
        if item is None or (wakeup is not None and now >= wakeup):
            tick(now)


# --- down -----------------------------------------------------------------------------------------------------


def plan_for(ref: ObjectRef, task: Task) -> RoundPlan:
    """A plan whose base model is the object."""
    return RoundPlan(
        run=RUN,
        round=1,
        attempt=1,
        task=TaskSpec(
            model="cnn", labels=("0", "1"), channels=1, height=28, width=28, mean=(0.0,), std=(1.0,)
        ),
        train=TrainSpec(),
        base=BASE,
        full=FullModel(version=BASE, object=ref),
        deltas=(),
        up_encoding="float32",
        max_noise=0.0,
        cohort=("agent-1",),
        deadline_s=3600.0,
        issued_at=0.0,
        upload_chunk_bytes=task.chunk_bytes,
    )


def seed(task: Task) -> None:
    """Publish the object, then its description."""
    folder = Path(task.folder)
    path = folder / "object"
    peer = Peer(task, "seed")
    present = threading.Event()
    with Store(folder / "state", "bench", create=True) as store:
        seeder = Seeder(peer.link, peer.topics, store, lambda _: present.set())
        ref = ref_of_file(path, task.chunk_bytes)
        wait_for_go(folder)
        began = time.monotonic()
        seeder.want(BASE, [(path, ref)])
        present.wait(CONNECT_S)
        peer.link.publish(peer.topics.plan, encode_msgpack(plan_for(ref, task)), retain=True)
        tell("done", began=began)
        stay()


def pull(task: Task) -> None:
    """Fetch the object once for each agent of this process."""
    folder = Path(task.folder)
    pullers = [_Puller(task, agent) for agent in task.agents]
    threads = [threading.Thread(target=puller.run) for puller in pullers]
    wait_for_go(folder)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell(
        "done",
        finished=max(puller.finished_at for puller in pullers),
        bytes=sum(puller.bytes for puller in pullers),
    )
    stay()


class _Puller:
    def __init__(self, task: Task, agent: str) -> None:
        self._peer = Peer(task, agent)
        self._cache = ModelCache(Path(task.folder) / agent, self._peer.link, self._peer.topics, self._ready)
        self._asked = False
        self.bytes = 0
        self.finished_at = 0.0
        self._peer.link.subscribe([(self._peer.topics.plan, 1)])

    def _ready(self, _version: str) -> None:
        self.finished_at = time.monotonic()
        file = self._cache.recipe().start
        assert file is not None
        self.bytes = file.stat().st_size

    def run(self) -> None:
        while not self.finished_at:
            self._peer.turn(self._cache.next_wakeup(), self._take, self._cache.tick)

    def _take(self, item: object, now: float) -> None:
        if not isinstance(item, Message):
            return
        chunk = self._peer.topics.parse_object_chunk(item.topic)
        if chunk is not None:
            self._cache.chunk(*chunk, item.payload, now)
        elif not self._asked:
            self._asked = True
            self._cache.fetch(decode_msgpack(item.payload, RoundPlan), now)


# --- up -------------------------------------------------------------------------------------------------------


def collect(task: Task) -> None:
    """Take one update from each agent, check it, store it, answer it."""
    folder = Path(task.folder)
    peer = Peer(task, "aggregator")
    keys = {agent: key_for(agent).public_key() for agent in task.agents}
    with Store(folder / "state", "bench", create=True) as store, ThreadPoolExecutor(WORKERS) as executor:
        reception = Reception(
            link=peer.link,
            topics=peer.topics,
            store=store,
            key=key_for("aggregator"),
            key_of=keys.get,
            limits=Limits(max_samples=1000),
            executor=executor,
            post=peer.inbox.post,
        )
        store.open_round(1, 1, task.agents, base=BASE, encoding="float32", deadline_s=3600)
        reception.open(
            OpenRound(
                run=RUN,
                round=1,
                open=True,
                base=BASE,
                cohort=frozenset(task.agents),
                encoding="float32",
                upload_chunk_bytes=task.chunk_bytes,
                schema=schema_for(task.object_bytes),
            )
        )
        stored: dict[str, float] = {}
        arrived: set[tuple[str, int]] = set()
        arrived_bytes, complete_at = 0, 0.0

        def take(item: object, now: float) -> None:
            nonlocal arrived_bytes, complete_at
            if isinstance(item, Checked):
                if item.error is not None:
                    raise item.error
                reception.checked(item, now)
                stored[item.agent] = time.monotonic()
            elif isinstance(item, Message):
                topic = peer.topics.parse_agent(item.topic)
                if topic is not None and topic.kind == "offer":
                    reception.message(topic.agent, item.payload, now)
                elif topic is not None and topic.kind == "chunk":
                    arrived_bytes += len(item.payload)
                    reception.chunk(topic.agent, topic.sha256, topic.index, item.payload, now)
                    if (topic.agent, topic.index) not in arrived:
                        arrived.add((topic.agent, topic.index))
                        complete_at = time.monotonic()

        peer.link.subscribe([(peer.topics.up("+"), 1)])
        wait_for_go(folder)
        while len(stored) < len(task.agents):
            peer.turn(reception.next_wakeup(), take, reception.tick)
        kept = sum(store.update_path(1, agent).stat().st_size for agent in task.agents)
        tell(
            "done",
            finished=complete_at,
            receipted=max(stored.values()),
            bytes=kept,
            arrived_bytes=arrived_bytes,
        )
        stay()


def offer(task: Task) -> None:
    """Deliver one update for each agent of this process; all are made before the clock starts."""
    folder = Path(task.folder)
    rng = np.random.default_rng(1)
    schema = schema_for(task.object_bytes)
    data = encode(
        {name: rng.standard_normal(shape, np.float32) for name, shape in schema.items()}, "float32", rng
    )
    offerers = [_Offerer(task, agent, data) for agent in task.agents]
    threads = [threading.Thread(target=offerer.run) for offerer in offerers]
    wait_for_go(folder)
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell("done", began=began)
    stay()


class _Offerer:
    def __init__(self, task: Task, agent: str, data: bytes) -> None:
        self._agent = agent
        folder = Path(task.folder) / agent
        self._outbox = Outbox(folder, federation="bench", agent=agent, key=key_for(agent))
        self._offer = UpdateOffer(
            run=RUN,
            round=1,
            base=BASE,
            object=make_ref(data, task.chunk_bytes),
            encoding="float32",
            samples=1,
            metrics=TrainMetrics(loss=0.0, accuracy=0.0, steps=1, train_s=0.0),
        )
        (folder / "update").write_bytes(data)
        (folder / "offer").write_bytes(
            seal(self._offer, purpose=Purpose.AGENT, federation="bench", sender=agent, key=key_for(agent))
        )
        self._upload = Upload(self._offer.object)
        self._receipted = False
        self._peer = Peer(task, agent)
        self._peer.link.subscribe([(self._peer.topics.down(agent), 1)])

    def run(self) -> None:
        self._tick(time.monotonic())
        while not self._receipted:
            self._peer.turn(self._upload.next_wakeup(), self._take, self._tick)

    def _tick(self, now: float) -> None:
        if self._upload.due(now):
            self._peer.link.publish(self._peer.topics.offer(self._agent), self._outbox.sealed_offer())

    def _take(self, item: object, _now: float) -> None:
        topic = self._peer.topics.parse_agent(item.topic) if isinstance(item, Message) else None
        if topic is None or not isinstance(item, Message):
            return
        if topic.kind == "receipt":
            self._receipted = True
        elif topic.kind == "credit":
            sha256 = self._offer.object.sha256
            for index in self._upload.credit(decode_msgpack(item.payload, Credit)):
                where = self._peer.topics.upload_chunk(self._agent, sha256, index)
                self._peer.link.publish(where, self._outbox.chunk(self._offer, index), qos=0)


ROLES = {"seed": seed, "pull": pull, "collect": collect, "offer": offer}


def main(arguments: list[str]) -> None:
    """Play a role until SIGTERM."""
    configure(level="warning", form="json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    task = msgspec.json.decode(arguments[0], type=Task)
    ROLES[task.role](task)


if __name__ == "__main__":
    main(sys.argv[1:])
