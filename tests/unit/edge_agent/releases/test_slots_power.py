"""edge_agent.releases.slots: the power goes between any two steps, and a good model starts again."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from power_cuts import Choose, Disk, PowerCut
from slot_releases import fetch, made, put

from edge_agent.releases.quarantine import Quarantine
from edge_agent.releases.slot_files import installed
from edge_agent.releases.slots import Slots
from federation.errors import ReleaseFault
from federation.release import MODEL_FILE, check_file
from federation.task.model_delta import make_delta

OLDER, OLD, NEW = made(1), made(2), made(3)
NEW_BY_DELTA = made(3, delta=(OLD.sha256, make_delta(OLD.objects[OLD.sha256], NEW.objects[NEW.sha256])))
AGAIN = made(4, model=OLD.objects[OLD.sha256])
"""The model of OLD with another golden set, under another number."""


def upgrade(slots: Slots, done: list[str]) -> None:
    slots.activate(put(slots, NEW))
    done.append("activated")
    slots.count_start()
    done.append("healthy")
    slots.end_probation()
    done.append("confirmed")
    slots.collect_garbage(2)


def upgrade_by_delta(slots: Slots, done: list[str]) -> None:
    release = NEW_BY_DELTA.release
    assert release.delta is not None
    if release.model in slots.missing(release):
        fetch(slots, NEW_BY_DELTA, release.delta.object)
        slots.make_from_delta(release)
    upgrade(slots, done)


def give_up(slots: Slots, done: list[str]) -> None:
    if slots.quarantined(NEW.sha256) is None:
        slots.activate(put(slots, NEW))
        done.append("activated")
        while not slots.count_start():
            done.append("crashed")
        done.append("crash loop")
        slots.quarantine(NEW.sha256, ReleaseFault.CRASHED, "three times")
        done.append("quarantined")
        slots.roll_back()
    slots.collect_garbage(2)


def give_up_the_only_one(slots: Slots, done: list[str]) -> None:
    if slots.quarantined(NEW.sha256) is None:
        slots.activate(put(slots, NEW))
        done.append("activated")
        slots.quarantine(NEW.sha256, ReleaseFault.NON_FINITE, "NaN")
        done.append("quarantined")
        slots.roll_back()


def release_again(slots: Slots, done: list[str]) -> None:
    slots.activate(put(slots, AGAIN))
    done.append("activated")


def forgive(slots: Slots, done: list[str]) -> None:
    slots.quarantine(NEW.sha256, ReleaseFault.TOO_SLOW, "it was hot")
    Quarantine(slots.folder, time.time).forgive(NEW.sha256)
    done.append("forgiven")
    upgrade(slots, done)


def open_only(slots: Slots, done: list[str]) -> None:
    assert slots.current is not None
    done.append("opened")


def damage_current(folder: Path) -> None:
    (folder / "current" / MODEL_FILE).write_bytes(b"rotten")


Runs = set[int | None]


@dataclass(frozen=True)
class Story:
    """What a device does, again and again until it comes to the end.

    Attributes:
        act: Begins anew after a cut; notes how far it has come.
        steps: Cuts that there can be, at least.
        runs: Numbers of the releases of which one runs after a cut, by the last note; the end's is the last.
        before: Releases that the device ran until then, the last one now.
        damage: Happens to the folder before.
    """

    act: Callable[[Slots, list[str]], None]
    steps: int
    runs: dict[str, Runs]
    before: tuple[int, ...] = (1, 2)
    damage: Callable[[Path], None] | None = None

    @property
    def after(self) -> int | None:
        (number,) = list(self.runs.values())[-1]
        return number


TO_NEW: dict[str, Runs] = {"activated": {3}, "healthy": {3}, "confirmed": {3}}

STORIES = {
    "upgrade": Story(upgrade, 41, {"": {2, 3}, **TO_NEW}),
    "first model": Story(upgrade, 32, {"": {None, 3}, **TO_NEW}, before=()),
    "upgrade by delta": Story(upgrade_by_delta, 47, {"": {2, 3}, **TO_NEW}),
    "give up": Story(
        give_up,
        54,
        {"": {2, 3}, "activated": {3}, "crashed": {3}, "crash loop": {2, 3}, "quarantined": {2}},
    ),
    "give up the only one": Story(
        give_up_the_only_one,
        34,
        {"": {None, 3}, "activated": {None, 3}, "quarantined": {None}},
        before=(),
    ),
    "the same model under another number": Story(release_again, 12, {"": {2, 4}, "activated": {4}}),
    "forgive": Story(forgive, 46, {"": {2}, "forgiven": {2, 3}, **TO_NEW}),
    "recover": Story(open_only, 8, {"": {1}}, damage=damage_current),
}

MODELS = "models"

WEATHERS = 1
"""Of what was not synced, all has happened, or nothing, or so many random choices."""


def device(folder: Path, story: Story) -> Path:
    folder.mkdir()
    if not story.before:
        return folder
    with Slots(folder / MODELS, clock=lambda: 1.0) as slots:
        for number in story.before:
            slots.activate(put(slots, made(number)))
            slots.end_probation()
    if story.damage is not None:
        story.damage(folder / MODELS)
    return folder


def tell(folder: Path, story: Story, cut_at: int | None = None) -> tuple[Disk, list[str]]:
    done: list[str] = []
    with Disk(folder, cut_at) as disk:
        try:
            with Slots(folder / MODELS, clock=lambda: 2.0) as slots:
                story.act(slots, done)
            done.append("end")
        except PowerCut:
            pass
    return disk, done


def weathers(seed: int) -> list[Choose]:
    def randomly(draw: random.Random) -> Choose:
        return lambda _: draw.random() < 0.5

    return [
        lambda _: True,
        lambda _: False,
        *(randomly(random.Random(f"{seed} {number}")) for number in range(WEATHERS)),
    ]


def assert_good_start(folder: Path, story: Story, done: list[str]) -> None:
    with Slots(folder / MODELS, clock=lambda: 3.0) as slots:
        runs = None if slots.current is None else slots.current.release.number
        assert runs in story.runs[done[-1] if done else ""], done
        for slot in installed(slots.folder) if story.damage is None else ():
            check_file(slot.model, slot.release.model)
        if slots.current is None:
            return
        check_file(slots.current.model, slots.current.release.model)
        if runs == NEW.release.number and "healthy" not in done:
            assert slots.trial is not None
        if runs == NEW.release.number and story.before:
            assert slots.previous is not None, "there is nothing to go back to"
            assert slots.previous.release.number == OLD.release.number
            slots.check(slots.previous)


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A folder in memory where there is one: some thousand folders are made and deleted."""
    memory = Path("/dev/shm")  # noqa: S108 - what is made there has a name of its own
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", STORIES)
def test_a_power_cut_between_any_two_steps_leaves_a_good_model(memory_disk: Path, name: str) -> None:
    story = STORIES[name]
    source = device(memory_disk / "device", story)
    whole = memory_disk / "whole"
    shutil.copytree(source, whole, symlinks=True)
    disk, done = tell(whole, story)
    assert done[-1] == "end"
    assert disk.steps.total() >= story.steps, disk.steps

    for cut_at in range(disk.steps.total()):
        folder = memory_disk / f"cut-{cut_at}"
        shutil.copytree(source, folder, symlinks=True)
        disk, done = tell(folder, story, cut_at)
        with closing(disk):
            assert disk.steps.total() == cut_at
            assert "end" not in done
            for number, choose in enumerate(weathers(cut_at)):
                again = memory_disk / f"again-{cut_at}-{number}"
                disk.after_cut(again, choose)
                with Disk(again):  # which only spares the real fsync
                    assert_good_start(again, story, done)
                _, finished = tell(again, story)
                assert finished[-1] == "end"
                assert_the_end(again, story)
                shutil.rmtree(again)
        shutil.rmtree(folder)


def assert_the_end(folder: Path, story: Story) -> None:
    with Slots(folder / MODELS) as slots:
        assert (slots.current.release.number if slots.current else None) == story.after
        assert slots.trial is None or story.act is release_again
        assert not list((folder / MODELS / "parts").iterdir())
        assert not list(folder.rglob(".*"))
        if slots.current is not None:
            slots.check(slots.current)
