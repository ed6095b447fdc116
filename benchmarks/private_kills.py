"""Is a privacy ledger ever below what was used, when its agent is killed at any instant?

A real agent trains privately, and is killed with SIGKILL in one step of a round after the other, each time a random moment
after it got there. What it really did is told by the model that it trains (:mod:`benchmarks.watched_model`), not by our
logs or our ledger.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.agent_life import live
from benchmarks.fleets import Fleet, Run
from benchmarks.processes import Child, Children
from benchmarks.runner import BenchmarkError, Options, Results, say
from benchmarks.watched_model import DATA, HEAD, MODEL, SAMPLES, WITNESS
from edge_agent.guard import owner_of
from edge_agent.places import default_state
from federation.bundle import read_bundle
from privacy.accounting import Spend, epsilon_pld
from privacy.budget import steps_of
from privacy.ledger import read_entries
from privacy.ledger_format import Entry

KILLS, KILLS_QUICK = 200, 40
BATCH_SIZE, NOISE, DELTA = 8, 2.0, 1e-5
"""A batch of more than 32, which would take two passes in one step, has a probability of 1e-10."""

PAID_PER_KILL = 0.55
"""Rounds that the budget pays for, as a share of the kills: the last ones find it exhausted."""

LARGEST_DELAY_S = 0.05
"""Between a step and the kill at most; most steps take less."""

LIFE_S = 120.0
"""That a life may take to the step in which it is to die; without load it is 2."""

POLL_S = 0.001
SEED = 4
PRELOADED = ["torch", "opacus", "opacus.grad_sample", "dp_accounting.pld.privacy_loss_distribution"]
PRELOADED += ["dp_accounting.rdp", "scipy.optimize", "edge_agent.agent"]
PRELOADED += [
    "edge_agent.training",
    "edge_agent.private_training",
    "federation.task.data",
    "benchmarks.watched_model",
]


@dataclass(slots=True)
class Tally:
    """What came out.

    Attributes:
        kills: Lives that were ended.
        recovered: Of them, those after which a life took part again, or said that the budget is exhausted.
        below: Lives in which a training pass was not paid for, or not yet.
        exceeded: Lives after which the ledger holds more than the device allows.
        steps_used: Training passes, at most one in a step.
        steps_paid: Steps that the ledger holds.
        by_step: Kills by the step of the round; "exhausted" where the budget let it come to none.
    """

    kills: int = 0
    recovered: int = 0
    below: int = 0
    exceeded: int = 0
    steps_used: int = 0
    steps_paid: int = 0
    by_step: Counter[str] = field(default_factory=Counter)


class Victim:
    """One device: its processes live one after the other on the same state.

    Args:
        bundle: Its identity.
        folder: For logs and the witness.
        max_epsilon: That it allows.
    """

    def __init__(self, bundle: Path, folder: Path, max_epsilon: float) -> None:
        self._bundle, self._folder, self._max_epsilon = bundle, folder, max_epsilon
        self._owner = owner_of(read_bundle(bundle))
        self.state = default_state(bundle)
        self.witness = folder / "witness"
        self.log = folder / "agent.log"
        self.witness.touch()
        self.log.touch()

    def live(self) -> BaseProcess:
        """Begin a life: a process forked from one that has loaded the libraries already, so that it takes a second, not ten."""
        environment = {
            WITNESS: str(self.witness),
            HEAD: str(self.state / "ledger" / "head"),
        }
        arguments = ["run", str(self._bundle), "--data", DATA, "--threads", "1", "--device", "cpu"]
        arguments += ["--telemetry", "0", "--allow-model", MODEL, "--log-format", "json"]
        arguments += ["--max-epsilon", repr(self._max_epsilon)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=live, args=(arguments, environment, str(self.log)))
        process.start()
        return process

    def entries(self) -> tuple[Entry, ...]:
        """What the ledger says."""
        return read_entries(self.state / "ledger", self._owner)

    def passes(self, pid: int) -> list[int]:
        """How many entries the ledger had at each training pass of a process."""
        lines = (line.split() for line in self.witness.read_text().splitlines())
        return [int(entries) for who, entries in lines if int(who) == pid]

    def events(self, since: int) -> list[dict[str, Any]]:
        """What its log says after so many bytes."""
        with self.log.open("rb") as file:
            file.seek(since)
            lines = file.read().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}\n")]

    def logged(self, event: str, since: int) -> bool:
        """Whether that event is among them."""
        return any(line["event"] == event for line in self.events(since))


STEPS = ("starting", "planning", "paying", "paid", "first step", "training", "trained", "offered", "accepted")
"""Of a private round, in their order."""


def ways_to(victim: Victim, pid: int, rng: random.Random) -> dict[str, Callable[[], bool]]:
    """When a life has got to each of the :data:`STEPS`."""
    since, ledger = victim.log.stat().st_size, victim.state / "ledger" / "entries"
    before = ledger.stat().st_size if ledger.exists() else 0
    some = rng.randrange(2, 50)
    conditions: tuple[Callable[[], bool], ...] = (
        lambda: True,
        lambda: victim.logged("training_started", since),
        lambda: ledger.exists() and ledger.stat().st_size > before,
        lambda: victim.logged("round_paid", since),
        lambda: bool(victim.passes(pid)),
        lambda: len(victim.passes(pid)) >= some,
        lambda: victim.logged("model_trained", since),
        lambda: victim.logged("update_offered", since),
        lambda: victim.logged("update_accepted", since),
    )
    return dict(zip(STEPS, conditions, strict=True))


def kill_again_and_again(
    victim: Victim, kills: int, max_epsilon: float, rng: random.Random, steps: Sequence[str] = STEPS
) -> Tally:
    """End one life after the other, and compare each with its ledger.

    Args:
        victim: Whose lives.
        kills: How many.
        max_epsilon: That the device allows.
        rng: Chooses the moments.
        steps: In which to kill, one after the other, again and again.
    """
    tally = Tally()
    unproven = 0
    for number in range(kills + 1):
        before, since = len(victim.entries()), victim.log.stat().st_size
        process = victim.live()
        pid = process.pid
        assert pid is not None
        # The last life has to show that the device goes on.
        step = steps[number % len(steps)] if number < kills else STEPS[-1]
        refused = _reach(victim, process, ways_to(victim, pid, rng)[step], since)
        if step != STEPS[0]:
            tally.recovered += unproven
            unproven = 0
        time.sleep(LARGEST_DELAY_S * rng.random() ** 3)  # mostly at once, where the disk is written
        os.kill(pid, signal.SIGKILL)
        process.join()
        entries, passes = victim.entries(), victim.passes(pid)
        tally.below += not paid_for(entries, passes, before)
        tally.exceeded += epsilon_pld([entry.spend for entry in entries], DELTA) > max_epsilon
        tally.steps_used += len(passes)
        if number < kills:
            unproven += 1
            tally.kills += 1
            tally.by_step["exhausted" if refused else step] += 1
    tally.steps_paid = sum(entry.steps for entry in victim.entries())
    return tally


def _reach(victim: Victim, process: BaseProcess, reached: Callable[[], bool], since: int) -> bool:
    """Wait until a life has got to its step; true if its budget did not let it."""
    deadline = time.monotonic() + LIFE_S
    while not reached():
        declined = [line["code"] for line in victim.events(since) if line["event"] == "round_declined"]
        if "budget" in declined:
            return True
        if declined or not process.is_alive():
            raise BenchmarkError(f"the agent has stopped taking part by itself, see {victim.log}")
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the agent did not get on within {LIFE_S:.0f} s, see {victim.log}")
        time.sleep(POLL_S)
    return False


def paid_for(entries: tuple[Entry, ...], passes: list[int], before: int) -> bool:
    """Whether each training pass of a life was paid for by that life, before it was made.

    The k-th pass that was made while the head counted c entries is covered by the entries before + 1 … c.
    """
    paid = 0
    for made, count in enumerate(passes, 1):
        paid = sum(entry.steps for entry in entries[before:count])
        if count > len(entries) or made > paid:
            return False
    return True


@contextmanager
def victims_home(folder: Path, kills: int) -> Iterator[tuple[Victim, float]]:
    """A server, and a device whose budget pays for some of the lives to come."""
    rate, steps = steps_of(SAMPLES, BATCH_SIZE, 1, 0)
    rounds = max(2, round(kills * PAID_PER_KILL))
    max_epsilon = epsilon_pld([Spend(NOISE, rate, steps * rounds)], DELTA)
    run = Run(
        MODEL,
        DATA,
        rounds=10 * kills + 10,
        agents=1,
        train={"batch_size": BATCH_SIZE},
        settings={"privacy.sample.noise_multiplier": str(NOISE)},
    )
    with Children(folder / "logs") as children:
        fleet = Fleet(children, folder / "fleet", run)
        bundle = fleet.enroll("agent-1")
        server: Child = fleet.serve()
        yield Victim(bundle, folder, max_epsilon), max_epsilon
        children.stop(server)


def measure_kills(options: Options, results: Results) -> None:
    """The part ``kills`` of ``python -m benchmarks.dp``."""
    kills = KILLS_QUICK if options.quick else KILLS
    folder = options.folder / "kills"
    folder.mkdir(parents=True)
    say(f"kill -9 in {kills} lives of an agent that trains privately")
    with victims_home(folder, kills) as (victim, max_epsilon):
        tally = kill_again_and_again(victim, kills, max_epsilon, random.Random(SEED))
    say("  in " + ", ".join(f"{step} {count}" for step, count in tally.by_step.items()))
    say(f"  {tally.steps_used} training passes were made, {tally.steps_paid} steps paid for")
    results.add("kills", tally.kills, "", "lives of a private agent that were ended by SIGKILL")
    results.add(
        "ledger_below_use", tally.below, "", "lives with a training pass that was not paid for before it"
    )
    results.add(
        "budget_exceeded", tally.exceeded, "", "lives after which more was spent than the device allows"
    )
    results.add(
        "recovered", tally.recovered, "", "kills after which the next life took part, or kept to its budget"
    )
