"""edge_agent.base_model and what leads there: exactly the version that the plan names, or a reason why not."""

from pathlib import Path

import numpy as np
import pytest
from memory_link import ADDRESS, MemoryBroker, MemoryLink
from msgspec import structs
from safetensors.numpy import load_file, save_file
from version_chain import FEDERATION, SEED, TASK, TOPICS, Chain, Model, built, chunks_of, full_file

from edge_agent.base_model import Arrays, make_base
from edge_agent.fetching import ModelCache
from federation.errors import VerificationError
from federation.task.checkpoint import read_checkpoint
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import FullModel, RoundPlan, TaskSpec
from federation.wire.transfer import make_ref
from federation.wire.versions import model_digest

CHAIN = Chain(4)
HEADER = b'{"weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
BFLOAT16_FILE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)


class Device:
    """A device's disk and link. Messages are read as they come; ``seed`` is what its task builds a model from."""

    def __init__(self, folder: Path, broker: MemoryBroker | None = None) -> None:
        self.folder = folder
        self.broker = broker or MemoryBroker(retained=CHAIN.retained())
        self.heard: list[Message] = []
        self.ready: list[str] = []
        self.fetched_bytes = 0
        self.built_seeds: list[int] = []
        self.seed_shift = 0
        link: MemoryLink = self.broker.make_link(ADDRESS, "device", on_event=self.hear)
        link.start()
        self.cache = ModelCache(folder, link, TOPICS, self.ready.append)

    def hear(self, event: LinkEvent) -> None:
        if isinstance(event, Message):
            self.heard.append(event)

    def fetch(self, plan: RoundPlan) -> None:
        self.cache.fetch(plan, 0.0)
        while self.heard:
            message = self.heard.pop(0)
            chunk = TOPICS.parse_object_chunk(message.topic)
            assert chunk is not None
            self.fetched_bytes += len(message.payload)
            self.cache.chunk(*chunk, message.payload, 0.0)

    def build(self, task: TaskSpec, seed: int) -> Model:
        assert task == TASK
        self.built_seeds.append(seed)
        return built(seed + self.seed_shift)

    def make(self, plan: RoundPlan) -> Arrays:
        return make_base(self.cache.recipe(), plan, FEDERATION, self.build)

    def base_of(self, plan: RoundPlan) -> Arrays:
        self.fetch(plan)
        assert self.ready[-1] == plan.base
        return self.make(plan)

    def rejects(self, plan: RoundPlan, match: str) -> bool:
        """What it has cannot be used; returns whether there is another way."""
        with pytest.raises(VerificationError, match=match):
            self.make(plan)
        return self.cache.reject()

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def holds(self, *numbers: int) -> bool:
        return self.files() == {f"{CHAIN.digests[number]}.safetensors" for number in numbers}

    def file_of(self, number: int) -> Path:
        return self.folder / f"{CHAIN.digests[number]}.safetensors"

    def put(self, number: int) -> None:
        self.file_of(number).write_bytes(CHAIN.files[number])


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def is_version(model: Arrays, number: int) -> bool:
    expected = CHAIN.models[number]
    return set(model) == set(expected) and all(
        model[name].dtype == np.float32 and model[name].tobytes() == expected[name].tobytes()
        for name in expected
    )


def test_a_device_that_took_part_in_the_last_round_fetches_one_delta(device: Device) -> None:
    device.put(1)
    assert is_version(device.base_of(CHAIN.plan(2, oldest=0)), 2)
    assert device.fetched_bytes == len(CHAIN.steps[1].frame)
    info, kept = read_checkpoint(device.file_of(2))
    assert (info.federation, info.round, info.task) == (FEDERATION, 2, TASK)
    assert is_version(kept, 2)


def test_a_device_that_missed_rounds_applies_their_deltas_in_order(device: Device) -> None:
    device.put(0)
    assert is_version(device.base_of(CHAIN.plan(3, oldest=0)), 3)
    assert device.fetched_bytes == sum(len(step.frame) for step in CHAIN.steps[:3])


def test_deltas_that_are_longer_than_the_full_model_are_left_aside(device: Device) -> None:
    device.put(0)
    assert sum(len(step.frame) for step in CHAIN.steps) > CHAIN.refs[4].length
    assert is_version(device.base_of(CHAIN.plan(4, oldest=0)), 4)
    assert device.fetched_bytes == CHAIN.refs[4].length


