import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from privacy.audit.membership import membership, roc_curve


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
def test_the_area_is_that_of_scikit_learn(drawn: list[tuple[int, bool]]) -> None:
    scores, member = np.array([float(score) for score, _ in drawn]), np.array([inside for _, inside in drawn])
    if member.all() or not member.any():
        with pytest.raises(ValueError, match="needs both"):
            membership(scores, member)
        return
    found = membership(scores, member)
    assert found.auc.value == pytest.approx(roc_auc_score(member, scores))
    assert 0 <= found.auc.low <= found.auc.value <= found.auc.high <= 1
    assert found.tpr.low <= found.tpr.value <= found.tpr.high


def test_the_curve_takes_ties_together() -> None:
    curve = roc_curve(np.array([2.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False]))
    assert curve.tolist() == [[0, 0], [0, 0.5], [0.5, 1], [1, 1]]


def test_a_perfect_attack_and_none() -> None:
    member = np.arange(400) < 200
    perfect = membership(member.astype(float), member)
    assert (perfect.auc.value, perfect.tpr.value, perfect.members, perfect.strangers) == (1, 1, 200, 200)
    assert perfect.tpr.low > 0.98
    nothing = membership(np.zeros(400), member)
    assert (nothing.auc.value, nothing.tpr.value) == (0.5, 0)
    assert nothing.auc.low < 0.5 < nothing.auc.high
    assert nothing.tpr.high < 0.02


def test_one_percent_of_the_strangers_may_be_taken_for_members() -> None:
    """Two of 200 strangers score highest of all, a third one above half of the members."""
    member = np.repeat([True, False], 200)
    scores = np.concatenate([np.full(100, 5.0), np.full(100, 1.0), [9.0, 9.0, 3.0], np.zeros(197)])
    assert membership(scores, member).tpr.value == 0.5


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_interval_covers_the_truth(shift: float) -> None:
    from scipy.stats import norm

    truth, covered = norm.cdf(shift / np.sqrt(2)), 0
    member = np.repeat([True, False], [150, 250])
    for seed in range(200):
        found = membership(np.random.default_rng([4, seed]).normal(size=400) + shift * member, member)
        covered += found.auc.low <= truth <= found.auc.high
    assert covered >= 180


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="equal length"):
        membership(np.zeros(3), np.zeros(2, bool))
    with pytest.raises(ValueError, match="NaN"):
        membership(np.array([np.nan, 1.0]), np.array([True, False]))
