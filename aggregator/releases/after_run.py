"""The automatic release at the end of a run (``[release] auto``): once for each last round, however often the server restarts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from aggregator.releases.rollout_events import ForReleases
from aggregator.store import Store
from federation.errors import FedgeError

log = structlog.get_logger()

MakeRelease: TypeAlias = Callable[[int], str]
"""Makes a release of the model after a round, or says why not, and asks the server to announce it. Returns what it has done,
for people. It may take minutes, and runs beside the server's loop: the loop's process must not import torch for it."""

_MEMORY_KEY = "released_automatically"


@dataclass(frozen=True, slots=True)
class Made(ForReleases):
    """A release was made, or could not be.

    Attributes:
        round: Whose model.
        token: To be remembered; empty when it failed.
        outcome: For people.
    """

    round: int
    token: str
    outcome: str


class AfterRun:
    """Has a release made of the last model of a finished run. Its methods return at once.

    Args:
        store: Remembers for which rounds that was done.
        submit: Does work elsewhere and hands its result to the loop.
        make: Makes the release; None where nothing is to be released by itself.
    """

    def __init__(
        self, store: Store, submit: Callable[[Callable[[], object]], None], make: MakeRelease | None
    ) -> None:
        self._store, self._submit, self._make = store, submit, make
        self._working = False

    @property
    def busy(self) -> bool:
        """Whether a release is being made."""
        return self._working

    def finished(self, number: int) -> None:
        """The run is over after round ``number``. :class:`Made` follows if a release is to be made."""
        make, token = self._make, f"{self._store.run}:{number}"
        if make is None or number == 0 or self._working or self._store.recall(_MEMORY_KEY) == token:
            return
        self._working = True
        log.info("automatic_release_begun", round=number)

        def work() -> object:
            try:
                return Made(number, token, make(number))
            except FedgeError as error:
                return Made(number, "", str(error))

        self._submit(work)

    def made(self, made: Made) -> None:
        """Take the result. What failed is tried again by the next server."""
        self._working = False
        if made.token:
            self._store.remember(_MEMORY_KEY, made.token)
            log.info("automatic_release_ended", round=made.round, outcome=made.outcome)
        else:
            log.error(
                "automatic_release_failed",
                round=made.round,
                reason=made.outcome,
                lost="devices keep the release that they run",
                remedy="`aggregator release` makes it by hand; the next `aggregator serve` tries again",
            )
