"""Who takes part in a round: pure functions of the agents that are online."""

import math
import random
from collections.abc import Collection

from federation.wire.fields import MAX_COHORT

_ROUNDING = 9
"""Decimals to which a product is rounded before its ceiling is taken: 10 * (1 + 0.1) is a little more than 11."""


def sample_cohort(eligible: Collection[str], size: int, *, seed: int, round_number: int) -> tuple[str, ...]:
    """Draw a cohort uniformly without replacement.

    The draw depends on the names and the seed alone, so that a restarted aggregator draws the same cohort.

    Args:
        eligible: Agents that may take part.
        size: Agents wanted; at most all of them are drawn, and at most as many as a plan can name.
        seed: Of the run.
        round_number: Mixed into the seed.

    Returns:
        The cohort, sorted by name.
    """
    draw = random.Random(f"{seed}/{round_number}")  # noqa: S311 - a fair draw, not a secret
    return tuple(sorted(draw.sample(sorted(eligible), min(size, len(eligible), MAX_COHORT))))


def invitations(wanted: int, over_selection: float) -> int:
    """Agents to invite so that ``wanted`` deliver: ``ceil(wanted * (1 + over_selection))``."""
    return math.ceil(round(wanted * (1 + over_selection), _ROUNDING))


def quorum_of(wanted: int, share: float, least: int) -> int:
    """Updates without which a round is not closed: ``max(ceil(share * wanted), min(least, wanted))``, at least 1."""
    return max(1, math.ceil(round(share * wanted, _ROUNDING)), min(least, wanted))
