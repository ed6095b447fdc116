import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.observer import Observer
from benchmarks.proxy import LOOPBACK, CountingProxy, Traffic
from benchmarks.runner import BenchmarkError

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux' /proc is read")

DEADLINE_S = 30.0
MIB = 1 << 20

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "held = b'x' * (64 << 20); print('held', flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_group_is_all_that_descends_from_its_process_and_ends_with_the_observer() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        grandchild = psutil.Process(int(parent.stdout.readline()))
        alone = psutil.Process(parent.pid).memory_info().rss / MIB
        with Observer() as observer:
            observer.follow("device", parent.pid, pss=True)
            until(lambda: bool(observer._series["device"].pss) and observer.peak_mb("device") > alone + 60)
            assert 64 < observer.peak_pss_mb("device") < observer.peak_mb("device")
            with pytest.raises(BenchmarkError, match="not read in time"):
                observer.peak_mb("device", since=time.time() + 3600)
        assert parent.poll() is not None
        assert not grandchild.is_running()


def test_bytes_are_those_of_the_span() -> None:
    with (
        socket.create_server((LOOPBACK, 0)) as listener,
        CountingProxy(listener.getsockname()[1]) as proxy,
        socket.create_connection((LOOPBACK, proxy.port), DEADLINE_S) as client,
        Observer() as observer,
    ):
        server, _ = listener.accept()
        with server:
            observer.count("device", proxy)
            series = observer._series["device"].traffic
            until(lambda: bool(series))
            before = time.time()
            client.sendall(bytes(10))
            server.sendall(bytes(20))
            until(lambda: series[-1][1] == Traffic(10, 20))
            between = time.time()
            client.sendall(bytes(1))
            until(lambda: series[-1][1] == Traffic(11, 20))
            assert observer.bytes_between("device", 0, before) == Traffic()
            assert observer.bytes_between("device", before, between) == Traffic(10, 20)
            assert observer.bytes_between("device", between, time.time()) == Traffic(1, 0)


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Observer() as observer:
        observer.follow("device", child.pid)
        until(lambda: bool(observer._series["device"].rss) and observer._series["device"].rss[-1][1] > 1)
        child.communicate(b"\n")
        until(lambda: observer._series["device"].rss[-1][1] == 0)
    assert child.returncode == os.EX_OK
