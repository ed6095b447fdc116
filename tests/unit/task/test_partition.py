import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ConfigError
from federation.task.partition import Partition, divide, share, split_spec

PARTITIONS = st.one_of(
    st.builds(Partition, st.just("iid"), st.just(1), st.integers(1, 12), st.integers(0, 99)),
    st.builds(
        Partition,
        st.just("dirichlet"),
        st.just(1),
        st.integers(1, 12),
        st.integers(0, 99),
        alpha=st.sampled_from([1e-4, 0.05, 0.5, 10.0, 1e6]),
    ),
    st.builds(
        Partition,
        st.just("shards"),
        st.just(1),
        st.integers(1, 12),
        st.integers(0, 99),
        shards=st.integers(1, 4),
    ),
)


@given(partition=PARTITIONS, labels=st.lists(st.integers(0, 6), min_size=48, max_size=200))
def test_shares_are_disjoint_nonempty_and_together_the_whole_set(
    partition: Partition, labels: list[int]
) -> None:
    shares = divide(np.array(labels, np.int64), partition)

    assert len(shares) == partition.agents
    assert all(len(part) > 0 and np.all(np.diff(part) > 0) for part in shares)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(labels)))


@given(partition=PARTITIONS, labels=st.lists(st.integers(0, 6), min_size=48, max_size=60))
def test_every_agent_divides_alike(partition: Partition, labels: list[int]) -> None:
    array = np.array(labels, np.int64)

    assert np.array_equal(share(array, partition), divide(array, partition)[0])


def test_another_seed_divides_otherwise() -> None:
    labels = np.arange(100) % 10
    assert not np.array_equal(
        share(labels, Partition("iid", 1, 2, 1)), share(labels, Partition("iid", 1, 2, 2))
    )


def test_two_shards_hold_few_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    shares = divide(labels, Partition("shards", 1, 5, 3, shards=2))

    assert all(len(part) == 200 and len(np.unique(labels[part])) == 2 for part in shares)


def test_a_small_alpha_is_more_uneven_than_a_large_one() -> None:
    labels = np.repeat(np.arange(10), 200)

    def largest_class(alpha: float) -> float:
        parts = divide(labels, Partition("dirichlet", 1, 5, 0, alpha=alpha))
        return float(np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_class(1000.0) < 0.15
    assert largest_class(0.1) > 0.25


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("digits", ("digits", None)),
        ("digits@iid,agent=1/3", ("digits", Partition("iid", 1, 3))),
        ("mnist:/a@b/c", ("mnist:/a@b/c", None)),
        ("mnist:/a@b/c@iid,agent=3/3,seed=7", ("mnist:/a@b/c", Partition("iid", 3, 3, 7))),
        ("imagefolder:/a@iiders", ("imagefolder:/a@iiders", None)),
        (
            "x:p@dirichlet(0.5), seed=1, agent=2/3",
            ("x:p", Partition("dirichlet", 2, 3, 1, alpha=0.5)),
        ),
        ("x:p@shards(2),agent=5/5", ("x:p", Partition("shards", 5, 5, shards=2))),
    ],
)
def test_a_partition_is_read_behind_the_rightmost_at(
    spec: str, expected: tuple[str, Partition | None]
) -> None:
    assert split_spec(spec) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iid", "add agent=1/3"),
        ("iid,agent=4/3", "agent=4/3 is not one of 1/3 to 3/3"),
        ("iid,agent=0/3", "agent=0/3 is not one of"),
        ("idd,agent=1/3", "'idd' is no way to divide"),
        ("iid,agent=1/3,speed=3", "'speed=3' is unknown"),
        ("iid,agent=1/3,agent=2/3", "given twice"),
        ("iid,agent=1/3,seed=x", "seed=x is not a number"),
        ("dirichlet(0),agent=1/3", "above 0"),
        ("dirichlet(nan),agent=1/3", "above 0"),
        ("dirichlet(inf),agent=1/3", "above 0"),
        ("dirichlet,agent=1/3", "'dirichlet' is no way"),
        ("shards(0),agent=1/3", "whole number from 1"),
        ("shards(1.5),agent=1/3", "whole number from 1"),
    ],
)
def test_a_broken_partition_is_refused_with_its_reason(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_spec(f"digits@{text}")

    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
def test_more_agents_than_samples_are_refused(kind: str) -> None:
    _, partition = split_spec(
        f"d@{ {'iid': 'iid', 'dirichlet': 'dirichlet(1)', 'shards': 'shards(1)'}[kind] },agent=1/11"
    )
    assert partition is not None

    with pytest.raises(
        ConfigError, match=r"10 samples cannot be divided among 11 agents .* share would be empty"
    ):
        share(np.zeros(10, np.int64), partition)
