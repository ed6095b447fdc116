"""``aggregator demo``, one of the two commands of the README, as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aggregator.releases.store import ReleaseStore
from aggregator.store import Store

END_S = 300.0


@pytest.mark.timeout(END_S + 30)
def test_the_demo_goes_from_images_to_labels_on_a_device(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    size = ("--agents", "2", "--rounds", "1")
    done = subprocess.run(
        [sys.executable, "-m", "aggregator.cli", "demo", "--folder", str(folder), *size],
        capture_output=True,
        text=True,
        check=False,
        timeout=END_S,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 images; latency p50" in done.stdout
    assert "2 agents trained one model in 1 round" in done.stdout
    with Store(folder / "aggregator") as store:
        (release,) = ReleaseStore(store).releases()
    assert (folder / "agent-1.state" / "models" / "slots" / release.release.model.sha256).is_dir()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    done = subprocess.run(
        [sys.executable, "-m", "aggregator.cli", "demo", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=END_S,
    )
    assert done.returncode == 2
    assert "name another --folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
