"""privacy.secagg.graph: sizes against what they promise, and the graph against its definition."""

import random
import re
from math import comb
from pathlib import Path

import pytest

from privacy.secagg.agreement import Terms, context_of, roster_digest, survivors_digest
from privacy.secagg.graph import COMPLETE_UP_TO, graph_of, graph_size

THIRD = 1 / 3


@pytest.mark.parametrize(
    ("devices", "threshold"), [(2, 2), (3, 2), (4, 3), (5, 4), (9, 6), (10, 7), (30, 20), (50, 34)]
)
def test_small_cohorts_are_complete_with_two_thirds(devices: int, threshold: int) -> None:
    size = graph_size(devices, THIRD, 0.05)
    assert (size.neighbours, size.threshold) == (devices - 1, threshold)


@pytest.mark.parametrize("dropouts", [0.0, 0.1, THIRD, 0.5])
@pytest.mark.parametrize("devices", [2, 3, 7, 24, 50, 51, 64, 100, 333, 1000])
def test_both_secrets_of_a_device_are_never_recovered(devices: int, dropouts: float) -> None:
    """Honest holders reveal one share each, colluders two: 2t must be more than both together."""
    size = graph_size(devices, dropouts, 0.05)
    among_holders = size.colluders if size.neighbours == devices - 1 else 2 * size.colluders
    assert size.colluders >= 0
    assert 2 * size.threshold > size.holders + among_holders
    assert size.threshold <= size.holders


@pytest.mark.parametrize("dropouts", [0.1, 0.2, THIRD])
@pytest.mark.parametrize("devices", [3, 9, 30, 50, 100, 1000])
def test_the_tolerated_share_may_vanish(devices: int, dropouts: float) -> None:
    """Drawn at random, as batteries and links fail: the neighbourhoods of one device in each of 300 draws."""
    size, draw = graph_size(devices, dropouts, 0.05), random.Random(devices)
    vanished = int(devices * dropouts + 1e-9)
    for _ in range(300):
        of_holders = sum(place < vanished for place in draw.sample(range(devices), size.holders))
        assert of_holders <= size.dropouts


@pytest.mark.parametrize("devices", [51, 100, 1000])
def test_colluders_stay_below_what_the_threshold_allows(devices: int) -> None:
    """The promise of 2^-40 over both sides of all devices, summed here in floating point."""
    size = graph_size(devices, 0.2, 0.05)
    half, conspirators = size.neighbours // 2, -(-devices // 20)
    tail = sum(
        comb(conspirators, count) * comb(devices - 1 - conspirators, half - count) / comb(devices - 1, half)
        for count in range(size.colluders + 1, min(half, conspirators) + 1)
    )
    assert 2 * devices * tail <= 2**-40
    assert size.threshold == half + 2 + size.colluders


def test_large_cohorts_are_sparse_and_sizes_do_not_jump_down() -> None:
    sizes = [graph_size(devices, 0.2, 0.05).neighbours for devices in (100, 200, 400, 800, 1600)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 60
    assert sizes[-1] < 250


def test_too_many_dropouts_for_a_sparse_graph_make_it_complete() -> None:
    size = graph_size(100, 0.5, 0.05)
    assert (size.neighbours, size.threshold, size.dropouts) == (99, 51, 49)


@pytest.mark.parametrize("devices", [3, COMPLETE_UP_TO, COMPLETE_UP_TO + 1, 80, 101])
def test_neighbours_are_mutual_equally_many_and_never_oneself(devices: int) -> None:
    names = tuple(f"agent-{number:03}" for number in range(devices))
    graph = graph_of(names, roster_digest(bytes(32), names), Terms(2, 0.1))
    for name in names:
        assert len(graph.neighbours(name)) == graph.size.neighbours
        assert name not in graph.neighbours(name)
        assert all(name in graph.neighbours(other) for other in graph.neighbours(name))
    assert sorted(graph.point(name) for name in names) == list(range(1, devices + 1))


def test_another_roster_or_context_gives_another_ring() -> None:
    names = tuple(f"agent-{number:03}" for number in range(80))
    rings = {
        graph_of(names, roster_digest(bytes([seed]) * 32, names), Terms(2, 0.1)).ring for seed in range(5)
    }
    assert len(rings) == 5


def test_digests_do_not_confuse_where_one_part_ends() -> None:
    assert context_of("ab", "c") != context_of("a", "bc") != context_of("abc")
    assert context_of(1, 2) == context_of("1", b"2")
    assert roster_digest(bytes(32), ["a", "bc"]) != roster_digest(bytes(32), ["ab", "c"])
    assert roster_digest(bytes(32), ["a"]) != survivors_digest(bytes(32), ["a"])


@pytest.mark.parametrize(
    ("agents", "dropouts", "colluders"), [(1, 0.1, 0.0), (2, -0.1, 0.0), (2, 0.51, 0.0), (2, 0.1, 1.0)]
)
def test_terms_that_protect_nobody_are_refused(agents: int, dropouts: float, colluders: float) -> None:
    with pytest.raises(ValueError, match=r"is (1|-0.1|0.51|1.0)"):
        Terms(agents, dropouts, colluders)


def test_the_documentation_has_the_sizes_that_are_computed() -> None:
    page = (Path(__file__).parents[4] / "docs" / "privacy.md").read_text()
    table = page.partition("| n | dropouts 0.1: k, t |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\d,]+) \| (.+) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 4
    for devices, cells in rows:
        computed = [
            graph_size(int(devices.replace(",", "")), dropouts, colluders)
            for dropouts, colluders in ((0.1, 0.05), (0.2, 0.05), (THIRD, 0.05), (THIRD, 0.0))
        ]
        assert cells.split(" | ") == [f"{size.neighbours}, {size.threshold}" for size in computed]
