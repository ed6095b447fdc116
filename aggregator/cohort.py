"""Who takes part in a round: pure functions of the agents that are online."""

import math
import random
import secrets
from collections.abc import Collection

from federation.errors import ConfigError
from federation.wire.fields import MAX_COHORT

_ROUNDING = 9
"""Decimals to which a product is rounded before its ceiling is taken: 10 * (1 + 0.1) is a little more than 11."""


_DRAW_BITS = 53
"""A rate is a float64, whose 53 bits the draw compares exactly."""

_SURE_SIGMAS = 8.0
"""Standard deviations above its mean that a draw exceeds once in 10^15 times."""


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


def draw_secretly(eligible: Collection[str], rate: float) -> tuple[str, ...]:
    """Take each agent with probability ``rate``, independently of all others, by the operating system's entropy.

    This is the Poisson sampling that amplifies client-level privacy: nobody may foresee it or compute it again, so it
    depends on no seed, and the store keeps it for a restart.

    Args:
        eligible: Agents that may take part.
        rate: In (0, 1].

    Returns:
        The cohort, sorted by name; perhaps nobody.

    Raises:
        ConfigError: If so many agents are online that a draw may exceed what a plan can name. A draw that is cut short would
            not be Poisson any more.
    """
    expected = rate * len(eligible)
    if expected + _SURE_SIGMAS * math.sqrt(expected) > MAX_COHORT:
        raise ConfigError(
            f"privacy.client.sampling_rate is {rate:g}: of {len(eligible)} agents it may draw more than the {MAX_COHORT} that "
            f"a plan can name; lower it"
        )
    bar = round(rate * 2**_DRAW_BITS)
    return tuple(agent for agent in sorted(eligible) if secrets.randbits(_DRAW_BITS) < bar)


def invitations(wanted: int, over_selection: float) -> int:
    """Agents to invite so that ``wanted`` deliver: ``ceil(wanted * (1 + over_selection))``."""
    return math.ceil(round(wanted * (1 + over_selection), _ROUNDING))


def quorum_of(wanted: int, share: float, least: int) -> int:
    """Updates without which a round is not closed: ``max(ceil(share * wanted), min(least, wanted))``, at least 1."""
    return max(1, math.ceil(round(share * wanted, _ROUNDING)), min(least, wanted))
