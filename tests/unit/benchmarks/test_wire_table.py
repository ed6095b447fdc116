from pathlib import Path

import pytest

from benchmarks.simulation import Outcome, Setting, simulate
from benchmarks.wire_table import BASELINE, IID, Kept, Row


def setting(up: str, down: str, *, seed: int = 0, rounds: int = 2) -> Setting:
    return Setting(up, down, IID, seed, rounds, max_noise=0.0, data="digits")


def outcome(top1: float, up_bytes: float = 1000.0) -> Outcome:
    return Outcome(top1=top1, early_top1=50.0, up_bytes=up_bytes, down_bytes=500.0)


def test_a_gap_is_taken_seed_by_seed() -> None:
    outcomes = {
        setting(*BASELINE, seed=0): outcome(98.0, 64000.0),
        setting(*BASELINE, seed=1): outcome(97.0, 64000.0),
        setting("sq:16", "sq:4", seed=0): outcome(97.5),
        setting("sq:16", "sq:4", seed=1): outcome(97.25),
    }
    row = Row(("sq:16", "sq:4"), list(outcomes), outcomes)
    assert row.gap == pytest.approx(-0.125)
    assert row.spread == "-0.50 to +0.25"
    assert "| 64.0x | 1.0x |" in row.markdown()


def test_what_was_done_is_not_done_again_unless_the_code_is_another(tmp_path: Path) -> None:
    path = tmp_path / "table.runs.jsonl"
    first = Kept(path)
    first.add(setting("sq:16", "sq:4"), outcome(98.0))
    assert Kept(path).outcomes == first.outcomes
    path.write_text(path.read_text().replace('"code": "', '"code": "other-'))
    assert not Kept(path).outcomes


def test_the_simulation_loses_what_the_encoding_loses_and_nothing_else() -> None:
    whole, delta, coarse = (
        simulate(setting(up, down))
        for up, down in (BASELINE, ("float32", "float32"), ("topk:0.01", "float32"))
    )
    assert delta.top1 == whole.top1
    assert coarse.top1 != whole.top1
    assert coarse.up_bytes < whole.up_bytes / 20
