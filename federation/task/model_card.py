"""What an exported model says about itself in its ONNX metadata: labels, preprocessing, where it comes from. No torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from federation.errors import ConfigError
from federation.task.preprocessing import Preprocessing
from federation.wire.fields import Finite
from federation.wire.release import ModelFormat, Requirements

PLAIN_FORMAT = "1"
FUSED_FORMAT = "2"
"""A reader of format 1 would feed a fused graph with floats; so it is told that it cannot read it."""

Labels = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(min_length=2, max_length=4096)
]
TopK = Annotated[int, Meta(ge=1, le=4096)]
Preprocess = Literal["fused", "none"]


class HoldOutMetrics(Struct, frozen=True, kw_only=True):
    """What the aggregator measured on its hold-out set. Fields of later versions are ignored.

    Attributes:
        loss: Mean cross-entropy, nats.
        accuracy: Top-1, in [0, 1].
        samples: Images evaluated.
    """

    loss: Finite
    accuracy: Annotated[float, Meta(ge=0, le=1)]
    samples: Annotated[int, Meta(ge=1)]


class Provenance(Struct, frozen=True, kw_only=True):
    """Where a model comes from. Informative: fields of later versions are ignored.

    Attributes:
        federation: Whose model.
        round: After which round.
        checkpoint_sha256: Hex SHA-256 of the checkpoint file.
        model: Name of the architecture.
        fedge_version: Of the exporter.
        git_sha: Commit of the exporter's source, with ``-dirty`` after it when that was changed; None when it did not
            run from a checkout.
        metrics: From the aggregator's hold-out evaluation, where there was one.
        exported_at: UTC, ISO 8601.
        weights: Their number format.
    """

    federation: str
    round: int
    checkpoint_sha256: str
    model: str
    fedge_version: str
    git_sha: str | None
    metrics: HoldOutMetrics | None
    exported_at: str
    weights: ModelFormat = ModelFormat.FP32


class ModelCard(Struct, frozen=True, kw_only=True):
    """The metadata of an exported model.

    Attributes:
        labels: Class names in the order of the logits.
        preprocessing: From a picture to the model's input.
        provenance: Where it comes from.
        preprocess: ``fused``: the graph takes uint8 frames ``[N, H, W, channels]`` of any size, and gives the ``topk`` largest
            probabilities ``[N, topk]``, falling, and the indices of their classes. ``none``: it takes what ``preprocessing``
            makes of a picture, float32 ``[N, channels, height, width]``, and gives logits ``[N, labels]``.
        topk: Classes that a fused graph answers with; all of them for a plain one.
        requirements: What it needs to run; None where the exporter did not say.

    Raises:
        ValueError: If two labels are the same, ``topk`` is larger than their number, or is not there for a fused graph.
    """

    labels: Labels
    preprocessing: Preprocessing
    provenance: Provenance
    preprocess: Preprocess = "none"
    topk: TopK | None = None
    requirements: Requirements | None = None

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("two labels have the same name")
        if (self.preprocess == "fused") != (self.topk is not None):
            raise ValueError("a fused graph says how many classes it answers with, a plain one does not")
        if self.topk is not None and self.topk > len(self.labels):
            raise ValueError(f"the {self.topk} most likely of {len(self.labels)} classes")

    @property
    def format(self) -> str:
        """Of the metadata: the oldest that does not mislead its readers."""
        return PLAIN_FORMAT if self.preprocess == "none" else FUSED_FORMAT

    def properties(self) -> dict[str, str]:
        """As ONNX ``metadata_props``: the format's number, and JSON for the rest."""
        entries = {
            "fedge.format": self.format,
            "labels": _to_json(self.labels),
            "preprocessing": _to_json(self.preprocessing),
            "provenance": _to_json(self.provenance),
        }
        if self.topk is not None:
            entries |= {"preprocess": _to_json(self.preprocess), "topk": _to_json(self.topk)}
        if self.requirements is not None:
            entries["requirements"] = _to_json(self.requirements)
        return entries

    @classmethod
    def parse(cls, properties: Mapping[str, str]) -> "ModelCard":
        """Read a card back from ONNX metadata.

        Raises:
            ConfigError: If the model was not exported by fedge, or by one that this version does not understand.
        """
        version = properties.get("fedge.format")
        if version is None:
            raise ConfigError(
                "the model has no fedge metadata (labels, preprocessing): export it with `model-export onnx`"
            )
        if version not in (PLAIN_FORMAT, FUSED_FORMAT):
            raise ConfigError(
                f"the model has metadata of format {version!r}, this fedge reads {PLAIN_FORMAT!r} and {FUSED_FORMAT!r}: "
                "update fedge here"
            )
        fused = version == FUSED_FORMAT
        stated = "requirements" in properties
        try:
            return cls(
                labels=_from_json(properties, "labels", Labels),
                preprocessing=_from_json(properties, "preprocessing", Preprocessing),
                provenance=_from_json(properties, "provenance", Provenance),
                preprocess=_from_json(properties, "preprocess", Preprocess) if fused else "none",
                topk=_from_json(properties, "topk", TopK) if fused else None,
                requirements=_from_json(properties, "requirements", Requirements) if stated else None,
            )
        except ValueError as error:
            raise ConfigError(
                f"the model's metadata contradicts itself ({error}): export it again"
            ) from error


def _to_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _from_json(properties: Mapping[str, str], key: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(properties.get(key, ""), type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the model's metadata {key!r} is damaged ({error}): export it again") from error
