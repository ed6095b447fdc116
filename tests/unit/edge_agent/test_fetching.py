"""edge_agent.fetching: an object comes whole from the broker, from the disk, or from both.

What is made of it is in ``test_base_model``.
"""

from pathlib import Path

from memory_link import ADDRESS, MemoryBroker, MemoryLink

from edge_agent.fetching import ModelCache
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import FullModel, ModelDelta, ObjectRef, RoundPlan, TaskSpec, TrainSpec
from federation.wire.topics import Topics
from federation.wire.transfer import make_ref

TOPICS = Topics("home")
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
DATA = bytes(range(256)) * 20
REF = make_ref(DATA, 128)
CHUNKS = [DATA[start : start + 128] for start in range(0, len(DATA), 128)]
VERSION, OTHER_VERSION = "1" * 64, "2" * 64
FILE = f"{VERSION}.safetensors"


def plan_of(ref: ObjectRef, version: str = VERSION, deltas: tuple[ModelDelta, ...] = ()) -> RoundPlan:
    return RoundPlan(
        run="0" * 16,
        round=1,
        attempt=1,
        task=TASK,
        train=TrainSpec(),
        base=version,
        full=FullModel(version=deltas[0].base if deltas else version, object=ref),
        deltas=deltas,
        up_encoding="float32",
        max_noise=0.0,
        cohort=("pi1",),
        deadline_s=60.0,
        issued_at=0.0,
        upload_chunk_bytes=1024,
    )


PLAN = plan_of(REF)


class Device:
    """A model cache whose link is served by hand: messages wait until :meth:`listen`."""

    def __init__(self, folder: Path, broker: MemoryBroker) -> None:
        self.broker = broker
        self.heard: list[Message] = []
        self.ready: list[str] = []
        self.link: MemoryLink = broker.make_link(ADDRESS, "device", on_event=self.hear)
        self.link.start()
        self.cache = ModelCache(folder, self.link, TOPICS, self.ready.append)

    def hear(self, event: LinkEvent) -> None:
        if isinstance(event, Message):
            self.heard.append(event)

    def listen(self, now: float = 0.0) -> None:
        while self.heard:
            message = self.heard.pop(0)
            chunk = TOPICS.parse_object_chunk(message.topic)
            assert chunk is not None
            self.cache.chunk(*chunk, message.payload, now)


def topic(index: int, ref: ObjectRef = REF) -> str:
    return TOPICS.object_chunk(ref.sha256, index)


def seeded(*, without: tuple[int, ...] = ()) -> MemoryBroker:
    chunks = {topic(index): chunk for index, chunk in enumerate(CHUNKS) if index not in without}
    return MemoryBroker(retained=chunks)


def test_a_model_is_fetched_and_nothing_stays_subscribed(tmp_path: Path) -> None:
    device = Device(tmp_path, seeded())
    device.cache.fetch(PLAN, 0.0)
    device.listen()
    assert device.ready == [VERSION]
    assert (tmp_path / FILE).read_bytes() == DATA
    assert device.link.filters == {}
    assert device.cache.next_wakeup() is None
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_version_on_disk_is_not_fetched_again(tmp_path: Path) -> None:
    device = Device(tmp_path, MemoryBroker())
    (tmp_path / FILE).write_bytes(DATA)
    device.cache.fetch(PLAN, 0.0)
    assert device.ready == [VERSION]
    assert device.link.filters == {}


def test_several_objects_come_one_after_the_other_and_the_loss_of_the_link_spares_what_is_there(
    tmp_path: Path,
) -> None:
    frame = bytes(range(255)) * 3
    ref = make_ref(frame, 128)
    broker = seeded()
    device = Device(tmp_path, broker)
    plan = plan_of(REF, OTHER_VERSION, (ModelDelta(base=VERSION, object=ref, encoding="int8"),))
    device.cache.fetch(plan, 0.0)
    assert set(device.link.filters) <= {topic(index) for index in range(len(CHUNKS))}
    device.listen()
    assert sorted(device.link.filters) == sorted(topic(index, ref) for index in range(ref.chunks))
    assert device.cache.share == 0.0
    broker.cut(device.link)
    broker.restore(device.link)
    broker.retained |= {topic(index, ref): frame[128 * index :][:128] for index in range(ref.chunks)}
    device.cache.reconnected(1.0)
    device.listen(1.0)
    assert device.ready == [OTHER_VERSION]
    assert (tmp_path / FILE).read_bytes() == DATA
    assert (tmp_path / f"{ref.sha256}.object").read_bytes() == frame
    assert device.link.filters == {}
    assert device.cache.share is None


