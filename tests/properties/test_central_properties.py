"""Whatever a device sends, its part of the sum is at most C; whatever rounds cost, another one never makes it less."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from aggregator.strategies import Accumulator
from privacy.accounting import Spend, epsilon_rdp
from privacy.central import ClientMechanism

values = arrays(
    np.float32,
    (3, 4),
    elements=st.floats(-(2.0**50), 2.0**50, allow_nan=False, width=32, allow_subnormal=True),
)
updates = st.fixed_dictionaries({"w": values, "b": values})
clip_norms = st.floats(1e-6, 1e6)


def total_of(
    mechanism: ClientMechanism, sent: list[dict[str, NDArray[np.float32]]]
) -> dict[str, NDArray[np.longdouble]]:
    total = Accumulator({"w": (3, 4), "b": (3, 4)})
    for update in sent:
        total.add(mechanism.clip(update)[0], 1.0)
    return {name: array.astype(np.longdouble) for name, array in total.sums().items()}


@given(others=st.lists(updates, max_size=4), mine=updates, clip_norm=clip_norms)
def test_one_device_moves_the_sum_by_the_clip_norm_at_most(
    others: list[dict[str, NDArray[np.float32]]], mine: dict[str, NDArray[np.float32]], clip_norm: float
) -> None:
    mechanism = ClientMechanism(clip_norm, 1.0, 5.0)
    without, together = total_of(mechanism, others), total_of(mechanism, [*others, mine])
    moved = sum(np.sum((together[name] - without[name]) ** 2) for name in together)
    assert moved <= np.longdouble(clip_norm) ** 2


@given(sent=st.lists(updates, min_size=2, max_size=5), clip_norm=clip_norms)
def test_the_sum_has_the_same_bits_in_any_order_and_lies_on_the_grid(
    sent: list[dict[str, NDArray[np.float32]]], clip_norm: float
) -> None:
    mechanism = ClientMechanism(clip_norm, 1.0, 5.0)
    forth, back = total_of(mechanism, sent), total_of(mechanism, sent[::-1])
    exact = [mechanism.clip(update)[0] for update in sent]
    for name, array in forth.items():
        np.testing.assert_array_equal(array, back[name])
        np.testing.assert_array_equal(array, sum(part[name].astype(np.longdouble) for part in exact))


spends = st.builds(Spend, st.floats(0.5, 20), st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.integers(1, 100))


@settings(max_examples=50)
@given(before=st.lists(spends, max_size=4), more=spends)
def test_epsilon_never_falls(before: list[Spend], more: Spend) -> None:
    assert epsilon_rdp([*before, more], 1e-5) >= epsilon_rdp(before, 1e-5)
