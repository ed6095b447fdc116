"""docs/protocol.md suffices to write a client: one that was written from it takes part in a real run."""

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import independent_client
import independent_frame
import numpy as np
import pytest
from independent_client import Fields, IndependentClient, Refused, Tensors
from independent_frame import write_frame
from safetensors.numpy import load_file

ALLOWED = {"msgspec", "cryptography", "numpy", "paho", "safetensors", "independent_frame"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
END_S = 60.0

TOLERANCE = {"float32": 0.0, "float16": 2.0**-11, "int8": 1 / 127, "sq:0.5": 1.0}
"""Largest error of a value, relative to the tensor's largest magnitude; docs/protocol.md, section 10. For ``sq:0.5``: one
step of half the RMS up and one down, and the RMS is at most the largest magnitude."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "aggregator.cli", *map(str, arguments)]


@pytest.fixture(params=list(TOLERANCE))
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Served = tuple[Fields, "subprocess.Popen[bytes]"]


@pytest.fixture
def served(tmp_path: Path, encoding: str) -> Iterator[Served]:
    """The bundle of an enrolled device, and an aggregator that serves a run of two rounds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ("--federation", "doc", "--state", tmp_path / "state", "--listen", listen)
    path = tmp_path / "stranger.json"
    subprocess.run(command("enroll", "stranger", *common, "-o", path), check=True, env=ENVIRONMENT)
    rounds = ("--data", "digits", "--rounds", 2, "--min-agents", 1, "--up-encoding", encoding)
    way_down = (
        "--down-encoding",
        encoding if encoding.startswith("sq") else "float32",
        "--set",
        "max_noise=0",
    )
    small = (
        "--set",
        "broker.chunk_bytes=4096",
        "--set",
        "rounds.gather_s=0",
        "--set",
        "rounds.max_samples=500",
    )
    with (tmp_path / "serve.log").open("wb") as log:
        serve = subprocess.Popen(
            command("serve", *common, *rounds, *way_down, *small), stderr=log, env=ENVIRONMENT
        )
    try:
        yield json.loads(path.read_text()), serve
    finally:
        serve.kill()
        serve.wait()
        print((tmp_path / "serve.log").read_text())  # noqa: T201 - pytest shows it with a failure


def learned(base: Tensors, round_number: int) -> Tensors:
    rng = np.random.default_rng(round_number)
    return {
        name: rng.standard_normal(array.shape, np.float32) * np.float32(1 / 64)
        for name, array in base.items()
    }


def test_the_client_imports_nothing_of_ours() -> None:
    imported = {
        name.partition(".")[0]
        for module in (independent_client, independent_frame)
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) <= ALLOWED


def test_a_client_written_from_the_document_takes_part(served: Served, encoding: str, tmp_path: Path) -> None:
    bundle, serve = served
    client = IndependentClient(bundle)
    client.start()
    try:
        plan = client.wait_for_round()
        assert plan["up_encoding"] == encoding
        base = client.base_model(plan)
        first = learned(base, 1)
        frame = write_frame(first, encoding)
        # Refusals come with a code, and do not spoil the round.
        with pytest.raises(Refused, match="bad_sample_count"):
            client.deliver(plan, frame, samples=501)
        with pytest.raises(Refused, match="wrong_base"):
            client.deliver(plan | {"base": "0" * 64}, frame)
        receipt = client.deliver(plan, frame)
        assert (receipt["accepted"], receipt["code"]) == (True, None)
        while (plan := client.wait_for_round())["round"] == 1:
            client._hear(float("inf"), until=0.0)
        after = client.base_model(plan)
        assert client.deltas_applied == 1
        for name, array in base.items():
            error = np.abs(after[name] - (array + first[name])).max(initial=0.0)
            rounding = float(np.finfo(np.float32).eps) * float(np.abs(array).max() + 1)
            assert error <= TOLERANCE[encoding] * np.abs(first[name]).max() + rounding, name
        client.deliver(plan, write_frame(learned(after, 2), encoding))
        assert serve.wait(END_S) == 0  # the run is finished
    finally:
        client.stop()
    checkpoint = tmp_path / "state" / "checkpoints" / "round-000001.safetensors"
    assert all(np.array_equal(array, after[name]) for name, array in load_file(checkpoint).items())
