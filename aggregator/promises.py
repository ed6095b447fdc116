"""From the settings of privacy to the terms that a plan states."""

import hashlib

from aggregator.config import AggregatorConfig
from aggregator.privacy_config import PrivacyConfig
from federation.errors import ConfigError
from federation.wire.terms import ClientTerms, PrivacyTerms, SampleTerms, SecAggTerms


def terms_of(config: AggregatorConfig, run: str, number: int, attempt: int) -> PrivacyTerms:
    """What the plan of a round promises.

    Args:
        config: All settings.
        run: Of the plan.
        number: Of the round.
        attempt: Of the plan.

    Returns:
        The same terms whenever the same plan is made, after a restart too.
    """
    sample, client, secagg = config.privacy.sample, config.privacy.client, config.privacy.secagg
    # The rotation hides nothing: it only makes all updates look alike. So it may be known to anyone beforehand.
    seed = hashlib.sha256(f"fedge/1 rotation {run}/{number}/{attempt}".encode()).digest()[:16]
    return PrivacyTerms(
        sample=SampleTerms(
            clip_norm=sample.clip_norm,
            delta=sample.delta,
            rounds=config.rounds.count,
            epsilon=sample.epsilon,
            noise_multiplier=sample.noise_multiplier,
        )
        if samples_protected(config.privacy)
        else None,
        client=ClientTerms(
            clip_norm=client.clip_norm,
            noise_multiplier=client.noise_multiplier,
            epsilon=client.epsilon,
            delta=client.delta,
            sampling_rate=client.sampling_rate,
        )
        if client.noise_multiplier
        else None,
        secagg=SecAggTerms(
            clip_norm=secagg.clip_norm,
            modulus_bits=secagg.modulus_bits,
            min_agents=secagg.min_agents,
            dropouts=secagg.dropouts,
            rotation_seed=seed,
            noise_multiplier=secagg.noise_multiplier,
            epsilon=secagg.epsilon if secagg.noise_multiplier else 0.0,
            delta=secagg.delta if secagg.noise_multiplier else 0.0,
        )
        if secagg.enabled
        else None,
    )


def samples_protected(privacy: PrivacyConfig) -> bool:
    """Whether devices train with DP-SGD."""
    return bool(privacy.sample.epsilon or privacy.sample.noise_multiplier)


def check_promises(config: AggregatorConfig) -> None:
    """Refuse settings of privacy that contradict each other, before anything starts.

    Raises:
        ConfigError: It names the two settings and what to do.
    """
    privacy = config.privacy
    sample, client, secagg = privacy.sample, privacy.client, privacy.secagg
    if sample.epsilon and sample.noise_multiplier:
        raise ConfigError(
            "privacy.sample.epsilon and privacy.sample.noise_multiplier are both set: keep epsilon, from which each "
            "device derives its noise, or noise_multiplier, from which each computes its epsilon"
        )
    _check_client(config)
    if secagg.enabled and client.noise_multiplier:
        raise ConfigError(
            "privacy.client.noise_multiplier needs single updates, which privacy.secagg hides from the aggregator: "
            "let the devices add the noise together with privacy.secagg.noise_multiplier"
        )
    if secagg.noise_multiplier and not secagg.enabled:
        raise ConfigError(
            "privacy.secagg.noise_multiplier is noise in a masked sum: set privacy.secagg.enabled = true"
        )
    if secagg.enabled and secagg.modulus_bits == 8 and not secagg.noise_multiplier:  # noqa: PLR2004 - see the message
        raise ConfigError(
            "privacy.secagg.modulus_bits = 8 leaves too few steps for updates without noise: set 16, or "
            "privacy.secagg.noise_multiplier"
        )
    if secagg.enabled:
        _check_cohort(config)


def _check_cohort(config: AggregatorConfig) -> None:
    secagg, rounds = config.privacy.secagg, config.rounds
    if rounds.cohort_size and rounds.cohort_size < secagg.min_agents:
        raise ConfigError(
            f"rounds.cohort_size is {rounds.cohort_size}, less than privacy.secagg.min_agents = {secagg.min_agents}: devices "
            f"refuse so small a sum; set rounds.cohort_size to at least {secagg.min_agents}"
        )
    most = secagg.dropouts / (1 - secagg.dropouts)
    if rounds.over_selection > most:
        raise ConfigError(
            f"rounds.over_selection is {rounds.over_selection:g}: devices that a round does not wait for count as dropouts, "
            f"of which privacy.secagg.dropouts allows {secagg.dropouts:.0%}; set it to {most:.2g} at most"
        )


def _check_client(config: AggregatorConfig) -> None:
    client, rounds = config.privacy.client, config.rounds
    for key, value, off in (
        ("sampling_rate", client.sampling_rate, 1.0),
        ("quantile", client.quantile, 0.0),
    ):
        if value != off and not client.noise_multiplier:
            raise ConfigError(
                f"privacy.client.{key} is {value:g}, but client-level privacy is off: set privacy.client.noise_multiplier"
            )
    for key, size in (("cohort_size", rounds.cohort_size), ("over_selection", rounds.over_selection)):
        if size and client.sampling_rate != 1:
            raise ConfigError(
                f"rounds.{key} is {size:g} and privacy.client.sampling_rate is {client.sampling_rate:g}: a secret draw has no fixed "
                f"size; set rounds.{key} = 0, or sampling_rate = 1"
            )
