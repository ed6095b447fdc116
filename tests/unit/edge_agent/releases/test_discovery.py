"""edge_agent.releases.discovery: what Home Assistant reads, its templates rendered as it renders them."""

import json
from typing import Any

import jinja2

from edge_agent.releases.discovery import announcements
from federation.wire.messages import encode_json
from federation.wire.predictions import ModelState, PredictionMessage
from federation.wire.topics import Topics

TOPICS = Topics("garden")
UPDATE_KEYS = {
    "installed_version",
    "latest_version",
    "title",
    "release_summary",
    "release_url",
    "entity_picture",
    "in_progress",
    "update_percentage",
}
"""All that Home Assistant's MQTT update entity knows: it drops a message with any other key."""

STATE = ModelState(
    installed_version="3",
    latest_version="4",
    in_progress=True,
    title="fedge model",
    online=True,
    session="ab" * 8,
    state="release 4 fetching" * 50,
)
PREDICTION = PredictionMessage(
    label="dark",
    confidence=0.75,
    top=(("dark", 0.75), ("bright", 0.25)),
    source="camera 0, frame 7",
    latency_ms=1.5,
    time=1.0,
)


def announced() -> dict[str, dict[str, Any]]:
    """By component."""
    found = announcements(TOPICS, "pi1", publish_interval_s=10.0)
    return {topic.split("/")[1]: json.loads(payload) | {"topic": topic} for topic, payload in found}


def rendered(template: str, payload: bytes) -> str:
    environment = jinja2.Environment(autoescape=False)  # noqa: S701 - no web page
    environment.filters["to_json"] = json.dumps
    return environment.from_string(template).render(value_json=json.loads(payload))


def test_entities_are_announced_where_the_device_may_write_and_have_ids_of_their_own() -> None:
    found = announced()
    assert found["sensor"]["topic"] == "homeassistant/sensor/fedge-garden-pi1/label/config"
    assert found["update"]["topic"] == "homeassistant/update/fedge-garden-pi1/model/config"
    assert found["sensor"]["unique_id"] != found["update"]["unique_id"]
    assert found["sensor"]["device"] == found["update"]["device"]
    others = announcements(TOPICS, "pi2", publish_interval_s=10.0)
    assert json.loads(others[0][1])["device"]["identifiers"] != found["sensor"]["device"]["identifiers"]


def test_the_update_entity_gets_the_keys_it_knows_and_no_other() -> None:
    update = announced()["update"]
    assert update["state_topic"] == TOPICS.model("pi1")
    state = json.loads(rendered(update["value_template"], encode_json(STATE)))
    assert set(state) <= UPDATE_KEYS
    assert (state["installed_version"], state["latest_version"], state["in_progress"]) == ("3", "4", True)
    assert len(state["release_summary"]) <= 255


def test_the_sensor_shows_the_label_and_what_belongs_to_it() -> None:
    sensor = announced()["sensor"]
    assert sensor["state_topic"] == TOPICS.predictions("pi1")
    assert rendered(sensor["value_template"], encode_json(PREDICTION)) == "dark"
    attributes = json.loads(rendered(sensor["json_attributes_template"], encode_json(PREDICTION)))
    assert attributes["confidence"] == 0.75
    assert attributes["top"] == [["dark", 0.75], ["bright", 0.25]]
    assert attributes["release"] is None
    assert sensor["expire_after"] > 10


def test_both_are_unavailable_while_the_process_is_gone() -> None:
    for entity in announced().values():
        assert entity["availability_topic"] == TOPICS.model("pi1")
        for online, word in ((True, "online"), (False, "offline")):
            state = encode_json(ModelState(**{**_fields(), "online": online}))
            assert rendered(entity["availability_template"], state) == word


def _fields() -> dict[str, Any]:
    return {name: getattr(STATE, name) for name in STATE.__struct_fields__}
