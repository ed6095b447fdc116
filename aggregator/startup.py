"""From settings to a server that can run: state folder, identity, task, initial model, broker."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from aggregator.broker import EmbeddedBroker
from aggregator.central_noise import CentralNoise
from aggregator.config import AggregatorConfig, TaskConfig
from aggregator.enrolment import Enrolment
from aggregator.initial_model import build_apart, build_here
from aggregator.masked_noise import MaskedNoise
from aggregator.promises import check_promises, samples_protected
from aggregator.store import Store
from aggregator.versions import WHOLE, remember_seed
from federation.errors import ConfigError
from federation.task.checkpoint import CheckpointInfo, read_checkpoint
from federation.wire.address import BrokerAddress
from federation.wire.encodings import encoding_named
from federation.wire.messages import TaskSpec

log = structlog.get_logger()

EMBEDDED = "embedded"
LAST_PORT = 65535

_TASK_KEY = "task"


@dataclass(frozen=True, slots=True)
class Ready:
    """All that the service needs.

    Attributes:
        store: Locked.
        enrolment: Keys and accounts.
        task: What is learned.
        address: Of the broker.
    """

    store: Store
    enrolment: Enrolment
    task: TaskSpec
    address: BrokerAddress


@contextmanager
def prepared(config: AggregatorConfig) -> Iterator[Ready]:
    """Open or create the state, start the embedded broker if it is wanted, and close both at the end.

    Raises:
        ConfigError: For a setting that cannot work, a state that is in use, a port that is taken.
        TransportError: If the embedded broker does not come up.
    """
    check(config)
    state = Path(config.state_dir)
    with Store(state, config.federation, create=True) as store:
        store.lock()
        task = settle_task(config, store)
        write_initial_model(config, store, task)
        CentralNoise(config, store).check()
        MaskedNoise(config, store).check()
        enrolment = Enrolment(state, config.federation)
        if config.broker.url != EMBEDDED:
            yield Ready(store, enrolment, task, external_address(config, enrolment))
            return
        broker = embedded_broker(config, enrolment)
        broker.start()
        try:
            ca_file = Path(config.broker.ca_file) if config.broker.ca_file else None
            yield Ready(
                store, enrolment, task, broker.address(enrolment.aggregator_account(), ca_file=ca_file)
            )
        finally:
            broker.stop()


def check(config: AggregatorConfig) -> None:
    """Refuse settings that contradict each other or name what does not exist.

    Raises:
        ConfigError: Naming the setting, its value and the remedy.
    """
    rounds = config.rounds
    check_promises(config)
    encoding_named(config.up_encoding)
    if config.down_encoding != WHOLE and encoding_named(config.down_encoding).stateful:
        raise ConfigError(
            f"down_encoding is {config.down_encoding!r}, which loses what it leaves out: use 'sq:4', or 'full'"
        )
    if rounds.cohort_size and rounds.cohort_size < rounds.min_agents:
        raise ConfigError(
            f"rounds.cohort_size is {rounds.cohort_size}, less than rounds.min_agents = {rounds.min_agents}: "
            "a round would close with fewer updates than the least that you ask for"
        )
    for key, value in (
        ("rounds.target_accuracy", rounds.target_accuracy),
        ("rounds.patience", rounds.patience),
    ):
        if value and not config.task.holdout:
            raise ConfigError(
                f"{key} is {value}, but there is nothing to measure accuracy on: set task.holdout"
            )
    if config.release.auto and not (config.release.data or config.task.holdout):
        raise ConfigError(
            "release.auto is on, but there are no pictures to compare a model with the release before on: set release.data "
            "or task.holdout"
        )


def settle_task(settings: AggregatorConfig, store: Store) -> TaskSpec:
    """Derive the task, or take the one that this run was begun with.

    Raises:
        ConfigError: If the settings name another task than the state, or do not suffice to derive one.
    """
    config, private = settings.task, samples_protected(settings.privacy)
    kept = store.recall(_TASK_KEY)
    if kept is not None:
        task = msgspec.json.decode(kept, type=TaskSpec)
        asked = {
            "model": config.model,
            "labels": config.labels,
            "channels": config.channels,
            "height": config.height,
            "width": config.width,
        }
        for name, value in asked.items():
            if value and value != getattr(task, name):
                raise ConfigError(
                    f"task.{name} is {value!r}, but {store.folder} was begun with {getattr(task, name)!r}: "
                    "set it back, or begin another run with another state_dir"
                )
        if private and not task.dp_ready:
            raise ConfigError(
                f"privacy.sample is on, but {store.folder} was begun without it, with a model that may mix samples: turn it "
                "off, or begin another run with another state_dir"
            )
        return task
    task = msgspec.structs.replace(derive_task(config), dp_ready=private)
    store.remember(_TASK_KEY, msgspec.json.encode(task).decode())
    return task


def derive_task(config: TaskConfig) -> TaskSpec:
    """Work out labels, image size and normalisation.

    Raises:
        ConfigError: If they can be had neither from the settings nor from the data.
    """
    from federation.task.data import task_from_data

    source = config.data or config.holdout
    if source:
        task = task_from_data(
            source, config.model, height=config.height, width=config.width, channels=config.channels
        )
        return msgspec.structs.replace(task, labels=config.labels) if config.labels else task
    if not (config.labels and config.channels and config.height and config.width):
        raise ConfigError(
            "cannot tell what is to be learned: set task.data (for example 'mnist' or 'imagefolder:PATH') or "
            "task.holdout, or all of task.labels, task.channels, task.height and task.width"
        )
    middle = (0.5,) * config.channels
    return TaskSpec(
        model=config.model,
        labels=config.labels,
        channels=config.channels,
        height=config.height,
        width=config.width,
        mean=middle,
        std=middle,
    )


def write_initial_model(config: AggregatorConfig, store: Store, task: TaskSpec) -> None:
    """Write the model that round 1 starts from, unless the run has begun already."""
    if store.rounds() or store.checkpoint_path(0).exists():
        return
    info = CheckpointInfo(federation=config.federation, round=0, task=task)
    # Who evaluates on a hold-out set imports torch anyway, and keeps it.
    make = build_here if config.task.holdout else build_apart
    path = store.write_checkpoint(0, make(info, config.train.seed))
    remember_seed(store, config.train.seed)
    log.info(
        "run_begun",
        run=store.run,
        model=task.model,
        parameters=sum(array.size for array in read_checkpoint(path)[1].values()),
        classes=len(task.labels),
    )


def embedded_broker(config: AggregatorConfig, enrolment: Enrolment) -> EmbeddedBroker:
    """The broker that runs as our child, not yet started."""
    host, port = _listen(config.broker.listen)
    return EmbeddedBroker(
        enrolment,
        host=host,
        port=port,
        certificate=Path(config.broker.tls_cert) if config.broker.tls_cert else None,
        key=Path(config.broker.tls_key) if config.broker.tls_key else None,
    )


def external_address(config: AggregatorConfig, enrolment: Enrolment) -> BrokerAddress:
    """The address of a broker that somebody else runs; its account is the enrolled one unless settings name one."""
    broker = config.broker
    in_url = BrokerAddress.parse(broker.url).username is not None
    account = (None, None) if in_url else enrolment.aggregator_account()
    username, password = (broker.username, broker.password) if broker.username else account
    return BrokerAddress.parse(
        broker.url,
        username=username,
        password=password,
        ca_file=broker.ca_file or None,
        client_cert_file=broker.client_cert or None,
        client_key_file=broker.client_key or None,
    )


def advertised_url(config: AggregatorConfig, enrolment: Enrolment) -> str:
    """The URL that enrolled devices use: ``broker.advertise``, or what follows from where the broker is."""
    if config.broker.url != EMBEDDED:
        return config.broker.advertise or config.broker.url
    broker = embedded_broker(config, enrolment)
    if config.broker.advertise:
        # What an MQTT 3.1.1 broker cannot say of itself, the bundle does.
        options = broker.url.partition("?")[2]
        return (
            config.broker.advertise
            if "?" in config.broker.advertise
            else f"{config.broker.advertise}?{options}"
        )
    everywhere = broker.host in ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
    return broker.url_at(socket.getfqdn() if everywhere else broker.host)


def ca_pem(config: AggregatorConfig) -> str:
    """The certificates that devices must trust, to be put into their bundles; empty for the system's.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if not config.broker.ca_file:
        return ""
    try:
        return Path(config.broker.ca_file).read_text()
    except OSError as error:
        raise ConfigError(f"broker.ca_file {config.broker.ca_file}: {error.strerror}") from error


def _listen(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > LAST_PORT:
        raise ConfigError(f"broker.listen is {text!r}: write it as ADDRESS:PORT, for example 0.0.0.0:1883")
    return host.strip("[]"), int(port)
