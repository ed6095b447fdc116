"""The noise of one round of client-level privacy: what was paid for it, and which noisy model was about to be named.

**Noise is drawn from entropy and never stored**, so a fold that ``kill -9`` has cut off cannot make the same bits again. What it
must not do is show two different noises of one sum: their mean has less noise than was paid for. So the digest of the noisy
model is committed before its checkpoint gets its name. After a restart there are two cases. The checkpoint is there and
has this digest: it is the round's model, as it is. It is not there: nobody can have seen the former noise, and it is drawn
anew. (An encoded delta may lie there: nothing names it, no device has been told of it, and it is overwritten. The raw updates
lie in the same folder at that time.) A clip norm that adapts is noisy too: the next one is committed with the digest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.records import StoredVersion
from aggregator.store import Store
from aggregator.strategies import Accumulator, Arrays
from federation.wire.codec import Schema
from privacy.accounting import Spend
from privacy.central import Adaptation, ClientMechanism


@dataclass(frozen=True, slots=True)
class NoisyRound:
    """A round that was paid for.

    Attributes:
        run: That it belongs to.
        round: Number.
        noise_multiplier: On the sum and the count together, in units of the clip norm.
        sampling_rate: Of the secret draw; 1 for no draw.
        clip_norm: C.
        expected: Devices by which the sum is divided.
        epsilon: Budget of the run as it was announced.
        delta: At which it is stated.
        digest: Of the model with its noise; None until that is made.
        encoding: Of the delta that leads there; None as for the digest.
        next_clip_norm: None as for the digest.
    """

    run: str
    round: int
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float
    expected: float
    epsilon: float
    delta: float
    digest: str | None = None
    encoding: str | None = None
    next_clip_norm: float | None = None

    @property
    def spend(self) -> Spend:
        """What it costs."""
        return Spend(self.noise_multiplier, self.sampling_rate, 1)


def noisy_rounds(store: Store) -> list[NoisyRound]:
    """All that were paid for in this folder, oldest first: those of former runs too, whose model goes on in this one."""
    columns = ", ".join(NoisyRound.__dataclass_fields__)
    return [
        NoisyRound(*row)
        for row in store.read(f"SELECT {columns} FROM noisy_rounds ORDER BY rowid")  # noqa: S608 - our own names
    ]


def bare_rounds(store: Store) -> list[int]:
    """Rounds without noise: closed ones whose model is not one that was kept here, and an open one that was not paid for."""
    paid = noisy_rounds(store)
    made = {(row.round, row.digest) for row in paid}
    under_way = {row.round for row in paid if row.run == store.run}
    bare = []
    for row in store.rounds():
        version = store.version(row.round)
        closed_bare = row.phase == "closed" and (version is None or (row.round, version.digest) not in made)
        if closed_bare or (row.phase != "closed" and row.round not in under_way):
            bare.append(row.round)
    return bare


class NoisyMean(Accumulator):
    """A mean of clipped updates with noise; 16 bytes a parameter. The weights that it is given do not count.

    Args:
        schema: Tensor name -> shape.
        mechanism: Of the round.
    """

    def __init__(self, schema: Schema, mechanism: ClientMechanism) -> None:
        super().__init__(schema)
        self._mechanism, self._below = mechanism, 0

    def add(self, delta: Arrays, weight: float) -> None:  # noqa: ARG002 - a weight would change the sensitivity
        """Clip ``delta`` and add it."""
        clipped, below = self._mechanism.clip(delta)
        super().add(clipped, 1.0)
        self._below += below

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """``(sum + noise) / expected``, float64: other noise at every call. Noise alone if nothing was added."""
        return self._mechanism.noisy_mean(self.sums())

    def next_clip_norm(self) -> float:
        """Of the next round: other noise at every call."""
        return self._mechanism.next_clip_norm(self._below, self.count)


class RoundNoise:
    """The noise of one round.

    Args:
        store: Holds what was paid.
        paid: For this round.
        adaptation: Of the clip norm.
    """

    def __init__(self, store: Store, paid: NoisyRound, adaptation: Adaptation | None) -> None:
        self._store, self._paid = store, paid
        self.mechanism = ClientMechanism(paid.clip_norm, paid.noise_multiplier, paid.expected, adaptation)
        self._total: NoisyMean | None = None

    def begin(self, schema: Schema) -> NoisyMean:
        """A new, empty accumulator in the place of the former."""
        self._total = NoisyMean(schema, self.mechanism)
        return self._total

    def kept(self) -> StoredVersion | None:
        """The noisy model that an earlier fold of this round was about to name."""
        if self._paid.digest is None or self._paid.encoding is None:
            return None
        return StoredVersion(self._paid.digest, self._paid.encoding)

    def keep(self, version: StoredVersion) -> None:
        """Commit which model is about to be named. From then on no other noise of this round may be shown."""
        assert self._total is not None
        next_clip_norm = self._total.next_clip_norm()
        with self._store.transaction() as db:
            db.execute(
                "UPDATE noisy_rounds SET digest = ?, encoding = ?, next_clip_norm = ? WHERE run = ? AND round = ?",
                (version.digest, version.encoding, next_clip_norm, self._paid.run, self._paid.round),
            )
