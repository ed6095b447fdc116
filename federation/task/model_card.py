"""What an exported model says about itself in its ONNX metadata: labels, preprocessing, where it comes from. No torch."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from federation.errors import ConfigError
from federation.task.preprocessing import Preprocessing
from federation.wire.fields import Finite

FORMAT = "1"
"""Raised when a reader of the old format would misunderstand the new one."""

T = TypeVar("T")


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
    """

    federation: str
    round: int
    checkpoint_sha256: str
    model: str
    fedge_version: str
    git_sha: str | None
    metrics: HoldOutMetrics | None
    exported_at: str


class ModelCard(Struct, frozen=True, kw_only=True):
    """The metadata of an exported model.

    Attributes:
        labels: Class names in the order of the logits.
        preprocessing: From a picture to the model's input.
        provenance: Where it comes from.
    """

    labels: Annotated[tuple[str, ...], Meta(min_length=2, max_length=4096)]
    preprocessing: Preprocessing
    provenance: Provenance

    def properties(self) -> dict[str, str]:
        """As ONNX ``metadata_props``: the format's number, and JSON for the rest."""
        return {
            "fedge.format": FORMAT,
            "labels": _to_json(self.labels),
            "preprocessing": _to_json(self.preprocessing),
            "provenance": _to_json(self.provenance),
        }

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
        if version != FORMAT:
            raise ConfigError(
                f"the model has metadata of format {version!r}, this fedge reads {FORMAT!r}: update fedge here"
            )
        return cls(
            labels=_from_json(properties, "labels", tuple[str, ...]),
            preprocessing=_from_json(properties, "preprocessing", Preprocessing),
            provenance=_from_json(properties, "provenance", Provenance),
        )


def _to_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _from_json(properties: Mapping[str, str], key: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(properties.get(key, ""), type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the model's metadata {key!r} is damaged ({error}): export it again") from error