def test_round_after_round_the_disk_holds_two_versions_at_most(device: Device) -> None:
    for number in range(1, 5):
        assert is_version(device.base_of(CHAIN.plan(number, oldest=number - 1)), number)
        device.fetch(CHAIN.plan(number, oldest=number - 1))
        assert device.holds(number), "what led to it is not needed any more"


def test_a_round_from_the_same_version_fetches_nothing_and_writes_nothing(device: Device) -> None:
    device.put(3)
    before = device.file_of(3).stat()
    assert is_version(device.base_of(CHAIN.plan(3, oldest=0, round_number=9)), 3)
    after = device.file_of(3).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert device.fetched_bytes == 0


def test_a_newcomer_keeps_the_full_model_as_it_came(device: Device) -> None:
    plan = CHAIN.plan(2)
    device.fetch(plan)
    written = device.file_of(2).stat()
    assert is_version(device.make(plan), 2)
    assert device.holds(2)
    assert device.file_of(2).stat().st_ino == written.st_ino, "a second write would wear the card"
    assert device.file_of(2).read_bytes() == CHAIN.files[2]


def test_a_newcomer_goes_on_from_an_older_full_model(device: Device) -> None:
    plan = CHAIN.plan(3, oldest=0, full=CHAIN.full(1))
    assert is_version(device.base_of(plan), 3)
    assert device.fetched_bytes == CHAIN.refs[1].length + sum(len(step.frame) for step in CHAIN.steps[1:3])
    device.fetch(plan)
    assert device.holds(3)


def test_what_leads_nowhere_is_deleted(device: Device) -> None:
    device.put(0)
    device.put(1)
    for leftover in ("f" * 64 + ".object", "f" * 64 + ".part", f".{'f' * 64}.safetensors.x1"):
        (device.folder / leftover).write_bytes(b"old")
    device.fetch(CHAIN.plan(3, oldest=1))
    steps = {f"{CHAIN.steps[number].delta.object.sha256}.object" for number in (1, 2)}
    assert device.files() == {device.file_of(1).name} | steps


def test_the_first_model_is_built_and_nothing_is_fetched(device: Device) -> None:
    assert is_version(device.base_of(CHAIN.plan(0, full=CHAIN.full(0, seed=SEED))), 0)
    assert (device.fetched_bytes, device.built_seeds) == (0, [SEED])
    assert is_version(load_file(device.file_of(0)), 0), "kept: the next delta starts from it"


def test_a_later_newcomer_builds_the_first_model_and_fetches_the_deltas(device: Device) -> None:
    plan = CHAIN.plan(2, oldest=0, full=CHAIN.full(0, seed=SEED))
    assert is_version(device.base_of(plan), 2)
    assert device.fetched_bytes == len(CHAIN.steps[0].frame) + len(CHAIN.steps[1].frame)


def test_a_seed_that_gives_another_model_here_is_not_tried_again(device: Device) -> None:
    device.seed_shift = 1
    plan = CHAIN.plan(1, oldest=0, full=CHAIN.full(0, seed=SEED))
    device.fetch(plan)
    assert device.rejects(plan, match="version")
    assert device.files() == set(), "neither what was built nor what was applied to it is kept"
    assert is_version(device.base_of(plan), 1)
    assert device.built_seeds == [SEED]
    device.file_of(1).unlink()
    device.file_of(0).unlink()
    assert is_version(device.base_of(plan), 1)
    assert device.built_seeds == [SEED], "once is enough for a process"


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "deleted", "bfloat16", "float64"])
def test_a_version_that_the_disk_has_damaged_is_replaced_by_the_full_model(
    device: Device, damage: str
) -> None:
    plan = CHAIN.plan(2, oldest=1)
    device.put(1)
    device.fetch(plan)
    file = device.file_of(1)
    data = bytearray(file.read_bytes())
    match damage:
        case "truncated":
            file.write_bytes(data[:-1])
        case "emptied":
            file.write_bytes(b"")
        case "flipped":
            data[-5] ^= 1
            file.write_bytes(data)
        case "deleted":
            file.unlink()
        case "bfloat16":
            file.write_bytes(BFLOAT16_FILE)
        case "float64":  # the same values, and so the same digest
            save_file({name: array.astype(np.float64) for name, array in CHAIN.models[1].items()}, file)
    assert device.rejects(plan, match="version|cannot be read|float32")
    assert is_version(device.base_of(plan), 2)
    device.fetch(plan)
    assert device.holds(2)


