"""``benchmarks.aarch64`` counts what differs and takes no answer for granted; ``benchmarks.trained`` mixes no recipes up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import aarch64, trained
from benchmarks.runner import BenchmarkError, Results


def _lines(labels: list[str]) -> str:
    said = [
        json.dumps({"source": f"/somewhere/{number}.png", "top": [[label, 0.75], ["other", 0.25]]})
        for number, label in enumerate(labels)
    ]
    return "\n".join([*said, json.dumps({"summary": {}})])


def test_another_most_likely_label_counts() -> None:
    here = aarch64._answers(_lines(["cat"] * aarch64.PICTURES))
    its = aarch64._answers(_lines(["cat"] * (aarch64.PICTURES - 2) + ["dog"] * 2))
    results = Results()
    aarch64._compare(here, its, "key", "somewhere", results)
    assert results.figures["top1_differs_key"].value == 2


def test_a_picture_without_an_answer_is_no_agreement() -> None:
    here = aarch64._answers(_lines(["cat"] * aarch64.PICTURES))
    its = aarch64._answers(_lines(["cat"] * (aarch64.PICTURES - 1)))
    with pytest.raises(BenchmarkError, match=f"{aarch64.PICTURES - 1} pictures"):
        aarch64._compare(here, its, "key", "somewhere", Results())


def test_another_recipe_is_another_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stages = trained.RECIPES["cnn"].stages
    kept = trained._kept("cnn", "mnist:/data/mnist", stages)
    assert kept == trained._kept("cnn", "mnist:/elsewhere", stages)
    assert kept.is_relative_to(tmp_path)
    longer = (replace(stages[0], epochs=stages[0].epochs + 1),)
    others = {trained._kept("cnn", "mnist:/data/mnist", longer), trained._kept("cnn", "digits", stages)}
    assert len({kept, *others}) == 3


def test_without_the_real_images_digits_stand_in_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGE_DATA", str(tmp_path))
    assert trained._data(trained.RECIPES["cnn"]) == ("digits", "_digits")
    (tmp_path / "mnist").mkdir()
    assert trained._data(trained.RECIPES["cnn"]) == (f"mnist:{tmp_path / 'mnist'}", "")
