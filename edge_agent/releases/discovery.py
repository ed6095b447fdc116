"""How a device introduces itself to Home Assistant: MQTT discovery, one retained message for each entity.

Home Assistant's documentation: "MQTT Discovery" for the topics and the device, "MQTT Sensor" and "MQTT Update" for the
entities. A user need do nothing but connect it to the same broker.
"""

from typing import Any

import msgspec

from federation import __version__
from federation.wire.topics import Topics

_LABEL_STATE_CHARS = 250
"""Home Assistant refuses states longer than 255 characters."""

STALE_S = 300
"""Seconds without a prediction after which the label is unknown: a sensor that shows yesterday's label misleads."""


def announcements(topics: Topics, agent: str, *, publish_interval_s: float) -> list[tuple[str, bytes]]:
    """What makes Home Assistant show this device: a sensor for the label, and an ``update`` for the model's version.

    Args:
        topics: Of the federation.
        agent: This device.
        publish_interval_s: Longest time between two predictions while frames come, seconds.

    Returns:
        Topics and JSON, to be retained.
    """
    node = f"fedge-{topics.federation}-{agent}"
    model_state = topics.model(agent)
    shared: dict[str, Any] = {
        # The last will of the inference process says "online": false.
        "availability_topic": model_state,
        "availability_template": "{{ 'online' if value_json.online else 'offline' }}",
        "device": {
            "identifiers": [node],
            "name": agent,
            "manufacturer": "fedge",
            "model": f"device of federation {topics.federation}",
            "sw_version": __version__,
        },
        "origin": {"name": "fedge", "sw_version": __version__},
    }
    label = {
        **shared,
        "unique_id": f"{node}-label",
        "name": "Label",
        "icon": "mdi:eye-outline",
        "state_topic": topics.predictions(agent),
        "value_template": f"{{{{ value_json.label[:{_LABEL_STATE_CHARS}] }}}}",
        "json_attributes_topic": topics.predictions(agent),
        "json_attributes_template": (
            "{{ {'confidence': value_json.confidence, 'top': value_json.top, 'source': value_json.source, "
            "'latency_ms': value_json.latency_ms, 'release': value_json.release} | to_json }}"
        ),
        "expire_after": int(max(STALE_S, 3 * publish_interval_s)),
    }
    update = {
        **shared,
        "unique_id": f"{node}-model",
        "name": "Model",
        "title": "fedge model",
        "entity_category": "diagnostic",
        "state_topic": model_state,
        # Home Assistant drops a message whole for one key that it does not know.
        "value_template": (
            "{{ {'installed_version': value_json.installed_version, 'latest_version': value_json.latest_version, "
            "'in_progress': value_json.in_progress, 'title': value_json.title, "
            "'release_summary': value_json.state[:255]} | to_json }}"
        ),
    }
    return [
        (topics.discovery_config("sensor", agent, "label"), msgspec.json.encode(label)),
        (topics.discovery_config("update", agent, "model"), msgspec.json.encode(update)),
    ]