def test_after_power_loss_only_the_rest_is_asked_for(tmp_path: Path) -> None:
    first = Device(tmp_path, seeded(without=(3, 7)))
    first.cache.fetch(PLAN, 0.0)
    first.listen()
    assert first.ready == []
    broker = seeded()
    second = Device(tmp_path, broker)
    second.cache.fetch(PLAN, 0.0)
    assert sorted(second.link.filters) == sorted([topic(3), topic(7)])
    second.listen()
    assert second.ready == [VERSION]


def test_a_damaged_or_cleared_chunk_is_waited_for(tmp_path: Path) -> None:
    broker = seeded()
    broker.retained[topic(2)] = bytes(128)
    device = Device(tmp_path, broker)
    device.cache.fetch(PLAN, 0.0)
    device.cache.chunk(REF.sha256, 5, b"", 0.0)
    device.listen()
    assert device.ready == []
    wakeup = device.cache.next_wakeup()
    assert wakeup is not None
    broker.retained[topic(2)] = CHUNKS[2]
    device.cache.tick(wakeup)
    device.listen(wakeup)
    assert device.ready == [VERSION]


def test_a_chunk_that_is_published_later_arrives_by_itself(tmp_path: Path) -> None:
    broker = seeded(without=(0,))
    device = Device(tmp_path, broker)
    device.cache.fetch(PLAN, 0.0)
    device.listen()
    assert device.ready == []
    broker.route("server", topic(0), CHUNKS[0], qos=1, retain=True)
    device.listen()
    assert device.ready == [VERSION]


def test_a_lost_link_is_subscribed_anew(tmp_path: Path) -> None:
    broker = seeded(without=(1,))
    device = Device(tmp_path, broker)
    device.cache.fetch(PLAN, 0.0)
    device.listen()
    broker.cut(device.link)
    broker.restore(device.link)
    broker.retained[topic(1)] = CHUNKS[1]
    device.cache.reconnected(1.0)
    device.listen(1.0)
    assert device.ready == [VERSION]


def test_another_model_takes_the_place_of_the_former(tmp_path: Path) -> None:
    broker = seeded()
    device = Device(tmp_path, broker)
    device.cache.fetch(PLAN, 0.0)
    device.listen()
    other = make_ref(b"another model" * 10, 128)
    device.cache.fetch(plan_of(other, OTHER_VERSION), 0.0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{other.sha256}.part"]
    device.cache.chunk(REF.sha256, 0, CHUNKS[0], 0.0)
    assert sorted(device.link.filters) == sorted([topic(0, other), topic(1, other)])
    device.cache.abandon()
    device.cache.abandon()
    assert device.link.filters == {}


def test_a_delta_that_the_power_cut_has_torn_is_mended_chunk_by_chunk(tmp_path: Path) -> None:
    plan = plan_of(REF, OTHER_VERSION, (ModelDelta(base=VERSION, object=REF, encoding="int8"),))
    (tmp_path / FILE).write_bytes(b"the model that the delta is against")
    first = Device(tmp_path, seeded())
    first.cache.fetch(plan, 0.0)
    first.listen()
    assert first.ready == [OTHER_VERSION]
    fetched = tmp_path / f"{REF.sha256}.object"
    fetched.write_bytes(DATA[:256] + bytes(256) + DATA[512:])  # written without a sync
    second = Device(tmp_path, seeded())
    second.cache.fetch(plan, 0.0)
    assert sorted(second.link.filters) == sorted([topic(2), topic(3)])
    second.listen()
    assert second.ready == [OTHER_VERSION]
    assert fetched.read_bytes() == DATA
