"""aggregator.releases.automatic: a process of its own, whose end is always heard of."""

import threading
from pathlib import Path

import pytest
from brokers import until
from release_folders import FEDERATION

from aggregator.config import AggregatorConfig
from aggregator.options import served_config
from aggregator.releases.automatic import AutomaticRelease
from aggregator.store import Store
from federation.config import to_toml
from federation.errors import ConfigError
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes
from federation.task.models import build, state_arrays
from federation.wire.messages import TaskSpec

TASK = TaskSpec(model="cnn", labels=("yes", "no"), channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))
DEADLINE_S = 60.0


@pytest.fixture
def config(tmp_path: Path) -> AggregatorConfig:
    made = AggregatorConfig(federation=FEDERATION, state_dir=str(tmp_path / "state"))
    with Store(tmp_path / "state", FEDERATION, create=True) as store:
        info = CheckpointInfo(federation=FEDERATION, round=1, task=TASK)
        store.write_checkpoint(1, checkpoint_bytes(info, state_arrays(build(TASK))))
    served_config(made.state_dir).write_text(to_toml(made))
    return made


def test_what_the_command_complains_of_is_the_reason(config: AggregatorConfig) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of round 5: it has 1"):
        AutomaticRelease(config)(5)


def test_a_server_that_stops_does_not_wait_for_an_export(config: AggregatorConfig) -> None:
    automatic = AutomaticRelease(config)
    raised: list[ConfigError] = []

    def make() -> None:
        try:
            automatic(1)
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    until(lambda: automatic.busy, timeout_s=DEADLINE_S, what="the export begins")
    automatic.stop()
    thread.join(DEADLINE_S)
    assert [str(error) for error in raised] == ["the server was stopped meanwhile"]
    with pytest.raises(ConfigError, match="the server is stopping"):
        automatic(1)
