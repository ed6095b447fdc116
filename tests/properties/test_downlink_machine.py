"""edge_agent.fetching and base_model under any order of plans, chunks, restarts and damage on the disk."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_link import ADDRESS, MemoryBroker
from version_chain import FEDERATION, SEED, TOPICS, Chain, Model, built

from edge_agent.base_model import make_base
from edge_agent.fetching import ModelCache
from federation.errors import VerificationError
from federation.wire.inbox import LinkEvent, Message
from federation.wire.messages import RoundPlan, TaskSpec
from federation.wire.versions import model_digest

VERSIONS = 4
CHAIN = Chain(VERSIONS)
CHUNKS = CHAIN.retained()
WAYS = 4
"""A held version, a built one, a full one; and one more after damage to what had come."""


@st.composite
def plans(draw: st.DrawFn) -> RoundPlan:
    base = draw(st.integers(0, VERSIONS))
    oldest = draw(st.integers(0, base))
    full = draw(st.integers(oldest, base))
    seed = SEED if full == 0 and draw(st.booleans()) else None
    return CHAIN.plan(base, oldest=oldest, full=CHAIN.full(full, seed=seed))


class Disk(RuleBasedStateMachine):
    """A device's folder of objects, and the process that works on it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.plan: RoundPlan | None = None
        self.same_build = True
        self.start()

    def teardown(self) -> None:
        self.cache.abandon()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        self.heard: list[Message] = []
        self.ready: list[str] = []
        link = MemoryBroker(retained=dict(CHUNKS)).make_link(ADDRESS, "device", on_event=self.hear)
        link.start()
        self.cache = ModelCache(self.folder, link, TOPICS, self.ready.append)

    def hear(self, event: LinkEvent) -> None:
        if isinstance(event, Message):
            self.heard.append(event)

    def listen(self, most: int) -> None:
        while self.heard and most:
            message = self.heard.pop(0)
            chunk = TOPICS.parse_object_chunk(message.topic)
            assert chunk is not None
            self.cache.chunk(*chunk, message.payload, 0.0)
            most -= 1

    def build(self, task: TaskSpec, seed: int) -> Model:
        assert task.labels
        return built(seed if self.same_build else seed + 1)

    @rule(plan=plans(), chunks=st.integers(0, 12))
    def a_plan_comes_and_some_of_its_chunks(self, plan: RoundPlan, chunks: int) -> None:
        self.plan = plan
        self.ready.clear()
        self.cache.fetch(plan, 0.0)
        self.listen(chunks)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def the_rest_comes_and_the_model_is_made(self) -> None:
        assert self.plan is not None
        for _ in range(WAYS):
            self.ready.clear()
            self.cache.fetch(self.plan, 0.0)
            self.listen(len(CHUNKS))
            assert self.ready == [self.plan.base]
            try:
                model = make_base(self.cache.recipe(), self.plan, FEDERATION, self.build)
            except VerificationError:
                self.cache.reject()
                continue
            assert model_digest(model) == self.plan.base
            return
        raise AssertionError("it never comes to the base model")

    @rule(same_build=st.booleans())
    def the_process_is_killed(self, same_build: bool) -> None:
        self.same_build = same_build
        self.plan = None
        self.start()

    @precondition(lambda self: any(self.folder.iterdir()))
    @rule(which=st.integers(0, 9), position=st.integers(0, 10**6), cut=st.booleans())
    def the_disk_damages_a_file(self, which: int, position: int, cut: bool) -> None:
        files = sorted(self.folder.iterdir())
        file = files[which % len(files)]
        data = bytearray(file.read_bytes())
        if data:
            position %= len(data)
            data[position] ^= 1
            file.write_bytes(data[:position] if cut else data)

    @invariant()
    def the_disk_does_not_fill_up(self) -> None:
        kinds = [file.suffix for file in self.folder.iterdir()]
        assert kinds.count(".safetensors") <= 2, "where a route starts, and where it ends"
        steps = 0 if self.plan is None else len(self.plan.deltas)
        if self.plan is not None:
            assert kinds.count(".object") <= steps
            assert kinds.count(".part") <= 1 + steps


TestDisk = Disk.TestCase
TestDisk.settings = settings(deadline=None, max_examples=150, stateful_step_count=25)
