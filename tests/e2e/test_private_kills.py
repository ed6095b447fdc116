"""kill -9 in the middle of private training: what was used was paid for before, and the device goes on."""

import random
from pathlib import Path

import pytest

from benchmarks.private_kills import NOISE, kill_again_and_again, victims_home

pytestmark = pytest.mark.network

STEPS = ("paying", "first step", "training", "offered", "paying", "training")


def test_no_kill_makes_the_ledger_forget(tmp_path: Path) -> None:
    with victims_home(tmp_path, kills=len(STEPS)) as (victim, max_epsilon):
        tally = kill_again_and_again(victim, len(STEPS), max_epsilon, random.Random(1), STEPS)
        entries = victim.entries()
    assert tally.kills == tally.recovered == len(STEPS)
    assert (tally.below, tally.exceeded) == (0, 0)
    assert 0 < tally.steps_used < tally.steps_paid, "rounds that were broken off were paid for in full"
    assert len({entry.round for entry in entries}) < len(entries), "a round was paid for more than once"
    assert {entry.noise_multiplier for entry in entries} == {NOISE}
    assert tally.by_step["exhausted"], "the last lives found the budget exhausted"
