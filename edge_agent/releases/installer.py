"""What a device does with a release that is on its disk: test it, load it, make it the current one, go back.

All but the self-test runs in the thread that follows releases; the loop over the frames goes on meanwhile with the model
that it has. What goes wrong becomes an event.
"""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from edge_agent.releases.options import FollowerOptions
from edge_agent.releases.quarantine import Quarantine
from edge_agent.releases.rollout_events import (
    Activated,
    Event,
    Failed,
    NotLoaded,
    Offer,
    Passed,
    RolledBack,
    Started,
)
from edge_agent.releases.self_test import TestStoppedError, self_test
from edge_agent.releases.slots import Slots
from federation.errors import ConfigError, FedgeError, ReleaseError, ReleaseFault, VerificationError
from federation.wire.release import Release

if TYPE_CHECKING:
    from edge_agent.releases.slot_files import Slot
    from federation.task.engine import Engine

log = structlog.get_logger()

TEST_END_S = 2.0
"""What ending a self-test takes at most: the child is killed within a fraction of it."""

Install = Callable[["Engine | None", Release | None], None]
"""Makes an engine that is warmed up label the next frame; None takes the running one away."""


class Installer:
    """Carries out what concerns models on disk and in memory.

    Args:
        slots: The device's models.
        options: Settings.
        install: Makes an engine that is warmed up label the next frame; None takes the running one away.
        tell: Takes an event, in the follower's thread.
        post: Takes an event, from any thread.
    """

    def __init__(
        self,
        slots: Slots,
        options: FollowerOptions,
        install: Install,
        tell: Callable[[Event], None],
        post: Callable[[Event], None],
    ) -> None:
        self._slots, self._options, self._install = slots, options, install
        self._tell, self._post = tell, post
        self._engine: Engine | None = None
        self._test: threading.Thread | None = None
        self._test_stop = threading.Event()

    def quarantine(self) -> dict[str, str]:
        """SHA-256 of the models in quarantine, and why."""
        records = Quarantine(self._slots.folder, time.time).all()
        return {record.sha256: f"{record.fault.value}: {record.detail}" for record in records}

    def start(self, *, crashes: bool) -> None:
        """Load and install the current model, if there is one; tells :class:`Started` first.

        Args:
            crashes: Whether the process was started too often with it: then it is not loaded.
        """
        slots = self._slots
        trial = slots.trial is not None
        self._tell(Started(_offer(slots.current), _offer(slots.previous), trial=trial, crashes=crashes))
        if slots.current is not None and not (crashes and trial):
            self._load_current(slots.current)

    def test(self, offer: Offer) -> None:
        """Begin the self-test; posts :class:`Passed` or :class:`Failed` once."""
        slot = self._slots.find(offer.sha256)
        if slot is None:
            self._tell(Failed(offer.sha256, ReleaseFault.WRONG_HASH, "its slot cannot be read"))
            return
        self._test_stop.set()
        former, self._test_stop = self._test, threading.Event()
        arguments = (slot, former, self._test_stop)
        self._test = threading.Thread(target=self._run_test, args=arguments, name="self-test", daemon=True)
        self._test.start()

    def stop_test(self, timeout_s: float = 0.0) -> None:
        """End the self-test, if one runs: nothing is told of it. Waits at most so long for its end."""
        self._test_stop.set()
        if self._test is not None:
            self._test.join(timeout_s)

    def activate(self, offer: Offer, *, trial: bool) -> None:
        """Make a release the current one, in memory and on disk; tells :class:`Activated` or :class:`Failed`."""
        try:
            slot = self._slots.find(offer.sha256)
            if slot is None:
                raise ReleaseError(ReleaseFault.WRONG_HASH, "its slot cannot be read")
            engine = self._load(slot)
            self._slots.activate(slot)
            if not trial:
                self._slots.end_probation()
        except ReleaseError as error:
            self._tell(Failed(offer.sha256, error.fault, error.detail))
        except ConfigError as error:
            self._tell(Failed(offer.sha256, None, str(error)))
        else:
            self._use(engine, offer.release)
            self._tell(Activated(offer.sha256))

    def adopt(self, offer: Offer) -> None:
        """Note the new number of the current model."""
        try:
            self._slots.install(offer.release, offer.envelope)
        except FedgeError as error:
            log.error(
                "release_number_not_saved",
                number=offer.release.number,
                reason=str(error),
                lost="nothing: after a restart the same model goes by its former number",
            )
        self._use(self._engine, offer.release)

    def roll_back(self) -> None:
        """Make the previous release the current one; tells :class:`RolledBack`."""
        target = self._slots.previous
        try:
            target = self._slots.roll_back()
        except FedgeError as error:
            log.error(
                "rollback_not_saved",
                reason=str(error),
                lost="nothing: the previous model runs, and the next start goes back again",
                remedy="free some space on the disk",
            )
        self._tell(RolledBack(_offer(target)))
        if target is not None:
            self._load_current(target)
            return
        log.error(
            "no_model_left",
            lost="labels, until the next release comes",
            remedy="`aggregator release` another model, or run `edge-agent infer --model FILE`",
        )
        self._use(None, None)

    def condemn(self, sha256: str, fault: ReleaseFault, detail: str) -> None:
        """Put a model into quarantine."""
        self._slots.quarantine(sha256, fault, detail)

    def confirm(self, wanted: frozenset[str]) -> None:
        """End the probation, and delete what is of no use any more.

        Args:
            wanted: SHA-256 of models and objects that are being worked on.
        """
        try:
            self._slots.end_probation()
            self._slots.collect_garbage(self._options.keep_releases, wanted)
        except FedgeError as error:
            log.error("confirmation_not_saved", reason=str(error), lost="nothing: probation may begin again")

    def _run_test(self, slot: "Slot", former: threading.Thread | None, stop: threading.Event) -> None:
        if former is not None:
            former.join()  # one at a time: each takes the memory of a model
        try:
            report = self_test(
                slot.folder,
                threads=self._options.threads,
                max_latency_ms=self._options.settings.max_latency_ms,
                max_memory_mb=self._options.max_memory_mb,
                stop=stop,
            )
        except TestStoppedError:
            return
        except ReleaseError as error:
            self._post(Failed(slot.sha256, error.fault, error.detail))
        except Exception as error:  # noqa: BLE001 - a test without an outcome would be waited for for ever
            self._post(Failed(slot.sha256, None, f"the self-test could not be run: {error}"))
        else:
            log.info(
                "release_tested",
                number=slot.release.number,
                p50_ms=round(report.p50_ms, 2),
                p99_ms=round(report.p99_ms, 2),
                rss_mb=round(report.rss_mb),
            )
            self._post(Passed(slot.sha256))

    def _load(self, slot: "Slot") -> "Engine":
        """An engine that is warmed up.

        Raises:
            ReleaseError: ``broken`` or ``wrong_shape``.
        """
        from federation.task.engine import Engine

        try:
            engine = Engine(slot.model, threads=self._options.threads, top=self._options.top)
        except VerificationError as error:
            raise ReleaseError(ReleaseFault.WRONG_SHAPE, str(error)) from error
        except ConfigError as error:
            raise ReleaseError(ReleaseFault.BROKEN, str(error)) from error
        try:
            engine.warm_up()
        except VerificationError as error:
            raise ReleaseError(ReleaseFault.BROKEN, str(error)) from error
        return engine

    def _load_current(self, slot: "Slot") -> None:
        try:
            self._use(self._load(slot), slot.release)
        except ReleaseError as error:
            self._use(None, None)
            self._tell(NotLoaded(error.fault, error.detail))

    def _use(self, engine: "Engine | None", release: Release | None) -> None:
        self._engine = engine
        self._install(engine, release)


def _offer(slot: "Slot | None") -> Offer | None:
    return None if slot is None else Offer(slot.release, slot.manifest_version)
