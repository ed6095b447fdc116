"""The least privacy that a device accepts, and what a plan lacks of it.

A requirement is a layer and its bounds, such as ``sample-dp eps<=8 delta<=1e-5`` or ``secagg n>=10``:

============== ================== =====================================================================================
layer          bounds             met by
============== ================== =====================================================================================
sample-dp      eps<=, delta<=     terms for samples; eps also by the device's own max_epsilon
client-dp      eps<=, delta<=     terms for devices, whoever adds the noise: the aggregator, or the devices together
distributed-dp eps<=, delta<=     noise that the devices add together, under secure aggregation
secagg         n>=                secure aggregation of at least n devices
============== ================== =====================================================================================
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from federation.errors import ConfigError
from federation.task.names import did_you_mean
from federation.wire.terms import PrivacyTerms

_NOISE_BOUNDS: Final = {"eps": "<=", "delta": "<="}
_LAYERS: Final = {
    "sample-dp": _NOISE_BOUNDS,
    "client-dp": _NOISE_BOUNDS,
    "distributed-dp": _NOISE_BOUNDS,
    "secagg": {"n": ">="},
}
_BOUND: Final = re.compile(r"([a-z]+)(<=|>=|=|<|>)(\S+)")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement.

    Attributes:
        layer: ``sample-dp``, ``client-dp``, ``distributed-dp`` or ``secagg``.
        bounds: By name: ``eps`` and ``delta`` at most, ``n`` at least.
        text: As the operator wrote it.
    """

    layer: str
    bounds: dict[str, float] = field(hash=False)
    text: str


@dataclass(frozen=True, slots=True)
class _Offered:
    """What a plan gives of a layer; None where it says nothing of a bound."""

    eps: float | None = None
    delta: float | None = None
    n: float | None = None


def parse_requirement(text: str) -> Requirement:
    """Read a requirement.

    Raises:
        ConfigError: If the layer or a bound is not known, or a bound is no positive number.
    """
    layer, *words = text.split() or [""]
    if layer not in _LAYERS:
        raise ConfigError(
            f"privacy.require: unknown layer {layer!r} in {text!r}{did_you_mean(layer, list(_LAYERS))} "
            f"Known are {', '.join(_LAYERS)}"
        )
    known, bounds = _LAYERS[layer], {}
    for word in words:
        found = _BOUND.fullmatch(word)
        name, sign, number = found.groups() if found else ("", "", "")
        if known.get(name) != sign:
            forms = " and ".join(f"{name}{sign}NUMBER" for name, sign in known.items())
            raise ConfigError(
                f"privacy.require: {word!r} in {text!r} is no bound of {layer}: it takes {forms}"
            )
        try:
            bounds[name] = float(number)
        except ValueError:
            raise ConfigError(f"privacy.require: {number!r} in {text!r} is not a number") from None
        if not bounds[name] > 0:
            raise ConfigError(f"privacy.require: {word!r} in {text!r} can never be met: it must be above 0")
    return Requirement(layer, bounds, text)


def objection(terms: PrivacyTerms, required: Sequence[Requirement], max_epsilon: float) -> str:
    """What a plan lacks.

    Args:
        terms: Of the plan.
        required: All must be met.
        max_epsilon: More than this the device never spends on samples, whatever a plan says.

    Returns:
        For the operator and the aggregator; empty where nothing lacks.
    """
    for requirement in required:
        lack = _lack(requirement, _offered(requirement.layer, terms, max_epsilon))
        if lack:
            return f"this device requires {requirement.text!r} (privacy.require), {lack}; it states: {describe(terms)}"
    return ""


def describe(terms: PrivacyTerms) -> str:
    """The terms in the words of requirements."""
    parts = []
    if terms.sample is not None:
        noise = (
            f"eps<={terms.sample.epsilon:g}"
            if terms.sample.epsilon
            else f"noise {terms.sample.noise_multiplier:g}"
        )
        parts.append(f"sample-dp {noise} delta<={terms.sample.delta:g}")
    if terms.client is not None:
        parts.append(f"client-dp eps<={terms.client.epsilon:g} delta<={terms.client.delta:g}")
    if terms.secagg is not None:
        parts.append(f"secagg n>={terms.secagg.min_agents}")
        if terms.secagg.noise_multiplier:
            parts.append(f"distributed-dp eps<={terms.secagg.epsilon:g} delta<={terms.secagg.delta:g}")
    return ", ".join(parts) or "no privacy terms"


def _offered(layer: str, terms: PrivacyTerms, max_epsilon: float) -> _Offered | None:
    sample, client, secagg = terms.sample, terms.client, terms.secagg
    distributed = secagg if secagg is not None and secagg.noise_multiplier else None
    match layer:
        case "sample-dp" if sample is not None:
            return _Offered(eps=min(sample.epsilon or max_epsilon, max_epsilon), delta=sample.delta)
        case "client-dp" if client is not None:
            return _Offered(eps=client.epsilon, delta=client.delta)
        case "client-dp" | "distributed-dp" if distributed is not None:
            return _Offered(eps=distributed.epsilon, delta=distributed.delta)
        case "secagg" if secagg is not None:
            return _Offered(n=secagg.min_agents)
    return None


def _lack(requirement: Requirement, offered: _Offered | None) -> str:
    if offered is None:
        return "the plan does not promise it"
    for name, bound in requirement.bounds.items():
        given: float | None = getattr(offered, name)
        assert given is not None  # what a layer is bounded by, it states
        if given < bound if name == "n" else given > bound:
            return f"the plan has {name} {given:g}"
    return ""
