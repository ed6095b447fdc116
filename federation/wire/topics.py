"""Build and parse every topic: the only place that knows the tree (``docs/protocol.md``, section Topics)."""

import re
from dataclasses import dataclass

PROTOCOL = "fedge/1"

DISCOVERY_PREFIX = "homeassistant"
"""Where Home Assistant looks for entities, unless it was told otherwise."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,4}")


def is_name(text: str) -> bool:
    """Whether ``text`` can name a federation or an agent: 1-63 of ``a-z 0-9 _ -``, starting with no sign."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class AgentTopic:
    """A parsed topic below ``agent/{id}``.

    Attributes:
        agent: The agent whose branch it is.
        kind: ``state``, ``telemetry``, ``model``, ``offer``, ``release``, ``masking up``, ``chunk``, ``credit``, ``receipt`` or ``masking down``.
        sha256: Of the object, for a chunk.
        index: Of the chunk.
    """

    agent: str
    kind: str
    sha256: str = ""
    index: int = -1


class Topics:
    """All topics of one federation.

    Args:
        federation: Its name; must satisfy :func:`is_name`.
    """

    def __init__(self, federation: str) -> None:
        if not is_name(federation):
            raise ValueError(
                f"federation name {federation!r}: use 1-63 of a-z, 0-9, _ and -, starting with a letter or digit"
            )
        self.federation = federation
        self.prefix = f"{PROTOCOL}/{federation}"
        self.aggregator = f"{self.prefix}/aggregator"
        self.plan = f"{self.prefix}/plan"
        self.releases = f"{self.prefix}/release/#"
        self.objects = f"{self.prefix}/object/#"
        self.everything = f"{self.prefix}/#"

    def object_chunk(self, sha256: str, index: int) -> str:
        """Chunk ``index`` of an object that the aggregator publishes, retained."""
        return f"{self.prefix}/object/{sha256}/{index}"

    def state(self, agent: str) -> str:
        """Birth and death of an agent; ``+`` for all."""
        return f"{self.prefix}/agent/{agent}/state"

    def telemetry(self, agent: str) -> str:
        """Health of an agent; ``+`` for all."""
        return f"{self.prefix}/agent/{agent}/telemetry"

    def predictions(self, agent: str) -> str:
        """Inference results of an agent; ``+`` for all."""
        return f"{self.prefix}/agent/{agent}/predictions"

    def model(self, agent: str) -> str:
        """Which model an agent runs; ``+`` for all."""
        return f"{self.prefix}/agent/{agent}/model"

    def discovery(self, agent: str) -> str:
        """Filter for what an agent may announce of itself to Home Assistant, outside the prefix."""
        return self.discovery_config("+", agent, "+")

    def discovery_config(self, component: str, agent: str, entity: str) -> str:
        """Where an agent announces an entity: ``{discovery prefix}/{component}/{node}/{entity}/config``."""
        return f"{DISCOVERY_PREFIX}/{component}/fedge-{self.federation}-{agent}/{entity}/config"

    def release(self, channel: str) -> str:
        """The signed manifest of a channel, retained."""
        return f"{self.prefix}/release/{channel}"

    def release_report(self, agent: str) -> str:
        """What an agent says about a release, retained; ``+`` for all."""
        return f"{self.prefix}/agent/{agent}/up/release"

    def offer(self, agent: str) -> str:
        """Signed messages of an agent: offers and declines."""
        return f"{self.prefix}/agent/{agent}/up/offer"

    def masking_up(self, agent: str) -> str:
        """Signed messages of an agent about masks."""
        return f"{self.prefix}/agent/{agent}/up/secagg"

    def masking_down(self, agent: str) -> str:
        """The aggregator's signed messages to an agent about masks."""
        return f"{self.prefix}/agent/{agent}/down/secagg"

    def upload_chunk(self, agent: str, sha256: str, index: int) -> str:
        """Chunk ``index`` of an object that an agent uploads."""
        return f"{self.prefix}/agent/{agent}/up/{sha256}/{index}"

    def up(self, agent: str) -> str:
        """Filter for all that an agent sends up; ``+`` for all agents."""
        return f"{self.prefix}/agent/{agent}/up/#"

    def credit(self, agent: str) -> str:
        """Where the aggregator asks an agent for chunks."""
        return f"{self.prefix}/agent/{agent}/down/credit"

    def receipt(self, agent: str) -> str:
        """Where the aggregator answers an agent's offers."""
        return f"{self.prefix}/agent/{agent}/down/receipt"

    def down(self, agent: str) -> str:
        """Filter for all that the aggregator sends to one agent."""
        return f"{self.prefix}/agent/{agent}/down/#"

    def parse_agent(self, topic: str) -> AgentTopic | None:
        """Parse a topic below ``agent/``; None for anything that is not exactly one of ours."""
        head = f"{self.prefix}/agent/"
        if not topic.startswith(head):
            return None
        match topic[len(head) :].split("/"):
            case [agent, ("state" | "telemetry" | "model") as kind] if is_name(agent):
                return AgentTopic(agent, kind)
            case [agent, "up", ("offer" | "release") as kind] if is_name(agent):
                return AgentTopic(agent, kind)
            case [agent, ("up" | "down") as way, "secagg"] if is_name(agent):
                return AgentTopic(agent, f"masking {way}")
            case [agent, "down", ("credit" | "receipt") as kind] if is_name(agent):
                return AgentTopic(agent, kind)
            case [agent, "up", sha256, index] if (
                is_name(agent) and _SHA256.fullmatch(sha256) and _INDEX.fullmatch(index)
            ):
                return AgentTopic(agent, "chunk", sha256, int(index))
        return None

    def parse_release(self, topic: str) -> str | None:
        """Parse ``release/{channel}`` into the channel's name; None for anything else."""
        head, _, channel = topic.rpartition("/")
        return channel if head == f"{self.prefix}/release" and is_name(channel) else None

    def parse_object_chunk(self, topic: str) -> tuple[str, int] | None:
        """Parse ``object/{sha256}/{i}`` into its hash and index; None for anything else."""
        head = f"{self.prefix}/object/"
        if not topic.startswith(head):
            return None
        match topic[len(head) :].split("/"):
            case [sha256, index] if _SHA256.fullmatch(sha256) and _INDEX.fullmatch(index):
                return sha256, int(index)
        return None
