"""What the structs of the wire are made of: their base, and the bounds of their fields."""

from typing import Annotated

from msgspec import Meta, Struct

MAX_COHORT = 4096

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}\Z")]
"""A federation or an agent: it becomes an MQTT topic level, a broker user name and a file name."""

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Spec = Annotated[str, Meta(min_length=1, max_length=64)]
"""An encoding and its parameter, such as ``sq:16`` (``federation.wire.encodings``)."""

RunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
SessionId = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
RoundNumber = Annotated[int, Meta(ge=1, le=1_000_000)]
Attempt = Annotated[int, Meta(ge=1, le=1_000_000)]
Text = Annotated[str, Meta(max_length=1000)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
NonNegative = Annotated[float, Meta(ge=0, le=1e12)]
Share = Annotated[float, Meta(ge=0, le=1)]
Probability = Annotated[float, Meta(gt=0, lt=1)]
Count = Annotated[int, Meta(ge=0, le=2**40)]
Bytes = Annotated[int, Meta(ge=0, le=2**53)]
"""As many as JSON readers can count exactly."""


class Wire(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all wire structs."""
