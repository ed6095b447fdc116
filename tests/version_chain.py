"""Versions of a model that follow on one another, as an aggregator would publish them: full files, deltas and plans."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.wire.codec import encode
from federation.wire.messages import FullModel, ModelDelta, ObjectRef, RoundPlan, TaskSpec, TrainSpec
from federation.wire.topics import Topics
from federation.wire.transfer import chunk_span, make_ref
from federation.wire.versions import apply_delta, model_digest

FEDERATION = "home"
TOPICS = Topics(FEDERATION)
RUN = "0123456789abcdef"
TASK = TaskSpec(model="cnn", labels=("0", "1"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
SEED = 7
CHUNK_BYTES = 512

Model = dict[str, NDArray[np.float32]]


def built(seed: int) -> Model:
    """What the task builds under a seed: not torch's, but as deterministic."""
    random = np.random.default_rng(seed)
    return {
        "bias": random.standard_normal(20, dtype=np.float32),
        "weight": random.standard_normal((20, 50), dtype=np.float32),
    }


def full_file(model: Model) -> bytes:
    return checkpoint_bytes(CheckpointInfo(federation=FEDERATION, round=0, task=TASK), model)


@dataclass(frozen=True)
class Step:
    """From one version to the next."""

    frame: bytes
    delta: ModelDelta


class Chain:
    """Versions 0 to ``count``, the first of them built from ``SEED``; each step as small as its encoding makes it."""

    def __init__(self, count: int, encodings: Sequence[str] = ("int8", "sq:4", "float16")) -> None:
        random = np.random.default_rng(1)
        self.models = [built(SEED)]
        self.steps: list[Step] = []
        for number in range(count):
            model, encoding = self.models[-1], encodings[number % len(encodings)]
            change = {
                name: random.standard_normal(array.shape, dtype=np.float32) / np.float32(10)
                for name, array in model.items()
            }
            frame = encode(change, encoding, random)
            ref = make_ref(frame, CHUNK_BYTES)
            self.steps.append(
                Step(frame, ModelDelta(base=model_digest(model), object=ref, encoding=encoding))
            )
            self.models.append(apply_delta(model, frame, encoding))
        self.digests = [model_digest(model) for model in self.models]
        self.files = [full_file(model) for model in self.models]
        self.refs = [make_ref(file, CHUNK_BYTES) for file in self.files]

    def full(self, number: int, *, seed: int | None = None) -> FullModel:
        """A version for newcomers."""
        return FullModel(version=self.digests[number], object=self.refs[number], seed=seed)

    def plan(
        self,
        base: int,
        *,
        oldest: int | None = None,
        full: FullModel | None = None,
        round_number: int | None = None,
    ) -> RoundPlan:
        """A round that starts from version ``base``; deltas lead there from version ``oldest``."""
        steps = self.steps[base if oldest is None else oldest : base]
        return RoundPlan(
            run=RUN,
            round=round_number or base + 1,
            attempt=1,
            task=TASK,
            train=TrainSpec(),
            base=self.digests[base],
            full=full or self.full(base),
            deltas=tuple(step.delta for step in steps),
            up_encoding="float32",
            max_noise=0.0,
            cohort=("pi1",),
            deadline_s=60.0,
            issued_at=0.0,
            upload_chunk_bytes=1024,
        )

    def retained(self) -> dict[str, bytes]:
        """What is on the broker: every chunk of every full model and delta."""
        chunks: dict[str, bytes] = {}
        for ref, data in zip(self.refs, self.files, strict=True):
            chunks |= chunks_of(ref, data)
        for step in self.steps:
            chunks |= chunks_of(step.delta.object, step.frame)
        return chunks


def chunks_of(ref: ObjectRef, data: bytes) -> dict[str, bytes]:
    """The retained messages of one object, by topic."""
    spans = [chunk_span(ref, index) for index in range(ref.chunks)]
    return {
        TOPICS.object_chunk(ref.sha256, index): data[offset : offset + length]
        for index, (offset, length) in enumerate(spans)
    }
