"""Shares of one data set for trials with many agents: even, label-skewed, or a few classes each.

A share is written behind a data set: ``digits@iid,agent=1/3``, ``mnist:PATH@dirichlet(0.5),agent=2/3,seed=7``,
``cifar10:PATH@shards(2),agent=5/5``. The shares of all agents are disjoint and together are the whole set.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from federation.errors import ConfigError

_LOOKS_LIKE_ONE = re.compile(r"(iid|dirichlet|shards)\s*($|[(,])|.*\bagent\s*=")
_KIND = re.compile(r"(?P<iid>iid)|dirichlet\((?P<dirichlet>[^()]*)\)|shards\((?P<shards>[^()]*)\)")
_AGENT = re.compile(r"(\d{1,9})/(\d{1,9})")
_SEED = re.compile(r"\d{1,18}")
_FORMS = "write iid, dirichlet(ALPHA) or shards(K), then ,agent=I/N and if wanted ,seed=S"


@dataclass(frozen=True, slots=True)
class Partition:
    """One agent's share.

    Attributes:
        kind: ``iid``, ``dirichlet`` or ``shards``.
        agent: Whose share, counted from 1.
        agents: Among how many the set is divided.
        seed: Equal seeds divide equally; all agents of a trial must use the same.
        alpha: Concentration, for ``dirichlet``: small is uneven.
        shards: Shards for each agent, for ``shards``.
    """

    kind: Literal["iid", "dirichlet", "shards"]
    agent: int
    agents: int
    seed: int = 0
    alpha: float = 0.0
    shards: int = 0


def split_spec(spec: str) -> tuple[str, Partition | None]:
    """Cut a data spec into the data set and its partition, at the rightmost ``@`` if a partition follows.

    Returns:
        The data set's own spec, and the partition or None. A path may hold an ``@``.

    Raises:
        ConfigError: If what follows the ``@`` is meant as a partition but is not one.
    """
    source, at, text = spec.rpartition("@")
    if not at or not _LOOKS_LIKE_ONE.match(text):
        return spec, None
    head, *options = (part.strip() for part in text.split(","))
    kind = _KIND.fullmatch(head)
    if kind is None:
        raise ConfigError(f"partition {text!r}: {head!r} is no way to divide a data set; {_FORMS}")
    settings: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in ("agent", "seed") or key in settings:
            raise ConfigError(f"partition {text!r}: {option!r} is unknown or given twice; {_FORMS}")
        settings[key] = value
    agent = _AGENT.fullmatch(settings.get("agent", ""))
    if agent is None:
        raise ConfigError(f"partition {text!r} does not say whose share it is: add agent=1/3, say")
    seed = settings.get("seed", "0")
    if not _SEED.fullmatch(seed):
        raise ConfigError(f"partition {text!r}: seed={seed} is not a number of up to 18 digits")
    number, agents = int(agent[1]), int(agent[2])
    if not 1 <= number <= agents:
        raise ConfigError(
            f"partition {text!r}: agent={agent[0]} is not one of 1/{agents} to {agents}/{agents}"
        )
    whose = {"agent": number, "agents": agents, "seed": int(seed)}
    if kind["dirichlet"] is not None:
        return source, Partition("dirichlet", **whose, alpha=_alpha(kind["dirichlet"], text))
    if kind["shards"] is not None:
        return source, Partition("shards", **whose, shards=_shards(kind["shards"], text))
    return source, Partition("iid", **whose)


def divide(labels: np.ndarray, partition: Partition) -> list[np.ndarray]:
    """The shares of all agents.

    Args:
        labels: int64 ``[samples]``, the class of each sample.
        partition: How to divide; ``partition.agent`` plays no part.

    Returns:
        For each agent the sorted indices of its samples, int64. They are disjoint, and none is empty.

    Raises:
        ConfigError: If there are too few samples for that many agents.
    """
    pieces = partition.agents * max(1, partition.shards)
    if len(labels) < pieces:
        raise ConfigError(
            f"{len(labels)} samples cannot be divided among {partition.agents} agents ({partition.kind}, at least "
            f"{pieces} samples): an agent's share would be empty. Use fewer agents or a larger data set"
        )
    random = np.random.default_rng(partition.seed)
    match partition.kind:
        case "iid":
            shares = np.array_split(random.permutation(len(labels)), partition.agents)
        case "dirichlet":
            shares = _dirichlet(labels, partition, random)
        case "shards":
            shares = _by_shards(labels, partition, random)
    return [np.sort(share) for share in shares]


def share(labels: np.ndarray, partition: Partition) -> np.ndarray:
    """The sorted indices of the samples of ``partition.agent``; see :func:`divide`."""
    return divide(labels, partition)[partition.agent - 1]


def _alpha(text: str, whole: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"partition {whole!r}: dirichlet({text}) wants a number above 0, such as 0.5")
    return alpha


def _shards(text: str, whole: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise ConfigError(f"partition {whole!r}: shards({text}) wants a whole number from 1, such as 2")
    return int(text)


def _by_shards(labels: np.ndarray, partition: Partition, random: np.random.Generator) -> list[np.ndarray]:
    """McMahan et al. 2017, section 3: sort by label, cut into agents x k shards, deal k to each agent."""
    shuffled = random.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(by_label, partition.agents * partition.shards)
    dealt = random.permutation(len(shards)).reshape(partition.agents, partition.shards)
    return [np.concatenate([shards[number] for number in hand]) for hand in dealt]


def _dirichlet(labels: np.ndarray, partition: Partition, random: np.random.Generator) -> list[np.ndarray]:
    """Hsu et al. 2019: agents of equal size, each with its own class mixture drawn from a Dirichlet distribution.

    ``alpha`` is the concentration of every single class. Samples are drawn without replacement: once a class is
    used up, the mixtures of later agents are renormalised over the others.
    """
    classes, encoded = np.unique(labels, return_inverse=True)
    pools = [random.permutation(np.flatnonzero(encoded == number)) for number in range(len(classes))]
    left = np.array([len(pool) for pool in pools])
    shares = []
    for size in (len(part) for part in np.array_split(labels, partition.agents)):
        mixture = random.dirichlet(np.full(len(classes), partition.alpha))
        taken = _draw_counts(mixture, left, size, random)
        shares.append(
            np.concatenate(
                [pool[rest - take : rest] for pool, rest, take in zip(pools, left, taken, strict=True)]
            )
        )
        left = left - taken
    return shares


def _draw_counts(mixture: np.ndarray, left: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """How many samples of each class: ``size`` in all, none beyond what is ``left``."""
    taken = np.zeros_like(left)
    while (wanted := size - int(taken.sum())) > 0:
        open_classes = left - taken
        weights = np.where(open_classes > 0, mixture, 0.0)
        if weights.sum() < np.finfo(np.float64).tiny:  # a small alpha rounds a mixture's other classes to 0
            weights = open_classes.astype(np.float64)
        counts = random.multinomial(wanted, weights / weights.sum())
        taken = taken + np.minimum(counts, open_classes)
    return taken
