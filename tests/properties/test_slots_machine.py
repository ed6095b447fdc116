"""A device's slots through any history, with power cuts anywhere in it: they agree with a few lines that say what they mean."""

import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from power_cuts import Disk, PowerCut
from slot_releases import made, put

from edge_agent.releases.probation import read_trial
from edge_agent.releases.quarantine import Quarantine
from edge_agent.releases.slot_files import CURRENT, PREVIOUS, installed, linked
from edge_agent.releases.slots import Slots
from federation.errors import ReleaseError, ReleaseFault

RELEASES = {number: made(number) for number in range(1, 5)}
NUMBERS = {one.sha256: number for number, one in RELEASES.items()}
MEMORY = Path("/dev/shm")  # noqa: S108 - what is made there has a name of its own


@dataclass
class Meant:
    """What the slots are meant to be, by release numbers; ``link`` and ``previous`` as they are on disk, ``trials`` with starts."""

    current: int | None = None
    link: int | None = None
    previous: int | None = None
    trials: dict[int, int] = field(default_factory=dict)
    quarantined: set[int] = field(default_factory=set)
    there: set[int] = field(default_factory=set)

    @property
    def fallback(self) -> int | None:
        usable = self.previous in self.there and self.previous not in self.quarantined
        return self.previous if usable and self.previous != self.current else None

    def take(self, number: int) -> None:
        self.there.add(number)
        if number == self.current or number in self.quarantined:
            return
        self.previous = self.previous if self.current is None else self.current
        self.current = self.link = number
        self.trials[number] = 0

    def start(self, _: int) -> None:
        if self.current in self.trials:
            self.trials[self.current] += 1

    def stop(self, _: int) -> None:
        if self.trials.get(self.current or 0):
            self.trials[self.current or 0] -= 1

    def confirm(self, _: int) -> None:
        self.trials.pop(self.current or 0, None)

    def give_up(self, _: int) -> None:
        if self.current is not None:
            self.quarantined.add(self.current)
            self.current = self.link = self.fallback

    def forgive(self, number: int) -> None:
        self.quarantined.discard(number)

    def collect(self, keep: int) -> None:
        kept = {number for number in (self.current, self.fallback) if number is not None}
        for number in sorted(self.there - self.quarantined, reverse=True):
            if len(kept) < keep:
                kept.add(number)
        self.there &= kept
        self.trials = {number: starts for number, starts in self.trials.items() if number in kept}

    def reopen(self, _: int) -> None:
        runs = self.link if self.link in self.there - self.quarantined else None
        if runs is None and self.link is not None:
            runs = self.fallback
            self.link = self.link if runs is None else runs
        self.current = runs


def act(slots: Slots, step: str, number: int) -> None:
    match step:
        case "take":
            slot = put(slots, RELEASES[number])
            try:
                slots.activate(slot)
            except ReleaseError as error:
                assert error.fault is ReleaseFault.QUARANTINED  # noqa: PT017 - an outcome, not what is tested
        case "start":
            slots.count_start()
        case "stop":
            slots.count_stop()
        case "confirm":
            slots.end_probation()
        case "give_up" if slots.current is not None:
            slots.quarantine(slots.current.sha256, ReleaseFault.ERRORS, "")
            slots.roll_back()
        case "forgive":
            Quarantine(slots.folder, time.time).forgive(RELEASES[number].sha256)
        case "collect":
            slots.collect_garbage(number)


def observed(slots: Slots) -> Meant:
    def number(name: str) -> int | None:
        folder = linked(slots.folder, name)
        return None if folder is None else NUMBERS[folder.name]

    trials = {}
    for one, release in RELEASES.items():
        trial = read_trial(slots.folder, release.sha256)
        if trial is not None and slots.find(release.sha256) is not None:
            trials[one] = trial.starts
    return Meant(
        current=None if slots.current is None else NUMBERS[slots.current.sha256],
        link=number(CURRENT),
        previous=number(PREVIOUS),
        trials=trials,
        quarantined={one for one, release in RELEASES.items() if slots.quarantined(release.sha256)},
        there={slot.release.number for slot in installed(slots.folder)},
    )


def assert_as_meant(slots: Slots, meant: Meant) -> None:
    found = observed(slots)
    assert (found.current, found.trials, found.quarantined, found.there) == (
        meant.current,
        meant.trials,
        meant.quarantined,
        meant.there,
    )
    assert (slots.previous.release.number if slots.previous else None) == meant.fallback
    assert (slots.trial.starts if slots.trial else None) == meant.trials.get(meant.current or 0)


def assert_as_before_or_after(slots: Slots, before: Meant, after: Meant) -> None:
    """What must hold after a power cut within a step."""
    found = observed(slots)
    outcomes = {before.current, after.current}
    assert found.current in outcomes
    assert (
        before.quarantined & after.quarantined <= found.quarantined <= before.quarantined | after.quarantined
    )
    assert found.current not in found.quarantined
    if found.current is not None:
        assert slots.current is not None
        slots.check(slots.current)
        watched = {side.current in side.trials for side in (before, after) if side.current == found.current}
        assert (found.current in found.trials) in watched


def assert_durable(disk: Disk, root: Path, meant: Meant) -> None:
    """A step that has come to its end outlives a power cut that takes all that was not synced."""
    disk.after_cut(root, lambda _: False)
    later = deepcopy(meant)
    later.reopen(0)
    with opened(root) as slots:
        assert_as_meant(slots, later)


STEPS = ["take", "take", "start", "stop", "confirm", "give_up", "forgive", "collect", "reopen"]
steps = st.tuples(
    st.sampled_from(STEPS),
    st.integers(1, 4),
    st.none() | st.integers(0, 40),  # the power goes before this step of the disk, if there are so many
    st.integers(0, 2**32),  # the weather
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=12))
def test_any_history_leaves_what_was_meant(history: list[tuple[str, int, int | None, int]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as name:
        root, meant = Path(name) / "0", Meant()
        root.mkdir()
        slots = opened(root)
        for place, (step, number, cut_at, weather) in enumerate(history, 1):
            before = deepcopy(meant)
            getattr(meant, step)(number)
            with closing(Disk(root, cut_at)) as disk:
                try:
                    with disk:
                        if step == "reopen":
                            slots.close()
                            slots = opened(root)
                        act(slots, step, number)
                except PowerCut:
                    slots.close()
                    root = Path(name) / str(place)
                    disk.after_cut(root, randomly(weather))
                    slots = opened(root)
                    before.reopen(0)
                    meant.reopen(0)
                    assert_as_before_or_after(slots, before, meant)
                    meant = observed(slots)
                else:
                    assert_as_meant(slots, meant)
                    if cut_at is not None:
                        assert_durable(disk, Path(name) / f"{place}-later", meant)
        slots.close()


def opened(root: Path) -> Slots:
    return Slots(root / "models", clock=lambda: 1.0)


def randomly(seed: int) -> Callable[[str], bool]:
    draw = random.Random(seed)
    return lambda _: draw.random() < 0.5