@pytest.mark.parametrize("position", [0, -100, -2])
def test_a_delta_that_the_disk_has_damaged_is_fetched_again(device: Device, position: int) -> None:
    plan = CHAIN.plan(2, oldest=1)
    device.put(1)
    device.fetch(plan)
    frame = device.folder / f"{CHAIN.steps[1].delta.object.sha256}.object"
    data = bytearray(frame.read_bytes())
    data[position] ^= 1
    frame.write_bytes(data)
    assert device.rejects(plan, match="version|delta")
    assert is_version(device.base_of(plan), 2)


def test_a_delta_after_a_full_model_that_the_disk_has_damaged_is_right_in_the_next_attempt(
    device: Device,
) -> None:
    plan = CHAIN.plan(2, oldest=1, full=CHAIN.full(1))
    device.fetch(plan)
    (device.folder / f"{CHAIN.steps[1].delta.object.sha256}.object").write_bytes(b"torn")
    assert not device.rejects(plan, match="delta")
    assert is_version(device.base_of(plan), 2)


def test_a_full_model_that_is_another_version_leaves_no_other_way(tmp_path: Path) -> None:
    data = full_file(built(SEED + 1))
    ref = make_ref(data, 512)
    device = Device(tmp_path, MemoryBroker(retained=chunks_of(ref, data)))
    plan = CHAIN.plan(2, full=FullModel(version=CHAIN.digests[2], object=ref))
    device.fetch(plan)
    assert not device.rejects(plan, match=f"{model_digest(built(SEED + 1))[:12]}, not {plan.base[:12]}")
    assert device.files() == set(), "a later attempt fetches it again"


@pytest.mark.parametrize("data", [b"no safetensors", BFLOAT16_FILE], ids=["text", "bfloat16"])
def test_a_full_model_in_a_form_that_nobody_reads_leaves_no_other_way(tmp_path: Path, data: bytes) -> None:
    ref = make_ref(data, 512)
    device = Device(tmp_path, MemoryBroker(retained=chunks_of(ref, data)))
    plan = CHAIN.plan(2, full=FullModel(version=CHAIN.digests[2], object=ref))
    device.fetch(plan)
    assert not device.rejects(plan, match="cannot be read|bfloat16")


def test_chunks_that_are_promised_but_make_another_whole_leave_no_other_way(device: Device) -> None:
    lying = structs.replace(CHAIN.refs[1], sha256="f" * 64)
    plan = CHAIN.plan(2, full=FullModel(version=CHAIN.digests[2], object=lying))
    device.broker.retained |= chunks_of(lying, CHAIN.files[1])
    device.fetch(plan)
    assert not device.rejects(plan, match=f"{CHAIN.digests[1][:12]}, not {plan.base[:12]}")


def test_after_power_loss_between_fetching_and_applying_nothing_is_fetched_again(tmp_path: Path) -> None:
    plan = CHAIN.plan(3, oldest=1, full=CHAIN.full(1))
    Device(tmp_path).fetch(plan)
    again = Device(tmp_path, MemoryBroker())
    assert is_version(again.base_of(plan), 3)
    assert again.fetched_bytes == 0


def test_after_power_loss_between_two_deltas_only_the_second_is_fetched(tmp_path: Path) -> None:
    plan = CHAIN.plan(3, oldest=1)
    first = Device(
        tmp_path, MemoryBroker(retained=chunks_of(CHAIN.steps[1].delta.object, CHAIN.steps[1].frame))
    )
    first.put(1)
    first.fetch(plan)
    assert first.ready == []
    again = Device(tmp_path)
    assert is_version(again.base_of(plan), 3)
    assert again.fetched_bytes == len(CHAIN.steps[2].frame)


def test_an_older_round_still_at_work_does_not_spoil_the_next_ones_fetch(device: Device) -> None:
    older, newer = CHAIN.plan(1), CHAIN.plan(2, oldest=1, full=CHAIN.full(1))
    device.fetch(older)
    recipe = device.cache.recipe()
    device.fetch(newer)
    make_base(recipe, older, FEDERATION, device.build)  # the worker's thread comes to it only now
    assert is_version(device.make(newer), 2)
    assert device.fetched_bytes == CHAIN.refs[1].length + len(CHAIN.steps[1].frame)
